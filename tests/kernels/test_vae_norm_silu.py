"""The VAE's channel norm + SiLU against fp64, under the interpreter or on the GPU."""

import pytest
import torch

from kernels.vae_norm_silu import reference
from tests.kernels.check import assert_as_good, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(1, 96, 1, 3, 5), (2, 20, 3, 2, 7), (1, 3, 2, 1, 1)])
def test_norm_silu(
    seed: int, device: torch.device, dtype: torch.dtype, silu: bool, shape: tuple[int, int, int, int, int]
):
    from kernels.vae_norm_silu import triton

    x = (torch.randn(shape, device=device) * 3).to(dtype)
    gamma = torch.randn(shape[1], device=device)
    exact = reference.norm_silu(x.double(), gamma.double(), silu)
    assert_as_good(triton.norm_silu(x, gamma, silu), reference.norm_silu(x, gamma, silu), exact)


def test_writes_inside_a_padded_buffer_and_nowhere_else(seed: int, device: torch.device):
    from kernels.vae_norm_silu import triton

    x = torch.randn(1, 6, 2, 3, 4, device=device).contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.randn(6, device=device)
    buffer = torch.zeros(1, 4, 5, 6, 6, device=device).permute(0, 4, 1, 2, 3)  # channels last
    inside = buffer[:, :, 2:, 1:4, 1:5]
    triton.norm_silu(x, gamma, out=inside)
    assert_as_good(inside, reference.norm_silu(x, gamma), reference.norm_silu(x.double(), gamma.double()))
    inside.zero_()
    assert not buffer.any()


def test_fp16_range_is_safe(seed: int, device: torch.device):
    """Activations near fp16's largest value: the sum of squares must not overflow."""
    from kernels.vae_norm_silu import triton

    x = (torch.randn(1, 64, 1, 2, 2, device=device) * 15_000).clamp(-65_000, 65_000).half()
    gamma = torch.ones(64, device=device)
    got = triton.norm_silu(x, gamma)
    assert got.isfinite().all()
    assert_as_good(got, reference.norm_silu(x, gamma), reference.norm_silu(x.double(), gamma.double()))


def test_zero_pixels_stay_zero(device: torch.device):
    from kernels.vae_norm_silu import triton

    got = triton.norm_silu(torch.zeros(1, 8, 1, 2, 2, device=device), torch.ones(8, device=device))
    assert not got.any()


def test_a_planar_output_is_refused(device: torch.device):
    from kernels.vae_norm_silu import triton

    x = torch.zeros(1, 8, 1, 2, 2, device=device)
    with pytest.raises(ValueError, match="channels last"):
        triton.norm_silu(x, torch.ones(8, device=device), out=torch.zeros(1, 8, 1, 2, 2, device=device))


