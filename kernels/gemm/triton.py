# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Persistent matrix product with an epilogue, operands by TMA descriptors, in Triton.

One program a multiprocessor walks over output tiles in groups of rows that share weights in L2. The
epilogue works on the fp32 accumulator, so each result is rounded once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BIAS, GELU, GATED = 0, 1, 2


@dataclass(frozen=True)
class Tile:
    """How one program works: tile of the output, depth of the pipeline."""

    m: int = 128
    n: int = 256
    k: int = 64
    stages: int = 3
    warps: int = 8
    group: int = 8  # rows of tiles that are walked together
    halves: bool = True  # write the tile in two halves, which needs less shared memory
    specialize: bool = False  # loads in warps of their own


@triton.jit
def _tanh_gelu(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as x times a sigmoid (Hendrycks and Gimpel, 2016)."""
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-inner))


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, walking down GROUP rows before stepping a column."""
    in_group = GROUP * tiles_n
    first = (tile // in_group) * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (tile % in_group) % size, (tile % in_group) // size


@triton.jit
def _finish(
    acc,
    c_desc,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    row0,
    col0,
    M,
    N,
    length,
    split,
    residual_batch_stride,
    gate_batch_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GATE_SETS: tl.constexpr,
):
    """Epilogue and store of one [BM, BN] piece."""
    cols = col0 + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 1:
        acc = _tanh_gelu(acc)
    if EPILOGUE == 2:
        row = row0 + tl.arange(0, BM)
        valid = (row < M)[:, None] & (cols < N)[None, :]
        batch = row // length
        token = row - batch * length
        if HAS_GATE:
            second = (token >= split).to(tl.int32) * (GATE_SETS - 1)
            start = batch.to(tl.int64) * gate_batch_stride + second * N
            acc *= tl.load(gate_ptr + start[:, None] + cols[None, :], mask=valid, other=0.0).to(tl.float32)
        start = batch.to(tl.int64) * residual_batch_stride + token.to(tl.int64) * N
        acc += tl.load(residual_ptr + start[:, None] + cols[None, :], mask=valid, other=0.0).to(tl.float32)
    c_desc.store([row0, col0], acc.to(c_desc.dtype))


@triton.jit
def _gemm_kernel(
    a_desc,
    b_desc,
    c_desc,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    M,
    N,
    K,
    length,
    split,
    residual_batch_stride,
    gate_batch_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GATE_SETS: tl.constexpr,
    HALVES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    depth = tl.cdiv(K, BK)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=not SPECIALIZE, warp_specialize=SPECIALIZE
    ):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        row0 = tile_m * BM
        col0 = tile_n * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(depth):
            a = a_desc.load([row0, k * BK])
            b = b_desc.load([col0, k * BK])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            _finish(
                left, c_desc, bias_ptr, residual_ptr, gate_ptr, row0, col0, M, N, length, split,
                residual_batch_stride, gate_batch_stride, BM, BN // 2, EPILOGUE, HAS_BIAS, HAS_GATE,
                GATE_SETS,
            )  # fmt: skip
            _finish(
                right, c_desc, bias_ptr, residual_ptr, gate_ptr, row0, col0 + BN // 2, M, N, length, split,
                residual_batch_stride, gate_batch_stride, BM, BN // 2, EPILOGUE, HAS_BIAS, HAS_GATE,
                GATE_SETS,
            )  # fmt: skip
        else:
            _finish(
                acc, c_desc, bias_ptr, residual_ptr, gate_ptr, row0, col0, M, N, length, split,
                residual_batch_stride, gate_batch_stride, BM, BN, EPILOGUE, HAS_BIAS, HAS_GATE, GATE_SETS,
            )  # fmt: skip


def fits(x_BLK: Tensor, weight_NK: Tensor) -> bool:
    """Whether TMA can read and write these: rows of a multiple of 16 bytes, 16-byte aligned."""
    size = x_BLK.element_size()
    aligned = x_BLK.data_ptr() % 16 == 0 and weight_NK.data_ptr() % 16 == 0
    return aligned and all(n * size % 16 == 0 for n in weight_NK.shape) and x_BLK.numel() > 0


def product(
    x_BLK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    epilogue: int,
    tile: Tile,
    residual_BLN: Tensor | None = None,
    gate_BSN: Tensor | None = None,
    split: int = 0,
) -> Tensor:
    """x W^T with an epilogue (`BIAS`, `GELU`, `GATED`), [B, L, N]; GATED is in the residual's dtype."""
    if x_BLK.shape[-1] != weight_NK.shape[1] or x_BLK.dtype != weight_NK.dtype:
        raise ValueError(
            f"x {tuple(x_BLK.shape)} {x_BLK.dtype} doesn't fit "
            f"weight {tuple(weight_NK.shape)} {weight_NK.dtype}"
        )
    batch, length = x_BLK.shape[:2]
    (n, k), m = weight_NK.shape, batch * length
    a = x_BLK.contiguous().view(m, k)
    dtype = x_BLK.dtype if residual_BLN is None else residual_BLN.dtype
    out = torch.empty((batch, length, n), dtype=dtype, device=x_BLK.device)
    residual = out if residual_BLN is None else residual_BLN.contiguous()
    gate = out if gate_BSN is None else gate_BSN.contiguous()
    width = tile.n // 2 if tile.halves else tile.n
    programs = 4 if a.device.type == "cpu" else _multiprocessors(a.device)
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    _gemm_kernel[(min(programs, tiles),)](
        TensorDescriptor.from_tensor(a, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight_NK, [tile.n, tile.k]),
        TensorDescriptor.from_tensor(out.view(m, n), [tile.m, width]),
        bias_N,
        residual,
        gate,
        m,
        n,
        k,
        length,
        split,
        0 if residual.shape[0] == 1 else length * n,
        0 if gate.shape[0] == 1 else gate.stride(0),
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=tile.group,
        PROGRAMS=min(programs, tiles),
        EPILOGUE=epilogue,
        HAS_BIAS=bias_N is not None,
        HAS_GATE=gate_BSN is not None,
        GATE_SETS=1 if gate_BSN is None else gate_BSN.shape[1],
        HALVES=tile.halves,
        SPECIALIZE=tile.specialize,
        PRECISION="ieee" if x_BLK.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
