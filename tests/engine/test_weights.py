"""The loader on real names and shapes, and on checkpoints that are wrong in every way we thought of."""

import json
import lzma
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import read_dit_config, read_vae_config
from engine.dit import DiT
from engine.errors import CheckpointError
from engine.layout import Layout, Part, find_layout
from engine.load import load_pipeline
from engine.specs import KNOWN, T2V_A14B, TI2V_5B, find_facts
from engine.text_encoder import TextEncoder
from engine.umt5 import config_from_shapes, transformers_name
from engine.vae import VAE
from engine.weights import Entry, check, expected_shapes, safetensors_files, scan

PUBLISHED: dict[str, dict[str, list[int]]] = json.loads(
    lzma.decompress((Path(__file__).parent / "data" / "wan22_tensors.json.xz").read_bytes())
)
HEADS = {"T2V-A14B": 40, "I2V-A14B": 40, "TI2V-5B": 24}
SHARDS = 12
NAME = "blocks.0.cross_attn.k.weight"


def entries(tensors: dict[str, list[int]], rename: Callable[[str], str] = str) -> dict[str, Entry]:
    return {rename(name): Entry(Path("x"), name, tuple(shape)) for name, shape in tensors.items()}


def sparse_checkpoint(folder: Path, tensors: dict[str, list[int]], heads: int) -> None:
    """A full-size fp32 transformer checkpoint with real headers and no data: the files are holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_heads": heads, "eps": 1e-6, "text_len": 512}))
    for shard in range(SHARDS):
        header, offset = {}, 0
        for name in sorted(tensors)[shard::SHARDS]:
            size = 4 * torch.Size(tensors[name]).numel()
            header[name] = {"dtype": "F32", "shape": tensors[name], "data_offsets": [offset, offset + size]}
            offset += size
        raw = json.dumps(header).encode()
        with (folder / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + offset)


@pytest.mark.parametrize("model", ["T2V-A14B", "I2V-A14B", "TI2V-5B"])
def test_the_published_transformers_are_consumed_exactly(tmp_path: Path, model: str) -> None:
    sparse_checkpoint(tmp_path / "dit", PUBLISHED[model], HEADS[model])
    found = scan(safetensors_files(tmp_path / "dit"))
    part = Part(tmp_path / "dit", found, json.loads((tmp_path / "dit" / "config.json").read_text()))
    low = None if model == "TI2V-5B" else part
    config = read_dit_config(Layout("official", part, low, part, part, tmp_path))
    assert (config.dim, config.num_heads, config.num_layers) == (
        (3072, 24, 30) if model == "TI2V-5B" else (5120, 40, 40)
    )
    assert config.ffn_dim == (14336 if model == "TI2V-5B" else 13824)
    assert (config.text_dim, config.freq_dim, config.patch_size) == (4096, 256, (1, 2, 2))
    assert find_facts(tmp_path, config.in_channels, low is not None) == KNOWN[model]
    with torch.device("meta"):
        dit = DiT(config)
    check(expected_shapes(dit), found)
    assert len(found) == len(PUBLISHED[model]) == (825 if model == "TI2V-5B" else 1095)


@pytest.mark.parametrize(("kind", "facts", "count"), [("2.1", T2V_A14B, 194), ("2.2", TI2V_5B, 196)])
def test_the_published_vaes_are_consumed_exactly(kind: str, facts: object, count: int) -> None:
    part = Part(Path("x"), entries(PUBLISHED[f"VAE{kind}"]), {})
    config = read_vae_config(part, facts)  # type: ignore[arg-type]
    assert (config.kind, config.z_dim, config.stride) == (
        (kind, 16, (4, 8, 8)) if kind == "2.1" else (kind, 48, (4, 16, 16))
    )
    with torch.device("meta"):
        vae = VAE(config)
    check(expected_shapes(vae), part.entries)
    assert len(part.entries) == count


def test_the_published_text_encoder_is_consumed_exactly() -> None:
    found = entries(PUBLISHED["UMT5-XXL"], transformers_name)
    config = config_from_shapes({entry.name: entry.shape for entry in found.values()})
    assert (config.d_model, config.d_ff, config.num_heads, config.num_layers) == (4096, 10240, 64, 24)
    with torch.device("meta"):
        encoder = TextEncoder(config, None)
    check(expected_shapes(encoder.umt5), found)
    assert len(found) == 242


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def edit_shard(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of the high-noise expert's shard that holds NAME; the index is left as it is."""
    paths = sorted((folder / "high_noise_model").glob("*.safetensors"))
    path = next(path for path in paths if NAME in load_file(path))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path


