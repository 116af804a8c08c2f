"""`render` as one Triton kernel: a batch of clips in one launch, each with its own window and first frame.

The plain version, `models.demo.train.render`, takes some hundred passes over memory; it is what this one
is tested against, and what runs on a CPU.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.demo.train import render as plain
from models.demo.train.render import PackedScenes

PALETTE = plain.PALETTE
OUTLINE = tl.constexpr(plain.OUTLINE)
OUTLINE_WIDTH = tl.constexpr(plain.OUTLINE_WIDTH)
SHADE = tl.constexpr(plain.SHADE)
SOFTNESS = tl.constexpr(plain.SOFTNESS)
STAR_RADIUS = tl.constexpr(plain.STAR_RADIUS)
STAR_GREY = tl.constexpr(plain.STAR_GREY)
PAN_TRAVEL = tl.constexpr(plain.PAN_TRAVEL)
PI = tl.constexpr(math.pi)
BLOCK = 1024


@triton.jit
def _remainder(x, m):  # type: ignore[no-untyped-def]
    return x - tl.floor(x / m) * m


@triton.jit
def _unit(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _hypot(x, y):  # type: ignore[no-untyped-def]
    return tl.sqrt(x * x + y * y)


@triton.jit
def _hash(a, b, c):  # type: ignore[no-untyped-def]
    h = (a * 73856093) ^ (b * 19349663) ^ (c * 83492791)
    h = ((h ^ (h >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF).to(tl.float32) / 65536


@triton.jit
def _distance(shape, x, y):  # type: ignore[no-untyped-def]
    if shape == 0:  # circle
        d = _hypot(x, y) - 0.95
    elif shape == 1:  # square
        d = tl.maximum(tl.abs(x), tl.abs(y)) - 0.80
    elif shape == 2:  # triangle
        d = tl.maximum(0.866 * tl.abs(x) - 0.5 * y, y) - 0.54
    elif shape == 3:  # star: the fold into a tenth by two reflections
        px = tl.abs(x)
        py = -y
        dot = tl.maximum(0.809016994375 * px - 0.587785252292 * py, 0.0)
        px = px - 2 * dot * 0.809016994375
        py = py + 2 * dot * 0.587785252292
        dot = tl.maximum(-0.809016994375 * px - 0.587785252292 * py, 0.0)
        px = tl.abs(px + 2 * dot * 0.809016994375)
        py = py + 2 * dot * 0.587785252292
        # The line from the tip (0, 1.08) to the notch (0.47 sin 36, 0.47 cos 36).
        nx = 1.08 - 0.47 * 0.809016994375
        ny = 0.47 * 0.587785252292
        d = (px * nx + (py - 1.08) * ny) / tl.sqrt(nx * nx + ny * ny + 0.0 * px)
    elif shape == 4:  # heart
        half = 0.56
        p = (x + y) * 0.7071067811865476 - 0.1
        q = (y - x) * 0.7071067811865476 - 0.1
        box = tl.maximum(tl.abs(p), tl.abs(q)) - half
        d = tl.minimum(box, tl.minimum(_hypot(p + half, q), _hypot(p, q + half)) - half)
    elif shape == 5:  # ring
        d = tl.abs(_hypot(x, y) - 0.72) - 0.24
    else:  # cross
        ax = tl.abs(x)
        ay = tl.abs(y)
        d = tl.minimum(tl.maximum(ax - 0.30, ay - 0.95), tl.maximum(ax - 0.95, ay - 0.30))
    return d


@triton.jit
def _tone(texture, x, y, soft):  # type: ignore[no-untyped-def]
    depth = x * 0.0 - 1e9
    if texture == 1:  # striped
        depth = tl.sin(x * (2 * PI / 0.66)) * (0.66 / (2 * PI))
    elif texture == 2:  # dotted
        depth = 0.19 - _hypot(_remainder(x, 0.62) - 0.31, _remainder(y, 0.62) - 0.31)
    elif texture == 3:  # checkered
        depth = tl.sin(x * (PI / 0.5)) * tl.sin(y * (PI / 0.5)) * (0.5 / PI)
    return 1 + (SHADE - 1) * _unit(depth / soft + 0.5)


@triton.jit
def _thing(r, g, b, x, y, u, pixel, at, shape_ptr, colour_ptr, texture_ptr, spec_ptr, palette_ptr):  # type: ignore[no-untyped-def]
    spec = spec_ptr + at * 13
    there = tl.load(spec + 12)
    cycles = tl.load(spec + 6)
    swing = _remainder(cycles * u + 0.25 + 0.1 * tl.load(spec + 7), 1.0)
    part = _remainder(cycles * u, 1.0)
    cx = tl.load(spec) + tl.load(spec + 2) * u + tl.load(spec + 4) * (1 - 4 * tl.abs(swing - 0.5))
    cy = tl.load(spec + 1) + tl.load(spec + 3) * u - tl.load(spec + 5) * 4 * part * (1 - part)
    r0 = tl.load(spec + 8)
    a0 = tl.load(spec + 10)
    radius = r0 + (tl.load(spec + 9) - r0) * u
    angle = a0 + (tl.load(spec + 11) - a0) * u
    dx = (x - cx) / radius
    dy = (y - cy) / radius
    px = tl.cos(angle) * dx + tl.sin(angle) * dy
    py = tl.cos(angle) * dy - tl.sin(angle) * dx
    distance = _distance(tl.load(shape_ptr + at), px, py) * radius
    tone = _tone(tl.load(texture_ptr + at), px, py, pixel / radius)
    inner = _unit((-OUTLINE_WIDTH - distance) / pixel + 0.5)
    alpha = tl.where(there > 0, _unit(0.5 - distance / pixel), 0.0)
    colour = palette_ptr + tl.load(colour_ptr + at) * 3
    r += (OUTLINE + (tone * tl.load(colour) - OUTLINE) * inner - r) * alpha
    g += (OUTLINE + (tone * tl.load(colour + 1) - OUTLINE) * inner - g) * alpha
    b += (OUTLINE + (tone * tl.load(colour + 2) - OUTLINE) * inner - b) * alpha
    return r, g, b


@triton.jit
def _backdrop(background, x, y, seed, pixel):  # type: ignore[no-untyped-def]
    r = x * 0.0
    g = x * 0.0
    b = x * 0.0
    tall = (y + 1) / 2
    k = PI / 0.35
    if background <= 1:
        phase = (seed % 63).to(tl.float32) / 10
        ground = _unit((y - 0.62 - 0.05 * tl.sin(3 * x + phase)) / pixel + 0.5)
        if background == 0:  # day
            cell = tl.floor(x / 0.9).to(tl.int64)
            shift_x = (_hash(cell, cell * 0 + 1, seed) - 0.5) * 0.3
            shift_y = _hash(cell, cell * 0 + 2, seed) * 0.5 - 0.85
            local = _remainder(x, 0.9) - 0.45 - shift_x
            puff = _hypot(local / 0.26, (y - shift_y) / 0.11) - 1
            cloud = _unit(0.5 - puff * 0.11 / pixel)
            r = 0.42 + (0.82 - 0.42) * tall
            g = 0.70 + (0.93 - 0.70) * tall
            b = 0.95 + (1.00 - 0.95) * tall
            r += (0.97 - r) * cloud
            g += (0.97 - g) * cloud
            b += (0.97 - b) * cloud
            r += (0.42 - r) * ground
            g += (0.62 - g) * ground
            b += (0.28 - b) * ground
        else:  # night
            column = tl.floor(x / 0.3).to(tl.int64)
            row = tl.floor(y / 0.3).to(tl.int64)
            off_x = 0.06 + _hash(column, row, seed) * 0.18
            off_y = 0.06 + _hash(column, row, seed + 7) * 0.18
            near = _hypot(_remainder(x, 0.3) - off_x, _remainder(y, 0.3) - off_y)
            star = _unit(0.5 - (near - STAR_RADIUS) / pixel)
            star = tl.where(_hash(column, row, seed + 3) < 0.6, star, 0.0)
            r = 0.02 + (0.10 - 0.02) * tall
            g = 0.03 + (0.10 - 0.03) * tall
            b = 0.14 + (0.30 - 0.14) * tall
            r += (STAR_GREY - r) * star
            g += (STAR_GREY - g) * star
            b += (STAR_GREY - b) * star
            r += (0.05 - r) * ground
            g += (0.10 - g) * ground
            b += (0.08 - b) * ground
    elif background == 2:  # grey
        r += 0.50
        g += 0.50
        b += 0.50
    elif background == 3:  # cream
        r += 0.95
        g += 0.89
        b += 0.74
    elif background == 4:  # black
        r += 0.03
        g += 0.03
        b += 0.03
    elif background == 5:  # stripes
        soft = _unit(tl.sin(k * x) / (k * pixel) + 0.5)
        r = 0.55 + (0.72 - 0.55) * soft
        g = 0.60 + (0.77 - 0.60) * soft
        b = 0.68 + (0.84 - 0.68) * soft
    elif background == 6:  # checks
        soft = _unit(tl.sin(k * x) * tl.sin(k * y) / (k * pixel) + 0.5)
        r = 0.50 + (0.68 - 0.50) * soft
        g = 0.43 + (0.60 - 0.43) * soft
        b = 0.36 + (0.50 - 0.36) * soft
    else:  # dots
        near = _hypot(_remainder(x, 0.4) - 0.2, _remainder(y, 0.4) - 0.2)
        soft = _unit(0.5 - (near - 0.09) / pixel)
        r = 0.80 + (0.56 - 0.80) * soft
        g = 0.85 + (0.66 - 0.85) * soft
        b = 0.78 + (0.58 - 0.78) * soft
    return r, g, b


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    out_ptr, rows_ptr, corners_ptr, shape_ptr, colour_ptr, texture_ptr, spec_ptr, background_ptr, pan_ptr,
    seed_ptr, palette_ptr, count, rows, columns, last, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = count * rows * columns
    scene = tl.load(rows_ptr + clip)
    frame = at // (rows * columns) + tl.load(corners_ptr + clip * 3)
    row = (at // columns) % rows + tl.load(corners_ptr + clip * 3 + 1)
    column = at % columns + tl.load(corners_ptr + clip * 3 + 2)
    u = frame.to(tl.float32) / last
    pixel = 2.0 / height
    x = (column.to(tl.float32) + 0.5) * (2.0 / width) - 1
    y = (row.to(tl.float32) + 0.5) * pixel - 1
    seed = tl.load(seed_ptr + scene)
    edge = pixel * SOFTNESS
    drift = tl.load(pan_ptr + scene) * PAN_TRAVEL * u + (seed % 97).to(tl.float32) / 97 * 4
    r, g, b = _backdrop(tl.load(background_ptr + scene), x + drift, y, seed, edge)
    for slot in tl.static_range(2):  # the second thing is behind the first
        r, g, b = _thing(
            r, g, b, x, y, u, edge, scene * 2 + 1 - slot,
            shape_ptr, colour_ptr, texture_ptr, spec_ptr, palette_ptr,
        )  # fmt: skip
    out = out_ptr + (clip * total + at) * 3
    tl.store(out, r * 2 - 1, mask=at < total)
    tl.store(out + 1, g * 2 - 1, mask=at < total)
    tl.store(out + 2, b * 2 - 1, mask=at < total)


@cache
def _palette(device: torch.device) -> Tensor:
    return torch.tensor(PALETTE, device=device)


def launch(
    packed: PackedScenes,
    rows_B: Tensor,
    corners_B3: Tensor,
    size: tuple[int, int, int],
    frame_num: int,
    height: int,
    width: int,
) -> Tensor:
    """The kernel alone; see `draw`."""
    count, rows, columns = size
    out = torch.empty(len(rows_B), *size, 3, device=rows_B.device)
    grid = (len(rows_B), triton.cdiv(count * rows * columns, BLOCK))
    _draw[grid](
        out, rows_B, corners_B3, packed.shape, packed.colour, packed.texture, packed.spec, packed.background,
        packed.pan, packed.seed, _palette(rows_B.device), count, rows, columns, float(max(frame_num - 1, 1)),
        float(height), float(width), BLOCK,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)


class _Health:
    """Whether the kernel may still be tried in this process."""

    broken = False


def draw(
    packed: PackedScenes,
    rows_B: Tensor,
    corners_B3: Tensor | None = None,
    size: tuple[int, int, int] | None = None,
    *,
    frame_num: int = 17,
    height: int = 128,
    width: int = 128,
) -> Tensor:
    """Clips of some rows of `packed`: float RGB in [-1, 1], [B, 3, F, H, W], channels innermost in memory.

    `corners_B3` (first frame, top, left) and `size` (frames, rows, columns) cut a part out of each clip.
    """
    size = size or (frame_num, height, width)
    if corners_B3 is None:
        corners_B3 = torch.zeros(len(rows_B), 3, dtype=torch.long, device=rows_B.device)
    if rows_B.is_cuda and not _Health.broken:
        try:
            return launch(packed, rows_B, corners_B3, size, frame_num, height, width)
        except Exception as error:  # any fault of the compiler's: the plain version gives the same
            print(f"fast render: {error!r}; using the plain one", flush=True)
            _Health.broken = True
    first, top, left = corners_B3[0].tolist()
    window, span = (top, left, size[1], size[2]), (first, size[0])
    return plain.render(packed[rows_B], frame_num, height, width, window=window, span=span)


def render(packed: PackedScenes, frame_num: int = 17, height: int = 128, width: int = 128) -> Tensor:
    """Whole clips of all of `packed`, as `models.demo.train.render.render`."""
    rows = torch.arange(len(packed), device=packed.spec.device)
    return draw(packed, rows, frame_num=frame_num, height=height, width=width)
