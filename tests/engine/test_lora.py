"""LoRAs against diffusers' own reading of the same files, merged and taken out again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.attention import sdpa
from engine.config import LoraUse
from engine.dit import DiT
from engine.eight_bit import EightBitBlocks, Switch
from engine.errors import RequestError
from engine.load import load_pipeline
from engine.lora import Loras, _Kept
from engine.lora_files import LoraFolder, read_lora
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.requests import resolve
from tests.engine.loras import RANK, STYLES, factors, write_lora
from tests.engine.oracle import TEXT_DIM, TEXT_LEN, relative, twin_dits
from tests.engine.sinks import Frames

STRENGTH = 0.7


def shapes_of(expert: DiT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in expert.named_parameters()}


def diffusers_reading(path: Path) -> dict[str, Tensor]:
    """lora_A and lora_B by diffusers' module names, alphas folded in, by diffusers' own converters."""
    state = load_file(path)
    if any(key.startswith("lora_unet_") for key in state):
        state = _convert_musubi_wan_lora_to_diffusers(state)
    elif any(key.startswith("diffusion_model.") for key in state):
        state = _convert_non_diffusers_wan_lora_to_diffusers(state)
    return {key.removeprefix("transformer."): tensor for key, tensor in state.items()}


def merge(theirs: WanTransformer3DModel, lora: dict[str, Tensor], strength: float) -> int:
    """Add strength * B A to the oracle's weights; how many of them."""
    count = 0
    for key, down in lora.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            weight = theirs.get_submodule(module).weight
            weight.data += strength * (lora[f"{module}.lora_B.weight"] @ down)
            count += 1
    return count


@pytest.mark.parametrize("style", [s for s in STYLES if s != "kohya of diffusers' modules"])
def test_a_lora_does_what_diffusers_makes_of_the_file(
    generator: torch.Generator, tmp_path: Path, style: str
) -> None:
    ours, theirs = twin_dits(generator, layers=2)
    write_lora(tmp_path / "style.safetensors", ours, style)
    loras = Loras(LoraFolder(tmp_path), ours, None, Mesh.single())
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator)

    def output() -> Tensor:
        return ours(latents, torch.tensor([[700]]), ours.encode_text(text))

    plain = output()
    loras.use((LoraUse("style", STRENGTH),))
    assert merge(theirs, diffusers_reading(tmp_path / "style.safetensors"), STRENGTH) == 2 * 10
    with torch.no_grad():
        expected = theirs(latents, torch.tensor([700.0]), text).sample
    error = relative(output(), expected)
    print(f"relative error {error:.2e}")
    assert error < 1e-4
    assert relative(plain, expected) > 1e-2
    loras.use(())
    assert torch.equal(output(), plain)


def test_two_loras_of_the_same_tensors_add_up(generator: torch.Generator, tmp_path: Path) -> None:
    ours, theirs = twin_dits(generator, layers=1)
    uses = (LoraUse("one", STRENGTH), LoraUse("two", -0.4))
    for seed, use in enumerate(uses):
        merge(
            theirs,
            diffusers_reading(write_lora(tmp_path / f"{use.name}.safetensors", ours, seed=seed)),
            use.strength,
        )
    Loras(LoraFolder(tmp_path), ours, None, Mesh.single()).use(uses)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator)
    with torch.no_grad():
        got = ours(latents, torch.tensor([[700]]), ours.encode_text(text))
        assert relative(got, theirs(latents, torch.tensor([700]), text).sample) < 1e-4


def test_every_style_is_the_same_change(generator: torch.Generator, tmp_path: Path) -> None:
    expert, _ = twin_dits(generator, layers=1)
    reference = {f"{module}.weight": up @ down for module, (up, down) in factors(expert, seed=3).items()}
    for style, (*_, has_alpha) in STYLES.items():
        changes = read_lora(write_lora(tmp_path / "a.safetensors", expert, style), shapes_of(expert))
        assert changes.keys() == reference.keys()
        scale = 2.0 / RANK if has_alpha else 1.0
        for name, change in changes.items():
            assert torch.allclose(change.delta(), reference[name] * scale, atol=1e-6), (style, name)