def complaint(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(folder, device="cpu")
    words = str(caught.value)
    print(words)
    assert len(words.splitlines()) == 1
    return words


def test_a_missing_tensor_is_named(broken: Path) -> None:
    edit_shard(broken, lambda tensors: tensors.pop(NAME))
    words = complaint(broken)
    assert f"missing {NAME} [64, 64]" in words
    assert "high_noise_model" in words


def test_an_extra_tensor_is_named(broken: Path) -> None:
    path = edit_shard(broken, lambda tensors: tensors.update(surplus=torch.zeros(2, 3)))
    assert f"extra surplus [2, 3] in {path}" in complaint(broken)


def test_a_misshapen_tensor_is_named_with_both_shapes(broken: Path) -> None:
    path = edit_shard(broken, lambda tensors: tensors.update({NAME: torch.zeros(64, 63)}))
    assert f"{NAME} in {path} has shape [64, 63], expected [64, 64]" in complaint(broken)


def test_many_faults_are_counted(broken: Path) -> None:
    path = edit_shard(broken, lambda tensors: tensors.update({f"t{i}": torch.zeros(1) for i in range(20)}))
    words = complaint(broken)
    assert f"extra t0 [1] in {path}" in words
    assert "and 8 more" in words


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_a_truncated_shard_is_named(broken: Path, keep: int) -> None:
    path = sorted((broken / "low_noise_model").glob("*.safetensors"))[1]
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    words = complaint(broken)
    assert str(path) in words
    assert "cut short" in words


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_a_truncated_pth_is_named(broken: Path, name: str, keep: int) -> None:
    path = broken / name
    path.write_bytes(path.read_bytes()[:keep])
    words = complaint(broken)
    assert str(path) in words
    assert "cut short" in words


class Touch:
    """Would make a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pth_that_runs_code_is_refused(broken: Path, tmp_path: Path) -> None:
    torch.save({"x": Touch(tmp_path / "harm")}, broken / "Wan2.1_VAE.pth")
    assert "Wan2.1_VAE.pth" in complaint(broken)
    (broken / "Wan2.1_VAE.pth").write_bytes(pickle.dumps(Touch(tmp_path / "harm")))
    assert "Wan2.1_VAE.pth" in complaint(broken)
    assert not (tmp_path / "harm").exists()


def test_a_missing_shard_is_named(broken: Path) -> None:
    sorted((broken / "high_noise_model").glob("*.safetensors"))[1].unlink()
    assert "00002-of-00002.safetensors" in complaint(broken)


def test_without_an_index_all_shards_are_read(broken: Path) -> None:
    next((broken / "high_noise_model").glob("*.index.json")).unlink()
    load_pipeline(broken, device="cpu")


def test_a_tensor_in_two_shards_is_named(broken: Path) -> None:
    names = [list(load_file(p)) for p in (broken / "high_noise_model").glob("*.safetensors")]
    twice = next(shard for shard in names if NAME not in shard)[0]
    edit_shard(broken, lambda tensors: tensors.update({twice: torch.zeros(1)}))
    assert f"tensor {twice} is in both" in complaint(broken)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("high_noise_model", "high_noise_model is not there"),
        ("low_noise_model", "low_noise_model is not there"),
        ("Wan2.1_VAE.pth", "expected one Wan2.*_VAE.pth"),
        ("models_t5_umt5-xxl-enc-bf16.pth", "expected one models_t5_*.pth"),
        ("google", "umt5-xxl is not there"),
        ("high_noise_model/config.json", "config.json is not there"),
    ],
)
def test_a_missing_part_is_named(broken: Path, gone: str, words: str) -> None:
    path = broken / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert words in complaint(broken)


def test_folders_that_are_no_checkpoint_say_what_was_expected(tmp_path: Path) -> None:
    assert "is not a folder" in complaint(tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").touch()
    words = complaint(tmp_path)
    assert "high_noise_model/" in words
    assert "holiday.jpg" in words


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_heads": 5}, "num_heads is 5, expected a divisor of 64"),
        ({}, "num_heads is None"),
        ({"num_heads": 2}, "the experts differ"),
    ],
)
def test_a_wrong_config_is_named(broken: Path, config: dict[str, int], words: str) -> None:
    (broken / "high_noise_model" / "config.json").write_text(json.dumps(config))
    assert words in complaint(broken)


def test_a_damaged_config_is_named(broken: Path) -> None:
    (broken / "high_noise_model" / "config.json").write_text("{")
    assert "config.json is not JSON" in complaint(broken)
    (broken / "high_noise_model" / "config.json").write_text("[]")
    assert "config.json holds list" in complaint(broken)


@pytest.mark.parametrize(
    ("reel", "words"),
    [
        ({"sampling_stepps": 4}, "unknown fields ['sampling_stepps']"),
        ({"latent_mean": [0.0]}, "16 latent channels but"),
        ({"sizes": ["large"]}, "'large' is not width*height"),
        ({"sizes": ["60*48"]}, "60*48 doesn't divide into 16"),
    ],
)
def test_a_wrong_reel_json_is_named(broken: Path, reel: dict[str, object], words: str) -> None:
    (broken / "reel.json").write_text(json.dumps(reel))
    assert words in complaint(broken)


def test_an_unknown_model_name_is_refused(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown model 'T3V'; known: T2V-A14B, I2V-A14B, TI2V-5B"):
        load_pipeline(tiny, device="cpu", name="T3V")


def test_a_text_encoder_of_another_width_is_refused(broken: Path) -> None:
    path = broken / "models_t5_umt5-xxl-enc-bf16.pth"
    state = torch.load(path, weights_only=True)
    state["token_embedding.weight"] = torch.zeros(384, 40)
    torch.save(state, path)
    assert "is 40 wide, the transformer expects 32" in complaint(broken)
    del state["blocks.0.attn.q.weight"]
    torch.save(state, path)
    assert "lacks blocks.0.attn.q.weight" in complaint(broken)


def test_the_log_tells_what_was_read_and_how_fast(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load_pipeline(tiny, device="cpu")
    lines = [line for line in caplog.messages if line.startswith("loaded ")]
    assert [line.split(":")[0] for line in lines] == [
        f"loaded {part}" for part in ("high_noise_model", "low_noise_model", "VAE", "text encoder")
    ]
    figures = (
        r"0\.\d\d GB from [12] files in \d+\.\d s, \d+\.\d\d GB/s \(0\.\d\d GB of it read by this rank\)"
    )
    assert all(re.search(figures, line) for line in lines), lines


def test_casting_keeps_the_fp32_parts(tiny: Path) -> None:
    pipeline = load_pipeline(tiny, device="cpu", dtype=torch.bfloat16)
    kept = {name for name, p in pipeline.high.named_parameters() if p.dtype == torch.float32}
    # As the official pipeline and diffusers have it: the ends, the time MLPs, modulation and norms.
    whole = ("patch_embedding.", "time_embedding.", "time_projection.", "head.")
    parts = (".modulation", ".norm_q.", ".norm_k.", ".norm3.")
    names = [name for name, _ in pipeline.high.named_parameters()]
    assert kept == {n for n in names if n.startswith(whole) or any(part in n for part in parts)}
    assert {"blocks.1.modulation", "blocks.0.norm3.bias", "blocks.0.cross_attn.norm_k.weight"} <= kept
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float32}  # on a CPU
    assert find_layout(tiny).kind == "official"
