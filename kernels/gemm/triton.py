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
    r_desc,
    bias_ptr,
    gate_ptr,
    row0,
    col0,
    N,
    length,
    split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE_SETS: tl.constexpr,
):
    """Epilogue and store of one [BM, BN] piece."""
    cols = col0 + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 1:
        acc = _tanh_gelu(acc)
    if EPILOGUE == 2:
        if GATE_SETS == 1:
            acc *= tl.load(gate_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if GATE_SETS == 2:
            first = tl.load(gate_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
            second = tl.load(gate_ptr + N + cols, mask=cols < N, other=0.0).to(tl.float32)
            token = (row0 + tl.arange(0, BM)) % length
            acc *= tl.where((token < split)[:, None], first[None, :], second[None, :])
        acc += r_desc.load([row0, col0]).to(tl.float32)
    c_desc.store([row0, col0], acc.to(c_desc.dtype))


@triton.jit(do_not_specialize=["M", "length", "split"])
def _gemm_kernel(
    a_desc,
    b_desc,
    c_desc,
    r_desc,
    bias_ptr,
    gate_ptr,
    M,
    N,
    K,
    length,
    split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE_SETS: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    depth = tl.cdiv(K, BK)
    # Flattened, the loads of the next tile start during the epilogue; the residual's would join that
    # pipeline and take its shared memory, so the gated form keeps its loops apart.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=EPILOGUE != 2):
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
                left, c_desc, r_desc, bias_ptr, gate_ptr, row0, col0, N, length, split,
                BM, BN // 2, EPILOGUE, HAS_BIAS, GATE_SETS,
            )  # fmt: skip
            _finish(
                right, c_desc, r_desc, bias_ptr, gate_ptr, row0, col0 + BN // 2, N, length, split,
                BM, BN // 2, EPILOGUE, HAS_BIAS, GATE_SETS,
            )  # fmt: skip
        else:
            _finish(
                acc, c_desc, r_desc, bias_ptr, gate_ptr, row0, col0, N, length, split,
                BM, BN, EPILOGUE, HAS_BIAS, GATE_SETS,
            )  # fmt: skip


def fits(
    x_BLK: Tensor, weight_NK: Tensor, residual_BLN: Tensor | None = None, gate_BSN: Tensor | None = None
) -> bool:
    """Whether our kernel takes these: rows of a multiple of 16 bytes for TMA, one gate for all of a batch."""
    size = x_BLK.element_size()
    aligned = x_BLK.data_ptr() % 16 == 0 and weight_NK.data_ptr() % 16 == 0
    rows = aligned and all(n * size % 16 == 0 for n in weight_NK.shape) and x_BLK.numel() > 0
    residual = residual_BLN is None or residual_BLN.shape[:2] == x_BLK.shape[:2]
    return rows and residual and (gate_BSN is None or gate_BSN.shape[0] == 1)


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
    if not fits(x_BLK, weight_NK, residual_BLN, gate_BSN):
        raise ValueError("operands that `fits` refuses: use the library's product")
    batch, length = x_BLK.shape[:2]
    (n, k), m = weight_NK.shape, batch * length
    a = x_BLK.contiguous().view(m, k)
    dtype = x_BLK.dtype if residual_BLN is None else residual_BLN.dtype
    out = torch.empty((batch, length, n), dtype=dtype, device=x_BLK.device)
    residual = out if residual_BLN is None else residual_BLN.contiguous()
    piece = [tile.m, tile.n // 2 if tile.halves else tile.n]
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    programs = min(_multiprocessors(a.device), tiles)
    _gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight_NK, [tile.n, tile.k]),
        TensorDescriptor.from_tensor(out.view(m, n), piece),
        TensorDescriptor.from_tensor(residual.view(m, n), piece),
        bias_N,
        None if gate_BSN is None else gate_BSN.contiguous(),
        m,
        n,
        k,
        length,
        split,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=tile.group,
        PROGRAMS=programs,
        EPILOGUE=epilogue,
        HAS_BIAS=bias_N is not None,
        GATE_SETS=0 if gate_BSN is None else gate_BSN.shape[1],
        HALVES=tile.halves,
        PRECISION="ieee" if x_BLK.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _multiprocessors(device: torch.device) -> int:
    """Programs that run at once: four under the interpreter, so that each walks over several tiles."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