def test_whole_differences_of_weights_and_biases(generator: torch.Generator, tmp_path: Path) -> None:
    expert, _ = twin_dits(generator, layers=1)
    diffs = {
        "diffusion_model.blocks.0.norm3.diff": torch.randn(256),
        "diffusion_model.blocks.0.norm3.diff_b": torch.randn(256),
        "diffusion_model.patch_embedding.diff": torch.randn(256, 16, 1, 2, 2),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.randn(320),
    }
    save_file(diffs, tmp_path / "d.safetensors")
    before = {name: p.clone() for name, p in expert.named_parameters()}
    loras = Loras(LoraFolder(tmp_path), expert, None, Mesh.single())
    loras.use((LoraUse("d", 2.0),))
    after = dict(expert.named_parameters())
    names = ("blocks.0.norm3.weight", "blocks.0.norm3.bias", "patch_embedding.weight", "blocks.0.ffn.0.bias")
    for name, diff in zip(names, diffs.values(), strict=True):
        assert torch.allclose(after[name], before[name] + 2 * diff)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(names)
    loras.use(())
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="module")
def bf16(tiny: Path, pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """In bf16, where adding and subtracting again would drift."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("style", "other")):
        write_lora(folder / f"{name}.safetensors", pipeline.high, seed=seed)
    return load_pipeline(tiny, device="cpu", dtype=torch.bfloat16, loras=folder)


def run(pipeline: Pipeline, *loras: LoraUse, **fields: object) -> np.ndarray:
    sink = Frames()
    given = {"frame_num": 5, "sampling_steps": 4, "shift": 1.0, "seed": 5} | fields
    pipeline.generate(resolve(pipeline.spec, "a cat", loras=loras, **given), sink)  # type: ignore[arg-type]
    return sink.video


def weights(pipeline: Pipeline) -> list[Tensor]:
    assert pipeline.low is not None
    return [p.clone() for expert in (pipeline.high, pipeline.low) for p in expert.parameters()]


def test_requests_without_a_lora_are_untouched_by_those_with_one(bf16: Pipeline) -> None:
    plain, before = run(bf16), weights(bf16)
    uses = (
        (LoraUse("style", 0.7),),
        (LoraUse("style", 0.7), LoraUse("other", -1.3, "low")),
        (LoraUse("other", 5.0, "high"),),
    )
    seen = [plain]
    for _ in range(3):
        for use in uses:
            seen.append(run(bf16, *use))
            assert not all(torch.equal(a, b) for a, b in zip(weights(bf16), before, strict=True))
        assert np.array_equal(run(bf16), plain)
    assert all(torch.equal(a, b) for a, b in zip(weights(bf16), before, strict=True))
    assert [len(v) for v in seen] == [5] * 10
    assert len({v.tobytes() for v in seen}) == 4  # each use makes its own video, every time the same


def test_adding_and_subtracting_would_drift(bf16: Pipeline) -> None:
    """Why the originals are kept: the difference of two bf16 roundings isn't zero."""
    weight = bf16.high.blocks[0].ffn[0].weight.data  # type: ignore[union-attr, index]
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    there = (weight.float() + delta).bfloat16()
    assert not torch.equal((there.float() - delta).bfloat16(), weight)


def test_an_expert_alone_changes_only_its_own_steps(bf16: Pipeline) -> None:
    high_only = {"sampling_steps": 1}  # its one step is the high-noise expert's
    plain = run(bf16, **high_only)
    assert np.array_equal(run(bf16, LoraUse("style", 1.0, "low"), **high_only), plain)
    assert not np.array_equal(run(bf16, LoraUse("style", 1.0, "high"), **high_only), plain)


def test_four_step_distilled_use_takes_four_forwards(bf16: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, int]] = []
    original = DiT.forward

    def counted(self: DiT, latents: Tensor, t: Tensor, text: list, *rest: object) -> Tensor:
        rows.append(("high" if self is bf16.high else "low", len(text[0][0])))
        return original(self, latents, t, text, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DiT, "forward", counted)
    loras = (LoraUse("style", 1.0, "high"), LoraUse("other", 1.0, "low"))
    video = run(bf16, *loras, guide_scale=(1.0, 1.0), sampling_steps=4, shift=5.0)
    assert rows == [("high", 1)] * 2 + [("low", 1)] * 2
    assert video.shape == (5, 48, 64, 3)