class Case:
    """Operands of one `join`: x [B, C, T, H, W], channels last, and a past with a margin of its own."""

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        b, c, t, h, w = shape
        self.x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        self.bias = torch.randn(c, device=device).to(dtype)
        self.shortcut = torch.randn(shape, device=device).to(dtype)  # lies as torch likes
        self.gamma = torch.randn(c, device=device).to(dtype)
        self.past = torch.randn(b, 2, h, w + 2, c, device=device).to(dtype).permute(0, 4, 1, 2, 3)
        self.out = torch.full((b, t + 2, h, w + 2, c), 7.0, device=device).to(dtype).permute(0, 4, 1, 2, 3)
        self.spread = torch.full((b, t, h, w + 2, 3 * c), 7.0, device=device).to(dtype).permute(0, 4, 1, 2, 3)

    def to(self, dtype: torch.dtype) -> "Case":
        copy = Case.__new__(Case)
        for name, value in vars(self).items():
            setattr(copy, name, value.clone(memory_format=torch.preserve_format).to(dtype))
        return copy

    def run(
        self, module: object, normed: bool, summed: bool, spread: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """(what the convolution sees, its past for the next chunk, the sum)."""
        out = self.spread if spread else self.out
        total = module.join(  # type: ignore[attr-defined]
            self.x,
            out[..., 1:-1],
            self.past[..., 1:-1],
            self.bias if summed else None,
            self.shortcut if summed else None,
            self.gamma if normed else None,
            True,
            summed,
        )
        return out, self.past, total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("normed", "summed"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_join(seed: int, device: torch.device, dtype: torch.dtype, normed: bool, summed: bool, frames: int):
    """Sum, norm, SiLU, the frames before in front, and the past moved on; margins stay as they were."""
    from kernels.vae_norm_silu import triton

    case = Case((2, 20, frames, 3, 5), dtype, device)
    exact = case.to(torch.float64).run(reference, normed, summed)
    plain = case.to(dtype).run(reference, normed, summed)
    before = case.past.clone()
    got = case.run(triton, normed, summed)
    for ours, theirs, right in zip(got, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, theirs, right)
    out, past, total = got
    assert (out[..., 0] == 7).all()
    assert (out[..., -1] == 7).all()
    assert torch.equal(out[:, :, :2, :, 1:-1], before[..., 1:-1])
    assert torch.equal(past[..., 1:-1], out[:, :, -2:, :, 1:-1])
    assert torch.equal(past[..., 0], before[..., 0])
    assert total.data_ptr() == case.x.data_ptr()


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_join_spread_is_three_frames_side_by_side(seed: int, device: torch.device, frames: int):
    """A flat convolution over it is one over three frames; the reference and the kernel agree to the bit."""
    from kernels.vae_norm_silu import triton

    case = Case((2, 20, frames, 3, 5), torch.float32, device)
    other, plain = case.to(torch.float32), case.to(torch.float32)
    joined, past, _ = case.run(triton, True, True)
    want = torch.cat([joined[:, :, at : at + frames] for at in range(3)], dim=1)
    for module, one in ((triton, other), (reference, plain)):
        spread, moved_on, _ = one.run(module, True, True, spread=True)
        exact = module is triton
        assert relative_error(spread, want) <= (0 if exact else 2e-6)
        assert relative_error(moved_on, past) <= (0 if exact else 2e-6)
    weight = torch.randn(4, 20, 3, 3, 3, device=device)
    flat = weight.transpose(1, 2).flatten(1, 2)
    y = torch.nn.functional.conv2d(want.transpose(1, 2).flatten(0, 1), flat, padding=(1, 0))
    y = torch.unflatten(y, 0, (2, frames)).transpose(1, 2)
    assert relative_error(y, torch.nn.functional.conv3d(joined, weight, padding=(0, 1, 0))) < 1e-5


def test_join_chunk_by_chunk_is_the_whole(seed: int, device: torch.device):
    """Any cut of a video gives what the whole gives, with zeros before it."""
    from kernels.vae_norm_silu import triton

    x = torch.randn(1, 24, 8, 2, 3, device=device).contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.randn(24, device=device)
    whole = torch.nn.functional.pad(reference.norm_silu(x, gamma), (0, 0, 0, 0, 2, 0))
    past = torch.zeros(1, 24, 2, 2, 3, device=device).contiguous(memory_format=torch.channels_last_3d)
    at = 0
    for frames in (1, 1, 2, 4):
        out = torch.empty(1, 24, frames + 2, 2, 3, device=device, memory_format=torch.channels_last_3d)
        triton.join(x[:, :, at : at + frames], out, past, None, None, gamma, True, False)
        assert relative_error(out, whole[:, :, at : at + frames + 2]) < 2e-6
        at += frames


def test_join_copies_a_planar_sum(seed: int, device: torch.device):
    """x that doesn't lie channels-last stays as it is; the sum is in the tensor that is returned."""
    from kernels.vae_norm_silu import triton

    x, shortcut = torch.randn(2, 1, 6, 1, 2, 3, device=device)
    before = x.clone()
    out = torch.empty(1, 6, 1, 2, 3, device=device, memory_format=torch.channels_last_3d)
    total = triton.join(x, out, None, None, shortcut, torch.ones(6, device=device), True, True)
    assert torch.equal(total, before + shortcut)
    assert torch.equal(x, before)


def test_a_shortcut_may_lie_in_a_larger_buffer(seed: int, device: torch.device):
    from kernels.vae_norm_silu import triton

    last = torch.channels_last_3d
    x = torch.randn(2, 6, 2, 3, 4, device=device).contiguous(memory_format=last)
    shortcut = torch.randn(2, 6, 3, 5, 7, device=device).contiguous(memory_format=last)[:, :, 1:, 1:4, 2:6]
    want = x + shortcut
    triton.join(x, torch.empty_like(x), None, None, shortcut, None, False, True)
    assert torch.equal(x, want)


def test_join_refuses_what_does_not_fit(device: torch.device):
    from kernels.vae_norm_silu import triton

    x = torch.zeros(1, 8, 1, 2, 2, device=device).contiguous(memory_format=torch.channels_last_3d)
    out = torch.zeros(1, 8, 3, 2, 2, device=device).contiguous(memory_format=torch.channels_last_3d)
    past = out[:, :, :2].clone(memory_format=torch.preserve_format)
    for wrong in (
        {"out_BCTHW": out[:, :, :2]},
        {"past_BCTHW": past[:, :, :1]},
        {"past_BCTHW": past.half()},
        {"shortcut_BCTHW": out},
    ):
        arguments = {"x_BCTHW": x, "out_BCTHW": out, "past_BCTHW": past, "bias_C": None}
        arguments |= {"shortcut_BCTHW": None, "gamma_C": None, "silu": True, "keep": False}
        with pytest.raises(ValueError, match="expected"):
            triton.join(**(arguments | wrong))
