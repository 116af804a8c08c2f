"""What the parallel benchmark runs: one step of the transformer in a layout, by a transport, with an overlap.

A layout is real when the machine has its ranks. An "8-GPU share" runs on two: each computes what one of the
layout's ranks would (its rows, its heads over the whole sequence) and sends its peer all that it would send
to the other ranks. Such a step's values mean nothing; its time is that of a rank whose peers share one link.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks._variants import CONFIGS, GRIDS
from engine import fused
from engine.attention import Overlap, Sequence, WholeSequence, pick_attend
from engine.config import DiTConfig
from engine.dit import DiT
from engine.parallel.collective import CollectiveTransport
from engine.parallel.exchange import Transport
from engine.parallel.mesh import Mesh
from engine.parallel.push import PushTransport, Route
from engine.parallel.shared import SharedWindow
from engine.parallel.symmetric import SymmetricWindow
from engine.parallel.ulysses import UlyssesSequence

TINY = DiTConfig(dim=128, ffn_dim=256, num_heads=8, num_layers=4, text_dim=64, text_len=16, freq_dim=32)
MODELS = CONFIGS | {"tiny": TINY}
TOKENS = GRIDS | {("tiny", "720p"): (3, 5, 8)}
TIMEOUT_SECONDS = 300.0  # steps of one GPU are long, and queued ahead
PLAIN = Overlap(split_qkv=False, head_groups=1, interleave=False)


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    layout: str  # "1x8": guidance branches x sequence parts
    transport: str = "none"  # push, collective, off (nothing sent or awaited) or none (one sequence part)
    overlap: Overlap = PLAIN
    share: bool = False

    @property
    def guidance(self) -> int:
        """Branches that are computed side by side."""
        return int(self.layout.split("x")[0])

    @property
    def parts(self) -> int:
        """Of the sequence."""
        return int(self.layout.split("x")[1])

    @property
    def name(self) -> str:
        """For the table."""
        switches = [
            word
            for word, on in {
                "split qkv": self.overlap.split_qkv,
                "two head groups": self.overlap.head_groups == 2,
                "interleaved": self.overlap.interleave,
            }.items()
            if on
        ]
        how = (
            "" if self.transport == "none" else f", {self.transport}, {' + '.join(switches) or 'no overlap'}"
        )
        return f"{'share of ' if self.share else ''}{self.layout}{how}"


def contestants(world: int) -> list[Contestant]:
    """What `world` GPUs can run, the most wanted first."""
    one_pass = Overlap(split_qkv=True, head_groups=2, interleave=False)
    split = replace(one_pass, head_groups=1)
    turns = Overlap(split_qkv=False, head_groups=1, interleave=True)
    rows = [Contestant("1x1")]
    if world == 2:
        rows += [Contestant("1x2", t, turns) for t in ("push", "off")] + [Contestant("2x1")]
        rows += [Contestant("1x8", t, turns, True) for t in ("push", "off")]
        rows += [Contestant("2x4", t, one_pass, True) for t in ("push", "off")]
        rows += [Contestant("1x8", t, PLAIN, True) for t in ("collective", "push", "off")]
        rows += [Contestant("1x2", "collective", PLAIN), Contestant("1x8", "collective", turns, True)]
        rows += [Contestant("2x4", t, o, True) for t, o in (("push", split), ("off", split))]
        rows += [Contestant("2x4", "collective", PLAIN, True), Contestant("1x8", "push", one_pass, True)]
        rows += [Contestant("1x8", "push", replace(turns, split_qkv=True), True)]
    elif world == 1:
        rows += [Contestant("1x8", "off", turns, True), Contestant("2x4", "off", one_pass, True)]
    else:
        layouts = [f"1x{world}"] + ([f"2x{world // 2}"] if world % 2 == 0 else [])
        for layout in layouts:
            best = turns if layout.startswith("1x") else one_pass
            rows += [Contestant(layout, t, best) for t in ("push", "off")]
            rows += [Contestant(layout, t, PLAIN) for t in ("push", "collective")]
    return rows


class ShareSequence(UlyssesSequence):
    """One of `parts` ranks of which two exist: the first and the last of the sequence."""

    def __init__(self, group: dist.ProcessGroup | None, parts: int, *rest: object) -> None:
        super().__init__(group, *rest)  # type: ignore[arg-type]
        self.ranks, self.rank = parts, 0 if self.rank == 0 else parts - 1

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """My part and zeros: the whole would come from ranks that don't exist."""
        shape = list(x.shape)
        shape[dim] *= self.ranks
        whole = x.new_zeros(shape)
        whole.narrow(dim, 0, x.shape[dim]).copy_(x)
        return whole.narrow(dim, 0, length)


