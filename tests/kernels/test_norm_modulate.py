"""LayerNorm + modulation against fp64, under the interpreter or on the GPU."""

import pytest
import torch
from torch import Tensor

from kernels.norm_modulate import Norm, reference
from tests.kernels.check import assert_as_good

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def modulation(batch: int, sets: int, dim: int, device: torch.device, split: int = 0) -> Norm:
    shift, scale = torch.randn(2, batch, sets, dim, device=device)
    return Norm(shift, scale, 1e-6, split)


def wide(norm: Norm) -> Norm:
    return Norm(norm.shift.double(), norm.scale.double(), norm.eps, norm.split, norm.offset)


def residual(batch: int, length: int, dim: int, device: torch.device) -> Tensor:
    """A residual stream as a deep model has it: a mean far from zero and a few huge features."""
    x = torch.randn(batch, length, dim, device=device) * 3 + 5
    x[..., 0] *= 40
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "dim"), [(1, 5, 64), (2, 3, 96), (1, 1, 257), (1, 7, 1000)])
def test_normalize(seed: int, device: torch.device, dtype: torch.dtype, batch: int, length: int, dim: int):
    from kernels.norm_modulate import triton

    x, norm = residual(batch, length, dim, device), modulation(1, 1, dim, device)
    got = triton.normalize(x, norm, dtype)
    plain = reference.normalize(x, norm, dtype)
    assert_as_good(got, plain, reference.normalize(x.double(), wide(norm), torch.float64))


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("split", [0, 2, 5])
def test_two_sets_of_vectors(seed: int, device: torch.device, batches: int, split: int):
    from kernels.norm_modulate import triton

    x, norm = residual(2, 5, 72, device), modulation(batches, 2, 72, device, split)
    got = triton.normalize(x, norm, torch.bfloat16)
    plain = reference.normalize(x, norm, torch.bfloat16)
    assert_as_good(got, plain, reference.normalize(x.double(), wide(norm), torch.float64))


def test_affine_is_a_layer_norm(seed: int, device: torch.device):
    from kernels.norm_modulate import triton

    x = residual(1, 6, 80, device)
    weight, bias = torch.randn(2, 80, device=device)
    got = triton.normalize(x, Norm.affine(weight, bias, 1e-6), torch.float32)
    exact = torch.nn.functional.layer_norm(x.double(), (80,), weight.double(), bias.double(), 1e-6)
    assert_as_good(got, torch.nn.functional.layer_norm(x, (80,), weight, bias, 1e-6), exact)


@pytest.mark.parametrize("branch", DTYPES)
@pytest.mark.parametrize("stream", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_add_normalize(
    seed: int, device: torch.device, branch: torch.dtype, stream: torch.dtype, gated: bool
):
    from kernels.norm_modulate import triton

    x = residual(2, 3, 130, device).to(stream)
    y = torch.randn(2, 3, 130, device=device).to(branch)
    gate = torch.randn(1, 1, 130, device=device) if gated else None
    norm = modulation(1, 1, 130, device)
    new, got = triton.add_normalize(x, y, gate, norm, branch)
    plain_new, plain = reference.add_normalize(x, y, gate, norm, branch)
    exact_new = reference.add_gated(x.double(), y.double(), None if gate is None else gate.double(), 0)
    assert_as_good(new, plain_new, exact_new)
    # The copy is the norm of the residual as stored.
    assert_as_good(got, plain, reference.normalize(new.double(), wide(norm), torch.float64))


@pytest.mark.parametrize("split", [0, 3, 4])
def test_shared_residual_joins_two_branches(seed: int, device: torch.device, split: int):
    """One residual, computed once for both guidance passes, meets the branch of each; two sets of gates."""
    from kernels.norm_modulate import triton

    x, y = residual(1, 4, 48, device), torch.randn(2, 4, 48, device=device)
    gate, norm = torch.randn(1, 2, 48, device=device), modulation(1, 2, 48, device, split)
    new, got = triton.add_normalize(x, y, gate, norm, torch.bfloat16)
    plain_new, plain = reference.add_normalize(x, y, gate, norm, torch.bfloat16)
    assert_as_good(new, plain_new, reference.add_gated(x.double(), y.double(), gate.double(), split))
    assert_as_good(got, plain, reference.normalize(new.double(), wide(norm), torch.float64))


@pytest.mark.parametrize("split", [0, 2, 5])
def test_two_sets_of_gates_join_before_an_affine_norm(seed: int, device: torch.device, split: int):
    """As self-attention does with a clean first frame: the gate has two sets, the norm after it one."""
    from kernels.norm_modulate import triton

    x, y = residual(2, 5, 72, device), torch.randn(2, 5, 72, device=device)
    gate, (weight, bias) = torch.randn(1, 2, 72, device=device), torch.randn(2, 72, device=device)
    norm = Norm.affine(weight, bias, 1e-6, split)
    new, got = triton.add_normalize(x, y, gate, norm, torch.float32)
    plain_new, plain = reference.add_normalize(x, y, gate, norm, torch.float32)
    exact = x.double() + y.double() * gate.double()[:, [0] * split + [1] * (5 - split)]
    assert_as_good(new, plain_new, exact)
    normed = torch.nn.functional.layer_norm(new.double(), (72,), weight.double(), bias.double(), 1e-6)
    assert_as_good(got, plain, normed)


def test_nan_stays_visible(seed: int, device: torch.device):
    from kernels.norm_modulate import triton

    x, norm = residual(1, 3, 32, device), modulation(1, 1, 32, device)
    x[0, 1, 7] = float("nan")
    got = triton.normalize(x, norm, torch.bfloat16)
    assert got[0, 1].isnan().all()
    assert not got[0, [0, 2]].isnan().any()


def test_wrong_shapes_are_refused(device: torch.device):
    from kernels.norm_modulate import triton

    x = torch.zeros(1, 3, 32, device=device)
    with pytest.raises(ValueError, match=r"scale of shape \(1, 1, 16\): expected \[1 or 1, 1 or 2, 32\]"):
        triton.normalize(x, modulation(1, 1, 16, device), torch.bfloat16)
    shift, scale = torch.zeros(1, 1, 32, device=device), torch.zeros(1, 2, 32, device=device)
    with pytest.raises(ValueError, match=r"scale \(1, 2, 32\) and shift \(1, 1, 32\) differ"):
        triton.normalize(x, Norm(shift, scale, 1e-6, 1), torch.bfloat16)
    with pytest.raises(ValueError, match="doesn't broadcast"):
        triton.add_normalize(
            x, torch.zeros(1, 4, 32, device=device), None, modulation(1, 1, 32, device), torch.bfloat16
        )
