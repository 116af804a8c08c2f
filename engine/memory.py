"""What a GPU must hold, added up before anything is loaded, on each rung of a ladder of less memory.

The rungs, best first. Every rung makes the same video; each costs time, so the first that fits is taken,
and which one and why goes to the log:

1. `resident`: text encoder, experts and VAE all stay on the GPU.
2. `branches`: the conditional and the unconditional pass one after another instead of as one batch
   (only where one rank makes both).
3. `text`: the text encoder on the CPU of rank 0, which sends its embeddings to the others.
4. `shard`: the experts' blocks spread over the ranks (torch FSDP2), gathered one ahead of their use.
5. `host`: with one rank, one expert in pinned host memory; the two change places block by block while the
   last step before the boundary is computed.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from engine.config import ModelSpec
from engine.dit import stays_fp32
from engine.footprint import decoding_bytes, denoising_bytes, encoding_bytes
from engine.images import size_by_area
from engine.parallel.frames import best_axis, stripes
from engine.parallel.mesh import Mesh
from engine.parallel.push import LANES, REGIONS
from engine.pinned import pinned_bytes
from engine.preset_memory import preset_rows
from engine.rope import TABLES
from engine.weights import Entry

GIB = 2**30
Rung = Literal["resident", "branches", "text", "shard", "host"]
RUNGS: tuple[Rung, ...] = ("resident", "branches", "text", "shard", "host")
WORDS: dict[Rung, str] = {
    "resident": "everything resident",
    "branches": "guidance branches one after another",
    "text": "text encoder on the CPU",
    "shard": "experts sharded over the ranks (FSDP2)",
    "host": "one expert in pinned host memory, exchanged at the boundary",
}
LIBRARIES = GIB  # cuBLAS, cuDNN and attention workspaces, compiled kernels, the allocator's rounding
NCCL = GIB // 2  # NCCL's own buffers, with more than one rank
GATHERED_BLOCKS = 3  # a sharded expert's blocks at once: in use, on its way, and its copy out of the gather
HALO = 1  # latents more than a rank's stripe of the VAE's frames: a pixel on each side where memory peaks
PACKED = re.compile(r"(?<=\.self_attn\.)[qkv]\.(weight|bias)$")
BOUNCE = 64 << 20  # bytes on the device through which two experts change places


@dataclass(frozen=True)
class Sizes:
    """Bytes of each part's weights on a device."""

    text: int
    block: int  # one block of an expert
    block_whole: int  # of it, what is too small to be sharded
    blocks: int  # how many an expert has
    rest: int  # an expert beside its blocks
    experts: int
    vae: int
    pinned: int = 0  # one expert's blocks in pinned host memory
    held: int = 0  # how many of an expert's blocks are held in 8 bits alone (--weights 8bit)
    held_block: int = 0  # one of them

    @property
    def expert(self) -> int:
        """One whole expert."""
        return (self.blocks - self.held) * self.block + self.held * self.held_block + self.rest


@dataclass(frozen=True)
class MemoryPlan:
    """One rung's table. Bytes of one GPU (the fullest: rank 0's), and of the host's memory."""

    title: str
    rung: Rung
    rows: tuple[tuple[str, int], ...]  # what is there all the time
    phases: tuple[tuple[str, int], ...]  # of these only the largest counts
    host: int  # pinned or ordinary host memory of this rank that the rung takes
    available: int
    host_available: int

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return sum(size for _, size in self.rows) + max(size for _, size in self.phases)

    @property
    def gib(self) -> float:
        """The total in GiB."""
        return self.total / GIB

    @property
    def words(self) -> str:
        """The rung in words."""
        return WORDS[self.rung]

    @property
    def step(self) -> int:
        """How far down the ladder the rung is."""
        return RUNGS.index(self.rung)

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.total <= self.available and self.host <= self.host_available

    def table(self) -> str:
        """For the log: one line a row, GiB."""
        largest = max(size for _, size in self.phases)
        lines = [(name, size, "") for name, size in self.rows]
        lines += [(name, size, "" if size == largest else "(not counted)") for name, size in self.phases]
        lines += [("total", self.total, ""), ("available", self.available, "")]
        if self.host:
            lines += [("host memory", self.host, f"of {self.host_available / GIB:.2f}")]
        width = max(len(name) for name, *_ in lines)
        body = [f"  {name:{width}}  {size / GIB:9.3f} GiB  {note}".rstrip() for name, size, note in lines]
        return "\n".join((f"{self.title}: {self.words}", *body))


