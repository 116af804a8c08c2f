import hashlib
import json
from pathlib import Path

import torch

from engine.checkpoint_writer import build_tokenizer
from engine.pipeline import Pipeline
from engine.specs import describe
from engine.text_encoder import load_tokenizer
from engine.tiny import CORPUS, make_tiny
from jobs.job import ModelCard


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_layout_is_the_official_one_and_the_seed_decides(tiny: Path, tmp_path: Path) -> None:
    again, other = make_tiny(tmp_path / "again", seed=1), make_tiny(tmp_path / "other", seed=2)
    files = digests(tiny)
    assert set(files) == {
        "reel.json",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
        "google/umt5-xxl/tokenizer_config.json",
        *(
            f"{expert}/{name}"
            for expert in ("high_noise_model", "low_noise_model")
            for name in (
                "config.json",
                "diffusion_pytorch_model.safetensors.index.json",
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
            )
        ),
    }
    assert digests(again) == files
    weights = {name for name in files if name.endswith((".pth", ".safetensors"))}
    assert {name for name, digest in digests(other).items() if files[name] != digest} == weights


def test_no_tensor_is_constant(pipeline: Pipeline) -> None:
    for model in (pipeline.high, pipeline.low, pipeline.vae, pipeline.text_encoder):
        assert model is not None
        constant = [n for n, p in model.named_parameters() if p.numel() > 1 and p.float().std() == 0]
        assert constant == []


def test_the_tokenizer_knows_every_text(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "google" / "umt5-xxl")
    for text in ("a cat walks", "一只猫在走", "naïve façade", "🎬 done"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1  # </s>
        assert 2 not in ids  # <unk>
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert build_tokenizer(CORPUS, 384)("a cat walks")["input_ids"] == tokenizer("a cat walks")["input_ids"]


def test_the_description_is_a_model_card(pipeline: Pipeline) -> None:
    card = describe(pipeline.spec)
    assert json.loads(json.dumps(card)) == card
    parsed = ModelCard(**card)
    assert (parsed.name, parsed.task, parsed.default_size) == ("tiny-t2v", "t2v", "64*48")
    assert (parsed.default_frame_num, parsed.default_guide_scale, parsed.size_multiple) == (9, (3.0, 4.0), 16)


def test_two_experts_differ(pipeline: Pipeline) -> None:
    assert pipeline.low is not None
    assert not torch.equal(pipeline.high.blocks[0].modulation, pipeline.low.blocks[0].modulation)  # type: ignore[arg-type]
