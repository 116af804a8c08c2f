"""Scenes to frames: signed distance shapes over painted backgrounds, a whole batch at once.

Shapes of tensors: B clips, K things a clip (2, absent ones transparent), F frames, H rows,
W columns. All runs on the device of the packed scenes; colours are RGB in [0, 1] until the end.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from models.demo.train.world import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, Thing

PALETTE = (
    (0.90, 0.08, 0.10),
    (1.00, 0.52, 0.04),
    (0.98, 0.90, 0.12),
    (0.08, 0.68, 0.20),
    (0.10, 0.28, 0.95),
    (0.52, 0.12, 0.78),
    (1.00, 0.50, 0.76),
    (0.97, 0.97, 0.97),
)
OUTLINE = 0.12  # grey of the thin line round every shape
OUTLINE_WIDTH = 0.03
SHADE = 0.52  # the darker tone of a texture
SOFTNESS = 2.0  # pixels that an edge is wide: a little out of focus, which a small VAE can keep
STAR_RADIUS, STAR_GREY = 0.024, 0.72
PAN_TRAVEL = 0.6
_RADII = {"small": 0.25, "large": 0.40}


@dataclass(frozen=True)
class PackedScenes:
    """Scenes as numbers: shape, colour, texture [B, K]; spec [B, K, 13]; background, pan, seed [B].

    `spec` holds per thing: x, y, dx, dy, side amplitude, hop height, cycles, phase, radius at the start and
    end, angle at the start and end, and whether it is there at all.
    """

    shape: Tensor
    colour: Tensor
    texture: Tensor
    spec: Tensor
    background: Tensor
    pan: Tensor
    seed: Tensor

    def __getitem__(self, index: Tensor | slice) -> "PackedScenes":
        return PackedScenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.seed)

    @staticmethod
    def join(parts: list["PackedScenes"]) -> "PackedScenes":
        """Several batches of scenes as one."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(PackedScenes)]
        return PackedScenes(*(torch.cat(column) for column in columns))

    def to(self, device: torch.device | str) -> "PackedScenes":
        """Copy to a device."""
        return PackedScenes(*(getattr(self, field.name).to(device) for field in fields(self)))


def _home(thing: Thing, scene: Scene, slot: int, radius: float) -> tuple[float, float]:
    """The middle of a thing's path."""
    room = max(0.0, 0.9 - radius)
    jx, jy, _ = thing.jitter
    if scene.layout == "beside":
        return (-0.48 if slot == 0 else 0.48) + 0.06 * jx, 0.15 * jy
    if scene.layout == "stacked":
        return 0.15 * jx, (-0.48 if slot == 0 else 0.48) + 0.06 * jy
    if scene.layout == "crossing":
        return 0.08 * jx, 0.18 * jy
    return 0.5 * room * jx, 0.5 * room * jy


def _spec(thing: Thing, scene: Scene, slot: int) -> list[float]:
    """The numbers of one thing (see PackedScenes)."""
    fast = thing.speed == "fast"
    radius = _RADII[thing.size] * (1.0 if scene.layout == "one" else 0.85) * (1 + 0.06 * thing.jitter[2])
    x, y = _home(thing, scene, slot, radius)
    dx = dy = amplitude = hop = cycles = 0.0
    start = end = radius
    angle = 0.15 * thing.jitter[2]
    turn = 0.0
    travel = 1.15 if fast else 0.6
    if scene.layout == "crossing":
        travel = 1.3 if fast else 0.95
    if thing.motion in ("left", "right"):
        dx = travel if thing.motion == "right" else -travel
        x = x * (0.4 if fast else 0.8)
    elif thing.motion in ("up", "down"):
        dy = travel if thing.motion == "down" else -travel
        y = y * (0.4 if fast else 0.8)
    elif thing.motion == "side_bounce":
        amplitude, cycles = 0.92 - radius, 2.0 if fast else 1.0
        x = 0.0
    elif thing.motion == "bounce":
        hop, cycles = 0.75, 2.5 if fast else 1.5
        y = 0.42 if scene.layout == "one" else 0.40
    elif thing.motion == "spin":
        turn = 0.8 if fast else 0.4
    if "grow" in (thing.motion, thing.extra):
        start = radius * 0.45
    elif "shrink" in (thing.motion, thing.extra):
        end = radius * 0.45
    if thing.extra == "spin":
        turn = 0.8 if fast else 0.4
    return [
        x - dx / 2,
        y - dy / 2,
        dx,
        dy,
        amplitude,
        hop,
        cycles,
        thing.jitter[2],
        start,
        end,
        angle,
        angle + 2 * math.pi * turn,
        1.0,
    ]