def is_sharded(name: str) -> bool:
    """Whether a block's tensor is spread over the ranks on the rung `shard`: the matrices are."""
    return name.endswith(".weight") and "norm" not in name


def sizes_of(
    experts: Sequence[dict[str, Entry]], text: Iterable[Entry], vae: Iterable[Entry],
    dtype: torch.dtype, vae_dtype: torch.dtype,
) -> Sizes:  # fmt: skip
    """The parts' sizes once cast, from what the files' headers say."""
    block = block_whole = rest = blocks = 0
    tensors: dict[str, int] = {}  # a block's, q, k and v packed
    for name, entry in experts[0].items():
        size = entry.count * (4 if stays_fp32(name) else dtype.itemsize)
        if not name.startswith("blocks."):
            rest += size
            continue
        blocks = max(blocks, int(name.split(".")[1]) + 1)
        if name.startswith("blocks.0."):
            block += size
            packed = PACKED.sub(r"qkv.\1", name)
            tensors[packed] = tensors.get(packed, 0) + size
            block_whole += 0 if is_sharded(name) else size
    return Sizes(
        text=sum(entry.count for entry in text) * dtype.itemsize,
        block=block,
        block_whole=block_whole,
        blocks=blocks,
        rest=rest,
        experts=len(experts),
        pinned=pinned_bytes([list(tensors.values())] * blocks),
        vae=sum(entry.count for entry in vae) * vae_dtype.itemsize,
    )


def make_plan(
    spec: ModelSpec,
    sizes: Sizes,
    mesh: Mesh,
    rung: Rung,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    *,
    on_gpu: bool,
    available: int,
    host_available: int,
) -> MemoryPlan:
    """One rung's table for the largest request that the model allows."""
    step = RUNGS.index(rung)
    both = mesh.guidance == 1
    rows_at_once = 2 if both and step < RUNGS.index("branches") else 1
    text_on_cpu = step >= RUNGS.index("text")
    kv = 2 * spec.dit.text_len * spec.dit.dim * dtype.itemsize * sizes.blocks * (2 if both else 1)
    expert_rows, host = _experts(sizes, mesh, rung)
    rows = [
        ("text encoder", 0 if text_on_cpu else sizes.text),
        *expert_rows,
        ("VAE", sizes.vae),
        ("text keys and values (of one expert at a time)", kv),
        ("communication buffers", _communication(spec, mesh, rows_at_once, dtype, on_gpu)),
        ("positions of the last shapes", _positions(spec)),
        ("libraries' workspace", LIBRARIES if on_gpu else 0),
        *preset_rows(spec, local_tokens(spec, mesh), 2 if both else 1, rows_at_once, dtype),
    ]
    if text_on_cpu and mesh.rank == 0:
        host += sizes.text
    size, grid = largest(spec)
    title = (
        f"memory of {spec.name}, rank {mesh.rank} of {mesh.size} (layout {mesh.layout}), "
        f"up to {size[0]}*{size[1]} x {spec.max_frame_num} frames"
    )
    phases = _phases(spec, grid, mesh, rows_at_once, dtype, vae_dtype)
    if sizes.held:  # one block at a time is whole, and beside it what is made of it
        phases.append(("a block on its way to 8 bits, loading", sizes.block + sizes.held_block))
    return MemoryPlan(title, rung, tuple(rows), tuple(phases), host, available, host_available)


