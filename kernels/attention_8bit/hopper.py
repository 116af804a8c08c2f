# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""8-bit attention for Hopper in Gluon: the method of `kernels.attention_8bit.reference`, scheduled by hand.

After FlashAttention 3 (arXiv:2407.08608). One program holds 128 queries of a head. One warp loads by TMA; two
warp groups of 64 queries each compute, and while one group's softmax runs the other's products do. Inside a
group, P V of a block of keys runs under the softmax of the next block.

Blocks of keys are taken last first, then 0, 1, ...: only the first step has keys to mask. Step t in
0 ... blocks works on stage t of a ring of K and V tiles:

    stage t holds   K of step t's block, and V of step t - 1's (step 0's V and the last step's K go unread)
    full[slot]      1 arrival (the loader's, with the bytes of both tiles): phase of stage t is t // stages
    empty[slot]     2 arrivals, one a group, once both of its products of stage t are done
    q_full          1 arrival, used once

A group in step t waits for full[t], issues S(t) = Q K^T and O(t-1) = P(t-1) V, waits for S alone, computes
P(t), waits for full[t+1] (the loader fills it without anything that this wait holds back: it needs
empty[t+1-stages], which is behind both groups for two stages or more), waits for O(t-1) and frees stage t.
Every stage but the last is freed; the loader never waits for the last.

With `ping` the groups take turns at issuing, through two named barriers of 256 threads (a group's own is
awaited by it and arrived at by the other): group 1 hands group 0 the first turn before its first step.

Registers: a product leaves columns 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t of each 16 in lane t of four, but the e4m3
operand wants 4 t ... 4 t + 3. P stays where it is, and V's tokens are permuted (`reference.slots`).

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension (128).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_8bit import triton as plain
from kernels.attention_8bit.reference import LOG2E, Blocks, Channels, mean_over_tokens
from kernels.tables import setting

HEAD_DIMENSION = 128
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
ROWS = gl.constexpr(64)  # queries of a warp group
KEYS = gl.constexpr(128)
HEAD = gl.constexpr(HEAD_DIMENSION)
GROUPS = gl.constexpr(2)
BIAS = gl.constexpr(8.807354922057604)  # log2 of 448, P's scale
# 1.5 * 2^23 as fp32 and its bits: added to an int below 2^22 in size, the bits are those of the float sum.
CENTRE = gl.constexpr(12582912.0)
CENTRE_BITS = gl.constexpr(0x4B400000)
# Triton 3.6's name and the later one of a TMA load.
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
REGISTERS = 168  # a thread at launch: 65,536 over 12 warps; the groups then take what the loader leaves
CONVERT = gl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")


@dataclass(frozen=True)
class Tile:
    """How one program works; all give the same numbers but for rounding.

    stages: depth of the ring, 2 to 6. ping: groups issue in turns. magic: scores start at `CENTRE`, so that
    they need no conversion to fp32.
    """

    stages: int = 4
    ping: bool = False
    magic: bool = False


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, full, empty, q_row, k_row, v_row, blocks
):  # fmt: skip
    stages: gl.constexpr = k_tiles.type.shape[0]
    mbarrier.expect(q_full, GROUPS * ROWS * HEAD)
    for group in gl.static_range(GROUPS):
        _fetch(q_desc, [q_row + group * ROWS, 0], q_full, q_tiles.index(group))
    for step in range(blocks + 1):
        slot = step % stages
        key = gl.where(step == 0, blocks - 1, step - 1) * KEYS
        value = gl.where(step == 1, blocks - 1, gl.maximum(step - 2, 0)) * KEYS
        # A new barrier counts as having just left phase 1: the first round does not wait.
        mbarrier.wait(empty.index(slot), (step // stages & 1) ^ 1)
        mbarrier.expect(full.index(slot), 2 * KEYS * HEAD)
        _fetch(k_desc, [k_row + key, 0], full.index(slot), k_tiles.index(slot))
        _fetch(v_desc, [v_row, value], full.index(slot), v_tiles.index(slot))


@gluon.jit
def _pack(p, layout: gl.constexpr):
    """P in e4m3 as words of four slots, each in the lane that feeds it to the tensor core."""
    slots = p.reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)
    slots = gl.convert_layout(slots, layout, assert_trivial=True)
    even, odd = gl.split(slots.reshape(ROWS, KEYS // 4, 2, 2))
    p0, p2 = gl.split(even)
    p1, p3 = gl.split(odd)
    return gl.inline_asm_elementwise(
        CONVERT, "=r,f,f,f,f", [p0, p1, p2, p3], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _operand(words, nothing, layout: gl.constexpr):
    """The words as the tensor core's operand.

    `nothing` is a zero that the compilers can't see: without an instruction in between, ptxas gives the next
    block's words the registers that the running product still reads, and then makes all products wait.
    """
    words = words | nothing
    four = gl.join(words, words)
    four = gl.join(four, four).reshape(ROWS, KEYS)
    four = gl.convert_layout(four, layout, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [four], dtype=gl.float8e4nv, is_pure=True, pack=4
    )


@gluon.jit
def _lane_sums(p):
    """Sums over the columns that a lane holds: [ROWS, 4], with nothing exchanged between lanes."""
    return gl.sum(gl.sum(p.reshape(ROWS, KEYS // 8, 4, 2), axis=3), axis=1)


@gluon.jit
def _beside(x, sums):
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, sums.type.layout), assert_trivial=True), 1)


@gluon.jit
def _consume(
    q_tiles, k_tiles, v_tiles, q_full, full, empty, of_query, k_scale_ptr, v_scale_ptr, out_ptr,
    stride, first, queries, tokens, blocks, GROUP: gl.constexpr, PING: gl.constexpr, MAGIC: gl.constexpr,
):  # fmt: skip
    stages: gl.constexpr = k_tiles.type.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    # This group's turn, and the other's; Triton itself takes the first few named barriers.
    my_turn: gl.constexpr = (
        "bar.sync 8, 256; mov.b32 $0, 0;" if GROUP == 0 else "bar.sync 9, 256; mov.b32 $0, 0;"
    )
    yours: gl.constexpr = (
        "bar.arrive 9, 256; mov.b32 $0, 0;" if GROUP == 0 else "bar.arrive 8, 256; mov.b32 $0, 0;"
    )
    q = q_tiles.index(GROUP)
    start = gl.full([ROWS, KEYS], CENTRE_BITS if MAGIC else 0, gl.int32, mma)
    acc = gl.zeros([ROWS, HEAD], gl.float32, mma)
    product = gl.zeros([ROWS, HEAD], gl.float32, mma)
    nothing = queries >> 31
    scale = of_query * gl.load(k_scale_ptr + blocks - 1)
    next_scale = gl.load(k_scale_ptr)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), start, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    key = (blocks - 1) * KEYS + gl.arange(0, KEYS, layout=cols)
    scores = gl.where((key < tokens)[None, :], s.to(gl.float32) * scale, float("-inf"))
    highest = gl.max(scores, axis=1)
    p = gl.exp2(scores + (BIAS - highest)[:, None])
    sums = _lane_sums(p)
    fade = gl.full([ROWS], 0.0, gl.float32, rows)
    words = _pack(p, operand)
    mbarrier.wait(full.index(1 % stages), 1 // stages & 1)
    if PING and GROUP == 1:
        gl.inline_asm_elementwise(yours, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    for step in range(1, blocks):
        slot = step % stages
        scale = of_query * next_scale
        next_scale = gl.load(k_scale_ptr + step)  # of the step after this one
        p8 = _operand(words, nothing, operand)
        if PING:
            gl.inline_asm_elementwise(my_turn, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        s = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), start, use_acc=MAGIC, is_async=True)
        product = warpgroup_mma(
            p8, v_tiles.index(slot).permute((1, 0)), product, use_acc=False, is_async=True
        )
        if PING:
            gl.inline_asm_elementwise(yours, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        s = warpgroup_mma_wait(1, deps=[s])
        peak = gl.max(s, axis=1)
        if MAGIC:
            now = gl.maximum(highest, (peak - CENTRE_BITS).to(gl.float32) * scale)
            p = gl.exp2(s.to(gl.float32, bitcast=True) * scale + (BIAS - now - CENTRE * scale)[:, None])
        else:
            now = gl.maximum(highest, peak.to(gl.float32) * scale)
            p = gl.exp2(s.to(gl.float32) * scale + (BIAS - now)[:, None])
        next_fade = gl.exp2(highest - now)
        sums = sums * _beside(next_fade, sums) + _lane_sums(p)
        words = _pack(p, operand)
        # Also keeps ptxas from waiting for the product before the softmax: it can't move that over a branch.
        mbarrier.wait(full.index((step + 1) % stages), (step + 1) // stages & 1)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index(slot), count=1)
        acc = acc * fade[:, None] + product
        highest = now
        fade = next_fade
    if PING and GROUP == 0:  # takes the turn that group 1 left behind
        gl.inline_asm_elementwise(my_turn, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    p8 = _operand(words, nothing, operand)
    product = warpgroup_mma(
        p8, v_tiles.index(blocks % stages).permute((1, 0)), product, use_acc=False, is_async=True
    )
    product = warpgroup_mma_wait(0, deps=[product])
    acc = acc * fade[:, None] + product
    of_channel = gl.load(v_scale_ptr + gl.arange(0, HEAD, layout=cols))
    total = gl.convert_layout(gl.sum(sums, axis=1), rows, assert_trivial=True)
    out = acc * (1.0 / total)[:, None] * of_channel[None, :]
    row = first + GROUP * ROWS + gl.arange(0, ROWS, layout=rows)
    at = row.to(gl.int64)[:, None] * stride + gl.arange(0, HEAD, layout=cols)[None, :]
    gl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(row < queries)[:, None])


@gluon.jit(do_not_specialize=["queries", "tokens"])
def _attention_kernel(
    q_desc, k_desc, v_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr,
    queries, tokens, heads, softmax_scale,
    STAGES: gl.constexpr, PING: gl.constexpr, MAGIC: gl.constexpr,
):  # fmt: skip
    block, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    place = batch * heads + head
    blocks = gl.cdiv(tokens, KEYS)
    q_tiles = gl.allocate_shared_memory(gl.int8, [GROUPS, ROWS, HEAD], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, KEYS, HEAD], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, HEAD, KEYS], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=GROUPS)
    first = block * GROUPS * ROWS
    of_query = gl.load(q_scale_ptr + place * gl.num_programs(0) + block) * softmax_scale
    stride = heads * HEAD
    out = out_ptr + batch.to(gl.int64) * queries * stride + head * HEAD
    k_scales, v_scales = k_scale_ptr + place * blocks, v_scale_ptr + place * HEAD
    # Tuples can't be put together here, so all arguments are written out.
    gl.warp_specialize(
        [
            (_consume, (q_tiles, k_tiles, v_tiles, q_full, full, empty, of_query, k_scales, v_scales, out,
                        stride, first, queries, tokens, blocks, gl.constexpr(0), PING, MAGIC)),
            (_consume, (q_tiles, k_tiles, v_tiles, q_full, full, empty, of_query, k_scales, v_scales, out,
                        stride, first, queries, tokens, blocks, gl.constexpr(1), PING, MAGIC)),
            (_load, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, full, empty,
                     place * queries + first, place * tokens, place * HEAD, blocks)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def fits(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> bool:
    """Whether the kernel takes these: heads of 128 with their elements side by side, on a Hopper GPU."""
    hopper = q_BLHK.is_cuda and torch.cuda.get_device_capability(q_BLHK.device)[0] == 9
    return hopper and q_BLHK.shape[-1] == HEAD_DIMENSION and plain.fits(q_BLHK, k_BTHK, v_BTHK)


def attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, tile: Tile | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in q's dtype, [B, L, H, K]. ValueError for what `fits` refuses."""
    if not fits(q_BLHK, k_BTHK, v_BTHK):
        raise ValueError(f"q {tuple(q_BLHK.shape)}: expected heads of {HEAD_DIMENSION} on a Hopper GPU")
    if tile is None:
        tuned = setting("attention_8bit_hopper", f"{HEAD_DIMENSION}", q_BLHK.device, {})
        tile = Tile(**{name: value for name, value in tuned.items() if name != "ms"})
    return run(operands(q_BLHK, k_BTHK, v_BTHK), q_BLHK.dtype, tile)


def operands(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Blocks, Blocks, Channels]:
    """q, k and v in 8 bits, v's tokens by `reference.slots`."""
    return (
        plain.quantize_blocks(q_BLHK, None, ROWS.value * GROUPS.value),
        plain.quantize_blocks(k_BTHK, mean_over_tokens(k_BTHK), KEYS.value),
        plain.quantize_channels(v_BTHK, slots=True),
    )


def run(given: tuple[Blocks, Blocks, Channels], dtype: torch.dtype, tile: Tile) -> Tensor:
    """The attention itself, of what `operands` gives: [B, L, H, K] in `dtype`."""
    q, k, v = given
    batch, heads, queries, width = q.data.shape
    out = torch.empty((batch, queries, heads, width), dtype=dtype, device=q.data.device)
    # Rows past the end of a head are the next head's, or zeros: never stored, or masked as keys.
    q_desc, k_desc, v_desc = (
        TensorDescriptor.from_tensor(x.flatten(0, 2), [rows, width], LAYOUT)
        for x, rows in ((q.data, ROWS.value), (k.data, KEYS.value), (v.data, HEAD_DIMENSION))
    )
    _attention_kernel[(q.scale.shape[2], heads, batch)](
        q_desc, k_desc, v_desc, q.scale, k.scale, v.scale, out,
        queries, k.data.shape[2], heads, LOG2E * width**-0.5,
        STAGES=tile.stages, PING=tile.ping, MAGIC=tile.magic, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out