_ABSENT = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def pack(scenes: list[Scene]) -> PackedScenes:
    """Turn scenes into tensors on the CPU."""
    shape, colour, texture, spec = [], [], [], []
    for scene in scenes:
        things = [*scene.things, *scene.things][:2]
        shape.append([SHAPES.index(thing.shape) for thing in things])
        colour.append([COLOURS.index(thing.colour) for thing in things])
        texture.append([TEXTURES.index(thing.texture) for thing in things])
        numbers = [_spec(thing, scene, slot) for slot, thing in enumerate(scene.things)]
        spec.append(numbers if len(numbers) == 2 else [*numbers, _ABSENT])
    pan = {"none": 0.0, "left": -1.0, "right": 1.0}
    return PackedScenes(
        torch.tensor(shape),
        torch.tensor(colour),
        torch.tensor(texture),
        torch.tensor(spec),
        torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]),
        torch.tensor([pan[scene.pan] for scene in scenes]),
        torch.tensor([scene.seed for scene in scenes]),
    )


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (negative inside) of the unit-sized shape, exact or a little short of it outside."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.95
    if shape == "ring":
        return (torch.hypot(x, y) - 0.72).abs() - 0.24
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.80
    if shape == "cross":
        ax, ay = x.abs(), y.abs()
        return torch.minimum(torch.maximum(ax - 0.30, ay - 0.95), torch.maximum(ax - 0.95, ay - 0.30))
    if shape == "triangle":
        return torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.54
    if shape == "heart":
        # A square standing on its corner with a disc on each of its upper edges.
        half = 0.56
        p, q = (x + y) * math.sqrt(0.5), (y - x) * math.sqrt(0.5)
        p, q = p - 0.1, q - 0.1
        box = torch.maximum(p.abs(), q.abs()) - half
        left, right = torch.hypot(p + half, q) - half, torch.hypot(p, q + half) - half
        return torch.minimum(box, torch.minimum(left, right))
    # Star: fold the plane into one tenth, then the distance to the line from tip to notch.
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(x, y)
    px, py = radius * torch.sin(folded), radius * torch.cos(folded)
    tip, notch = (0.0, 1.08), (0.47 * math.sin(sector / 2), 0.47 * math.cos(sector / 2))
    nx, ny = tip[1] - notch[1], notch[0] - tip[0]
    return ((px - tip[0]) * nx + (py - tip[1]) * ny) / math.hypot(nx, ny)


def _texture_tone(texture_B: Tensor, x: Tensor, y: Tensor, soft: Tensor) -> Tensor:
    """1 where a thing shows its colour, SHADE where it shows the darker tone, with edges `soft` wide."""
    tone = torch.ones_like(x)
    for index, name in enumerate(TEXTURES):
        rows = (texture_B == index).nonzero()[:, 0]
        if name == "solid" or not len(rows):
            continue
        px, py = x[rows], y[rows]
        if name == "striped":
            k = 2 * math.pi / 0.66
            depth = torch.sin(px * k) / k
        elif name == "checkered":
            k = math.pi / 0.5
            depth = torch.sin(px * k) * torch.sin(py * k) / k
        else:
            cell = 0.62
            half = cell / 2
            depth = 0.19 - torch.hypot(torch.remainder(px, cell) - half, torch.remainder(py, cell) - half)
        tone[rows] = 1 + (SHADE - 1) * (depth / soft[rows] + 0.5).clamp(0, 1)
    return tone


