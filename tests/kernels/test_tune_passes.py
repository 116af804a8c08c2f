"""The tuner's passes: ours and the reference are given the same, and a wrong setting is no candidate."""

import pytest
import torch
from torch import Tensor

from benchmarks import _tune_passes as passes
from benchmarks._tune_passes import NothingRight, Pass, fastest, norm_passes, right, vae_passes


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Small tensors here; settings in force are recorded; a setting's time is what it says."""
    forced: list[dict[str, int]] = []
    monkeypatch.setattr(passes, "randn", lambda *shape: torch.randn(*shape))
    monkeypatch.setattr(passes, "force", lambda op, key, entry: forced.append(entry))
    monkeypatch.setattr(passes, "burst", lambda call: forced[-1]["warps"])
    monkeypatch.setattr(passes, "DIMS", {1024: 8})
    monkeypatch.setattr(passes, "VAE_SHAPES", {16: ()})
    return forced


def test_ours_is_the_reference_in_every_pass() -> None:
    """Interpreted, with the defaults: both sides of a pass compute the same thing."""
    found = [*norm_passes(rows=24), *vae_passes(small=True)]
    ops = {"norm_modulate", "qk_norm_rope", "rms_norm", "vae_norm_silu", "vae_upsample"}
    assert {one.op for one in found} == ops
    assert not right((torch.ones(8), torch.ones(8)), (torch.ones(8), torch.zeros(8)))
    for one in found:
        one.ours()
        one.reset()  # a call that moves its inputs on is checked from the same start
        assert right(one.ours(), one.want()), one.op


def test_a_wrong_or_broken_setting_never_wins(on_a_cpu: list[dict[str, int]]) -> None:
    want = torch.ones(64)

    def ours() -> Tensor:
        return {1: want * 1.02, 2: want * torch.nan, 4: want * 1.001, 8: want}[on_a_cpu[-1]["warps"]]

    entries = [{"warps": warps} for warps in (1, 2, 4, 8)]
    best = fastest(Pass("op", "8", entries, ours, lambda: want))
    assert best == {"warps": 4, "ms": 4}
    assert on_a_cpu[-1] == best  # what was measured last is not what stays in force
    with pytest.raises(NothingRight, match="op 8"):
        fastest(Pass("op", "8", entries[:2], ours, lambda: want))