def _experts(sizes: Sizes, mesh: Mesh, rung: Rung) -> tuple[list[tuple[str, int]], int]:
    """Rows of the experts, and bytes in host memory."""
    names = ("high-noise expert", "low-noise expert")[: sizes.experts] if sizes.experts > 1 else ("expert",)
    if rung == "shard":
        sharded = sizes.block - sizes.block_whole
        part = sizes.blocks * (sizes.block_whole + math.ceil(sharded / mesh.size)) + sizes.rest
        gathered = GATHERED_BLOCKS * sharded
        return [*((f"{name}, 1/{mesh.size}", part) for name in names), ("gathered blocks", gathered)], 0
    if rung == "host":
        rows = [("one expert's blocks", sizes.blocks * sizes.block), ("exchange buffer", BOUNCE)]
        return [*rows, ("the experts' other weights", 2 * sizes.rest)], sizes.pinned
    note = f", {sizes.held} of {sizes.blocks} blocks in 8 bits" if sizes.held else ""
    return [(name + note, sizes.expert) for name in names], 0


def _communication(spec: ModelSpec, mesh: Mesh, rows: int, dtype: torch.dtype, on_gpu: bool) -> int:
    """What the larger of the two transports takes, and NCCL's own on a GPU.

    By collectives: received q, k and v, the sent and the received output of all rows. By pushing: the
    regions of the window, which stay, each of one row's tokens.
    """
    if mesh.size == 1:
        return 0
    tensors = max(5 * rows, LANES * len(REGIONS)) if mesh.ulysses > 1 else 0
    exchanged = tensors * local_tokens(spec, mesh) * spec.dit.dim * dtype.itemsize
    return exchanged + (NCCL if on_gpu else 0)


def _positions(spec: ModelSpec) -> int:
    """The RoPE tables of whole sequences that every rank keeps."""
    return TABLES * _tokens(spec) * spec.dit.head_dim * torch.float32.itemsize


def _tokens(spec: ModelSpec) -> int:
    """Tokens of the largest request."""
    return math.prod(largest(spec)[1]) // math.prod(spec.dit.patch_size)


def local_tokens(spec: ModelSpec, mesh: Mesh) -> int:
    """Tokens of a rank in the largest request, padding included."""
    return math.ceil(_tokens(spec) / mesh.ulysses)


def _phases(
    spec: ModelSpec, grid: tuple[int, int, int], mesh: Mesh, rows: int, dtype: torch.dtype, vae: torch.dtype
) -> list[tuple[str, int]]:
    sets = 2 if spec.task == "ti2v" else 1
    part = (grid[0], *stripe(grid[1], grid[2], mesh))
    phases = [
        ("activations, denoising", denoising_bytes(spec.dit, local_tokens(spec, mesh), rows, dtype, sets)),
        ("activations, decoding", decoding_bytes(spec.vae, part, vae)),
    ]
    if spec.task != "t2v":
        frames = grid[0] if spec.task == "i2v" else 1
        phases.append(("activations, image encoding", encoding_bytes(spec.vae, (frames, *part[1:]), vae)))
    return phases


def stripe(rows: int, columns: int, mesh: Mesh) -> tuple[int, int]:
    """Rows and columns of a rank's share of the latents in the VAE: the widest, and its halo."""
    if mesh.size == 1 or max(rows, columns) < mesh.size:
        return rows, columns
    if best_axis(rows, columns, mesh.size) == -1:
        return rows, min(stripes(columns, mesh.size)[0] + HALO, columns)
    return min(stripes(rows, mesh.size)[0] + HALO, rows), columns


def largest(spec: ModelSpec) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """(width, height) of the largest request that is allowed, and its latents' frames, rows, columns."""
    stride_t, stride_h, stride_w = spec.vae.stride
    size = max(spec.sizes, key=lambda s: s[0] * s[1])
    if spec.task == "i2v":  # the image decides the aspect: of common ones the largest counts
        area = size[0] * size[1]
        aspects = [(4, 3), (3, 4), (1, 1), (16, 9), (3, 2), size]
        sizes = [size_by_area(aspect, area, stride_h, spec.dit.patch_size[1]) for aspect in aspects]
        size = max(sizes, key=lambda s: s[0] * s[1])
    return size, ((spec.max_frame_num - 1) // stride_t + 1, size[1] // stride_h, size[0] // stride_w)