def _path(spec_BN: Tensor, u_F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, radius and angle of one thing over the frames, each [B, F]."""
    x, y, dx, dy, amplitude, hop, cycles, phase, r0, r1, a0, a1, _ = (
        column[:, None] for column in spec_BN.unbind(1)
    )
    u = u_F[None]
    swing = torch.remainder(cycles * u + 0.25 + 0.1 * phase, 1.0)
    triangle = 1 - 4 * (swing - 0.5).abs()
    part = torch.remainder(cycles * u, 1.0)
    centre_x = x + dx * u + amplitude * triangle
    centre_y = y + dy * u - hop * 4 * part * (1 - part)
    return centre_x, centre_y, r0 + (r1 - r0) * u, a0 + (a1 - a0) * u


def _draw_thing(
    frames: Tensor, packed: PackedScenes, slot: int, grid: tuple[Tensor, Tensor], u_F: Tensor, pixel: float
) -> Tensor:
    """Paint one thing of every clip over frames [B, F, H, W, 3]."""
    x_W, y_H = grid
    spec_BN = packed.spec[:, slot]
    there = (spec_BN[:, 12] > 0).nonzero()[:, 0]
    if not len(there):
        return frames
    spec_BN = spec_BN[there]
    cx, cy, radius, angle = (value[:, :, None, None] for value in _path(spec_BN, u_F))
    dx, dy = (x_W[None, None, None, :] - cx) / radius, (y_H[None, None, :, None] - cy) / radius
    x = torch.cos(angle) * dx + torch.sin(angle) * dy
    y = torch.cos(angle) * dy - torch.sin(angle) * dx
    distance = torch.empty_like(x)
    shapes = packed.shape[there, slot]
    for index, name in enumerate(SHAPES):
        rows = (shapes == index).nonzero()[:, 0]
        if len(rows):
            distance[rows] = _distance(name, x[rows], y[rows])
    distance = distance * radius
    tone = _texture_tone(packed.texture[there, slot], x, y, pixel / radius)
    palette = torch.tensor(PALETTE, device=frames.device)
    colour = palette[packed.colour[there, slot]][:, None, None, None, :]
    inner = ((-OUTLINE_WIDTH - distance) / pixel + 0.5).clamp(0, 1)[..., None]
    body = OUTLINE + (tone[..., None] * colour - OUTLINE) * inner
    alpha = (0.5 - distance / pixel).clamp(0, 1)[..., None]
    behind = frames[there]
    frames[there] = behind + (body - behind) * alpha
    return frames


def _hash(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A number in [0, 1) from three integers, the same on every device."""
    h = (a * 73856093) ^ (b * 19349663) ^ (c * 83492791)
    h = ((h ^ (h >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF).float() / 65536


def _mix(mask: Tensor, low: tuple[float, float, float], high: tuple[float, float, float]) -> Tensor:
    a, b = torch.tensor(low, device=mask.device), torch.tensor(high, device=mask.device)
    return a + (b - a) * mask[..., None]


def _landscape(name: str, x: Tensor, y: Tensor, seed: Tensor, pixel: float) -> Tensor:
    """Day: a pale sky with clouds over grass. Night: stars over dark ground."""
    height = (y + 1) / 2
    phase = torch.remainder(seed.float(), 63) / 10
    ground = ((y - 0.62 - 0.05 * torch.sin(3 * x + phase)) / pixel + 0.5).clamp(0, 1)
    if name == "day":
        sky = _mix(height.expand_as(x), (0.42, 0.70, 0.95), (0.82, 0.93, 1.00))
        cell = torch.floor(x / 0.9).long()
        shift_x = (_hash(cell, cell * 0 + 1, seed) - 0.5) * 0.3
        shift_y = _hash(cell, cell * 0 + 2, seed) * 0.5 - 0.85
        local = torch.remainder(x, 0.9) - 0.45 - shift_x
        puff = torch.hypot(local / 0.26, (y - shift_y) / 0.11) - 1
        cloud = (0.5 - puff * 0.11 / pixel).clamp(0, 1)[..., None]
        sky = sky + (0.97 - sky) * cloud
        return sky + (torch.tensor((0.42, 0.62, 0.28), device=x.device) - sky) * ground[..., None]
    sky = _mix(height.expand_as(x), (0.02, 0.03, 0.14), (0.10, 0.10, 0.30))
    size = 0.3
    column, row = torch.floor(x / size).long(), torch.floor(y / size).long().expand(x.shape)
    off_x = 0.06 + _hash(column, row, seed) * 0.18
    off_y = 0.06 + _hash(column, row, seed + 7) * 0.18
    near = torch.hypot(torch.remainder(x, size) - off_x, torch.remainder(y, size) - off_y)
    star = (0.5 - (near - STAR_RADIUS) / pixel).clamp(0, 1) * (_hash(column, row, seed + 3) < 0.6)
    sky = sky + (STAR_GREY - sky) * star[..., None]
    return sky + (torch.tensor((0.05, 0.10, 0.08), device=x.device) - sky) * ground[..., None]


def _pattern(name: str, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Muted two-tone wallpaper, so that it is never taken for a thing."""

    def soft(wave: Tensor, slope: float) -> Tensor:
        return (wave / (slope * pixel) + 0.5).clamp(0, 1)

    k = math.pi / 0.35
    if name == "stripes":
        return _mix(soft(torch.sin(k * x), k), (0.55, 0.60, 0.68), (0.72, 0.77, 0.84)).expand(*x.shape, 3)
    if name == "checks":
        return _mix(soft(torch.sin(k * x) * torch.sin(k * y), k), (0.50, 0.43, 0.36), (0.68, 0.60, 0.50))
    near = torch.hypot(torch.remainder(x, 0.4) - 0.2, torch.remainder(y, 0.4) - 0.2)
    return _mix((0.5 - (near - 0.09) / pixel).clamp(0, 1), (0.80, 0.85, 0.78), (0.56, 0.66, 0.58))


_PLAIN = {"grey": (0.50, 0.50, 0.50), "cream": (0.95, 0.89, 0.74), "black": (0.03, 0.03, 0.03)}


def _backdrop(packed: PackedScenes, grid: tuple[Tensor, Tensor], u_F: Tensor, pixel: float) -> Tensor:
    """Backgrounds [B, F, H, W, 3]."""
    x_W, y_H = grid
    frames = torch.empty(len(packed), len(u_F), len(y_H), len(x_W), 3, device=x_W.device)
    offset_B = torch.remainder(packed.seed.float(), 97) / 97 * 4
    for index, name in enumerate(BACKGROUNDS):
        rows = (packed.background == index).nonzero()[:, 0]
        if not len(rows):
            continue
        if name in _PLAIN:
            frames[rows] = torch.tensor(_PLAIN[name], device=x_W.device)
            continue
        drift = packed.pan[rows][:, None] * PAN_TRAVEL * u_F[None] + offset_B[rows][:, None]
        x = (x_W[None, None, None, :] + drift[:, :, None, None]).expand(-1, -1, len(y_H), -1)
        y = y_H[None, None, :, None]
        if name in ("day", "night"):
            seed = packed.seed[rows][:, None, None, None]
            frames[rows] = _landscape(name, x, y, seed, pixel)
        else:
            frames[rows] = _pattern(name, x, y, pixel)
    return frames


def render(
    packed: PackedScenes,
    frame_num: int = 17,
    height: int = 128,
    width: int = 128,
    *,
    window: tuple[int, int, int, int] | None = None,
    span: tuple[int, int] | None = None,
) -> Tensor:
    """Draw clips as float RGB in [-1, 1], [B, 3, F, H, W], the VAE's convention.

    `window` = (top, left, rows, columns) draws only that part of every frame, in pixels;
    `span` = (first, count) only those frames of the clip.
    """
    device = packed.spec.device
    top, left, rows, columns = window or (0, 0, height, width)
    pixel = 2 / height
    edge = SOFTNESS * pixel
    x_W = (torch.arange(left, left + columns, device=device) + 0.5) * (2 / width) - 1
    y_H = (torch.arange(top, top + rows, device=device) + 0.5) * (2 / height) - 1
    first, count = span or (0, frame_num)
    u_F = torch.arange(first, first + count, device=device) / max(frame_num - 1, 1)
    frames = _backdrop(packed, (x_W, y_H), u_F, edge)
    for slot in (1, 0):  # the second thing is behind the first
        frames = _draw_thing(frames, packed, slot, (x_W, y_H), u_F, edge)
    return frames.permute(0, 4, 1, 2, 3) * 2 - 1
