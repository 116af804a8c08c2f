"""Single checkpoint files: headers that lie, and tensors of several dtypes side by side."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.transfer import Source, _buckets
from engine.weights import Reader, scan


def source(name: str, tensor: torch.Tensor) -> Source:
    """Of a tensor that is wanted in fp32."""
    return Source(name, tensor.flatten(), tuple(tensor.shape), torch.float32, lambda first, many: None)


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_named(tmp_path: Path) -> None:
    """The file's length is right, so nothing else would show it."""
    header = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*a's bytes don't fit its shape"):
        scan([path])


def test_tensors_of_several_dtypes_are_cast_each_from_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    kinds = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn)
    stored = {f"{i}": (torch.arange(6.0) - i).to(kinds[i % 4]) for i in range(8)}
    save_file(stored, path)
    buckets = list(_buckets([source(name, tensor) for name, tensor in stored.items()], 1))
    # A GPU reads a bucket's bytes as one dtype and casts them there.
    assert [len({span.source.elements.dtype for span in bucket}) for bucket in buckets] == [1] * 4
    found = Reader(torch.device("cpu")).tensors(scan([path]), lambda name: torch.float32)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.float().tolist() for name, tensor in stored.items()
    }