class Bench:
    """The model with random weights, and the meshes and transports that were made so far."""

    def __init__(self, model: str, size: str, blocks: int, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)  # the same weights and inputs on all ranks
        self.device, self.world = device, dist.get_world_size()
        self.config, self.grid = MODELS[model], TOKENS[model, size]
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = random_model(self.config, blocks, device, self.dtype)
        self.set_grid(self.grid)
        text = torch.randn(2, self.config.text_len, self.config.text_dim, device=device, dtype=self.dtype)
        self.texts = self.model.encode_text(text)
        kinds = ("self", "cross")
        self.attend, self.cross = (
            pick_attend(kind, self.dtype, self.config.head_dim, device) for kind in kinds
        )
        self._meshes: dict[str, Mesh] = {}
        self._transports: dict[tuple[str, bool, bool], Transport] = {}

    def set_grid(self, grid: tuple[int, int, int]) -> None:
        """Latents for a grid of tokens."""
        frames, rows, columns = grid
        generator = torch.Generator().manual_seed(1)
        shape = (1, self.config.in_channels, frames, 2 * rows, 2 * columns)
        self.latents = torch.randn(shape, generator=generator).to(self.device)

    def mesh(self, layout: str) -> Mesh:
        """The groups of a real layout; a collective call when new."""
        if layout not in self._meshes:
            guidance, parts = map(int, layout.split("x"))
            self._meshes[layout] = Mesh.init(
                guidance=guidance,
                ulysses=parts,
                transport="collective",
                device=self.device,
                timeout_seconds=TIMEOUT_SECONDS,
            )
        return self._meshes[layout]

    def transport(self, one: Contestant) -> Transport:
        """The transport of a contestant; a collective call when new."""
        key = (one.layout, one.share, one.transport == "collective")
        if key not in self._transports:
            group = None if one.share else self.mesh(one.layout).ulysses_group
            self._transports[key] = self._make(one, group)
        return self._transports[key]

    def _make(self, one: Contestant, group: dist.ProcessGroup | None) -> Transport:
        group = group or dist.group.WORLD
        assert group is not None
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        route = share_route(rank, one.parts) if one.share else Route.straight(rank, ranks)
        if one.transport == "collective":
            mine = [one.parts - 1, one.parts - 1]
            mine[rank if one.share else 0] = 1
            return CollectiveTransport(group, mine if one.share else None)
        window = (
            SymmetricWindow(group, self.device)
            if self.device.type == "cuda"
            else SharedWindow(group, timeout_seconds=60)
        )
        return PushTransport(window, route, "push")

    def sequence(self, one: Contestant) -> Sequence:
        """How a contestant's tokens lie."""
        if one.parts == 1:
            return WholeSequence(self.attend, self.cross)
        transport = self.transport(one)
        group = dist.group.WORLD if one.share else self.mesh(one.layout).ulysses_group
        assert group is not None
        rest = (self.attend, self.cross, transport, one.overlap)
        return ShareSequence(group, one.parts, *rest) if one.share else UlyssesSequence(group, *rest)

    def step(self, one: Contestant) -> Callable[[], Tensor]:
        """One guided prediction, as the pipeline makes it: [C, F, H, W]."""
        sequence = self.sequence(one)
        branch = slice(0, 2)
        if one.guidance == 2:
            rank = dist.get_rank() // one.parts if not one.share else 0
            branch = slice(rank, rank + 1)
        texts = [(k[branch], v[branch]) for k, v in self.texts[: len(self.model.blocks)]]
        timesteps = torch.tensor([[500]], device=self.device)
        transport = self.transport(one) if one.parts > 1 else None

        def step() -> Tensor:
            if isinstance(transport, PushTransport):  # shared with the step that sends nothing
                transport.silent = one.transport == "off"
            with fused_blocks(self.device):
                flow = self.model(self.latents, timesteps, texts, sequence)
            if one.guidance == 2:
                flow = flow.repeat(2, 1, 1, 1, 1) if one.share else self.mesh(one.layout).both_branches(flow)
            return flow[1] + 4.0 * (flow[0] - flow[1])

        return step

    def exact(self) -> Tensor:
        """The step's prediction by the plain blocks in fp32 on this rank."""
        model = copy.deepcopy(self.model).float()
        timesteps = torch.tensor([[500]], device=self.device)
        texts = [(k.float(), v.float()) for k, v in self.texts]
        flow = model(self.latents, timesteps, texts[: len(model.blocks)], WholeSequence())
        return flow[1] + 4.0 * (flow[0] - flow[1])

    def close(self) -> None:
        """Give back windows and watches."""
        for transport in self._transports.values():
            transport.close()
        for mesh in self._meshes.values():
            if mesh.watch is not None:
                mesh.watch.close()


def share_route(rank: int, parts: int) -> Route:
    """Rank 0 is the first of `parts` ranks, rank 1 the last; all that others would get goes to the peer."""
    if rank == 0:
        return Route(0, 0, ((0, 0), *((1, piece - 1) for piece in range(1, parts))))
    return Route(1, parts - 1, (*((0, piece + 1) for piece in range(parts - 1)), (1, parts - 1)))


def random_model(config: DiTConfig, blocks: int, device: torch.device, dtype: torch.dtype) -> DiT:
    """`blocks` blocks that share one block's random weights, which are far more than the caches hold."""
    with torch.device(device):
        model = DiT(replace(config, num_layers=1))
        nn.init.normal_(model.head.head.weight, std=0.02)
        block = model.blocks[0]
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.to(dtype)
        for layer in model.text_embedding:
            layer.to(dtype)
    model.blocks = nn.ModuleList([block] * blocks)
    return model.requires_grad_(False).eval()


@contextmanager
def fused_blocks(device: torch.device) -> Iterator[None]:
    """On a CPU, for rehearsal, run the blocks that GPUs run."""
    if device.type == "cuda":
        yield
    else:
        with mock.patch.object(fused, "applies", return_value=True):
            yield
