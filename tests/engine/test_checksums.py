import hashlib
import shutil
from pathlib import Path

import pytest

from engine.checksums import verify
from engine.errors import CheckpointError
from engine.load import load_pipeline
from engine.parallel.mesh import Mesh


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def files(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sums(folder: Path) -> None:
    """As `sha256sum` writes them, one line in its binary form."""
    lines = [f"{sha256(folder / p)} {'*' if i == 0 else ' '}{p}" for i, p in enumerate(files(folder))]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def flip(path: Path) -> None:
    """One wrong bit in the middle, which no header shows."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def complaint(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(folder, device="cpu", verify=True)
    print(caught.value)
    return str(caught.value)


def test_right_files_pass_and_each_byte_is_hashed(copy: Path) -> None:
    write_sums(copy)
    came: list[int] = []
    verify(copy, Mesh.single(), came.append)
    assert sum(came) == sum((copy / p).stat().st_size for p in files(copy) if p.name != "SHA256SUMS")
    load_pipeline(copy, device="cpu", verify=True)


def test_a_sum_counts_to_its_last_digit_and_a_file_to_its_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checksums.BLOCK", 16)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(100)))
    write_sums(tmp_path)
    verify(tmp_path, Mesh.single())
    path.write_bytes(bytes(range(99)) + b"x")
    with pytest.raises(CheckpointError, match="has SHA-256"):
        verify(tmp_path, Mesh.single())
    right = sha256(path)
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    (tmp_path / "SHA256SUMS").write_text(f"{wrong}  weights.bin\n")
    with pytest.raises(CheckpointError, match=f"{right}, expected {wrong}"):
        verify(tmp_path, Mesh.single())


def test_a_flipped_bit_is_named_with_both_sums_and_only_when_asked(copy: Path) -> None:
    write_sums(copy)
    path = next((copy / "low_noise_model").glob("*.safetensors"))
    right = sha256(path)
    flip(path)
    words = complaint(copy)
    assert f"{path} has SHA-256 {sha256(path)}, expected {right}" in words
    load_pipeline(copy, device="cpu")  # checksums are optional


def test_a_missing_file_and_a_wrong_list_are_named(copy: Path) -> None:
    write_sums(copy)
    extra = copy / "extra.bin"
    with (copy / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  extra.bin\n")
    assert f"{extra} is not there" in complaint(copy)
    (copy / "SHA256SUMS").write_text("hello\n")
    assert "line 1 is not '<sha256>  <file>'" in complaint(copy)


def test_what_hf_download_leaves_is_understood(copy: Path) -> None:
    """Large files' entity tags are SHA-256; small ones' are git hashes, which say nothing here."""
    cache = copy / ".cache" / "huggingface" / "download"
    shards = [p for p in files(copy) if p.suffix in (".safetensors", ".pth")]
    for path in files(copy):
        tag = sha256(copy / path) if path in shards else "a" * 40
        place = cache / path.parent / f"{path.name}.metadata"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{'b' * 40}\n{tag}\n1700000000.0\n")
    load_pipeline(copy, device="cpu", verify=True)
    flip(copy / shards[0])
    assert f"{copy / shards[0]} has SHA-256" in complaint(copy)


def test_without_any_sums_it_says_how_to_make_them(tiny: Path) -> None:
    assert "sha256sum" in complaint(tiny)