def test_what_fails_in_the_middle_leaves_no_trace(
    bf16: Pipeline, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, before = run(bf16), weights(bf16)
    calls = 0
    assert bf16.loras is not None
    original = bf16.loras._change

    def fail(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        original(*arguments)  # type: ignore[arg-type]
        if calls == 7:
            raise torch.OutOfMemoryError("7 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(bf16.loras, "_change", fail)
        with pytest.raises(Exception, match="7 GiB"):
            run(bf16, LoraUse("style"))
    assert all(torch.equal(a, b) for a, b in zip(weights(bf16), before, strict=True))
    assert np.array_equal(run(bf16), plain)


def test_what_could_not_be_undone_is_undone_by_the_next_request(
    bf16: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that fails, and its way back too; then a request without any LoRA."""
    before = weights(bf16)
    assert bf16.loras is not None
    merging, restoring = bf16.loras._change, _Kept.restore

    def change(*arguments: object) -> None:
        merging(*arguments)  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("7 GiB")

    def restore(self: _Kept) -> None:
        raise torch.OutOfMemoryError("8 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(bf16.loras, "_change", change)
        patch.setattr(_Kept, "restore", restore)
        with pytest.raises(Exception, match="8 GiB"):
            run(bf16, LoraUse("style"))
    assert not all(torch.equal(a, b) for a, b in zip(weights(bf16), before, strict=True))
    assert restoring is _Kept.restore
    run(bf16)
    assert all(torch.equal(a, b) for a, b in zip(weights(bf16), before, strict=True))


def test_a_file_that_is_replaced_counts_from_the_next_request(bf16: Pipeline, pipeline: Pipeline) -> None:
    """Under the same name; for the weights that were quantised with the old one in them, too."""
    assert bf16.loras is not None
    path, expert = bf16.loras.folder.path("style"), bf16.high
    eight, block = EightBitBlocks(Switch(sdpa), keep_weights=True), bf16.high.blocks[0]
    old = path.read_bytes()

    def off() -> float:
        """How far the quantised q is from the merged one."""
        assert bf16.loras is not None
        eight.refresh(bf16.loras.merged)
        q = expert.blocks[0].self_attn.q.weight.float()
        return relative(eight.weights(block).qkv.float()[: len(q)], q)

    try:
        bf16.loras.use((LoraUse("style", 3.0),))
        assert off() < 0.05
        merged = weights(bf16)
        write_lora(path, pipeline.high, seed=77)
        bf16.loras.use((LoraUse("style", 3.0),))
        assert not all(torch.equal(a, b) for a, b in zip(weights(bf16), merged, strict=True))
        assert off() < 0.05
    finally:
        path.write_bytes(old)
        bf16.loras.use(())


def wrong(pipeline: Pipeline, use: LoraUse) -> str:
    with pytest.raises(RequestError, match=r"^loras: got") as caught:
        run(pipeline, use)
    print(caught.value)
    return str(caught.value)


def test_only_the_folders_files_can_be_named(bf16: Pipeline, tmp_path: Path) -> None:
    assert bf16.loras is not None
    folder = bf16.loras.folder.folder
    outside = write_lora(tmp_path / "outside.safetensors", bf16.high)
    (folder / "link.safetensors").symlink_to(outside)
    for name in ("unknown", "../outside", str(outside.with_suffix("")), "", ".", "style.safetensors", "a/b"):
        assert "other, style" in wrong(bf16, LoraUse(name)) or "link" in wrong(bf16, LoraUse(name))
    assert "links out of it" in wrong(bf16, LoraUse("link"))
    (folder / "link.safetensors").unlink()
    assert bf16.loras.folder.names() == ["other", "style"]


def test_files_that_do_not_fit_name_what_is_wrong(bf16: Pipeline) -> None:
    assert bf16.loras is not None
    folder = bf16.loras.folder.folder
    good = load_file(folder / "style.safetensors")
    module = "lora_unet_blocks_0_self_attn_q"
    plain = run(bf16)
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "another model": ({"lora_unet_blocks_99_ffn_0.lora_up.weight": torch.ones(2, 2)}, "blocks_99"),
        "half": ({f"{module}.lora_up.weight": good[f"{module}.lora_up.weight"]}, "only half"),
        "shape": (good | {f"{module}.lora_down.weight": torch.ones(RANK, 63)}, r"its shape [64, 64]"),
        "rank": (good | {f"{module}.lora_down.weight": torch.ones(RANK + 1, 64)}, r"its shape [64, 64]"),
        "dora": ({f"{module}.dora_scale": torch.ones(64)}, "dora_scale is not understood"),
        "empty": ({}, "it is empty"),
    }
    for name, (tensors, words) in cases.items():
        save_file(tensors, folder / "bad.safetensors")
        assert words in wrong(bf16, LoraUse("bad")), name
    (folder / "bad.safetensors").write_bytes((folder / "style.safetensors").read_bytes()[:-5])
    assert "bad.safetensors" in wrong(bf16, LoraUse("bad"))
    (folder / "bad.safetensors").unlink()
    assert np.array_equal(run(bf16), plain)


def test_requests_are_checked(pipeline: Pipeline, bf16: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"loras: .*at most 8"):
        resolve(pipeline.spec, "a", loras=(LoraUse("style"),) * 9)
    for strength in (float("nan"), 10.5, -10.5):
        with pytest.raises(RequestError, match=r"loras: .*strengths"):
            resolve(pipeline.spec, "a", loras=(LoraUse("style", strength),))
    assert "none" in wrong(pipeline, LoraUse("style"))  # its checkpoint has no loras/
    alone = Loras(LoraFolder(bf16.loras.folder.folder), bf16.high, None, Mesh.single())  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="allowed: both, high"):
        alone.use((replace(LoraUse("style"), expert="low"),))
