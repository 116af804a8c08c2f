"""The command that shows what the fused path costs in pixels, on a tiny model and a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import lossless
from engine import fused

CPU = torch.device("cpu")
PROMPTS = ["a red ball"]


@pytest.fixture(scope="module")
def found(tiny: Path) -> dict[str, Any]:
    return lossless.compare(tiny, PROMPTS, 5, CPU)


def test_ours_is_as_near_to_fp32_as_plain_bf16(found: dict[str, Any]) -> None:
    print(found)
    assert all(len(found[name]["psnr_db"]) == 1 for name in (lossless.PLAIN, lossless.OURS))
    assert 20 < found[lossless.PLAIN]["mean_db"] < 90  # bf16 differs, and isn't another video
    assert found["good"]


def test_a_worse_path_is_called_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.head

    def worse(*arguments: Any) -> Tensor:
        out = right(*arguments)
        return out + 0.02 * out.std() * torch.randn_like(out)

    monkeypatch.setattr(fused, "head", worse)
    assert not lossless.compare(tiny, PROMPTS, 5, CPU)["good"]
