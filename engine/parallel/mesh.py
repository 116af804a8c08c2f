"""The mesh of ranks that make one video together: g guidance branches x u sequence parts.

Rank r works on branch r // u (0 conditional, 1 unconditional; with g = 1 each rank does both) and holds
sequence part r % u. Any g of 1 or 2 and any u that divides the model's heads will do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine.attention import Attend, Overlap, Sequence, WholeSequence, sdpa
from engine.parallel.collectives import all_gather
from engine.parallel.exchange import Transport
from engine.parallel.frames import StripedFrame
from engine.parallel.symmetric import keep_multicast_off
from engine.parallel.transport import Kind, choose_transport
from engine.parallel.ulysses import UlyssesSequence
from engine.parallel.watch import Watch, watch_ranks
from engine.vae_blocks import Space, WholeFrame

TIMEOUT_SECONDS = 30.0  # until a dead or hung rank is noticed
PATIENCE_SECONDS = (
    600.0  # of collectives that rightly wait for another rank's long work; the watch sees losses
)
MEETING_SECONDS = 1800.0  # for all ranks to have loaded


@dataclass(frozen=True)
class Mesh:
    """This rank's place, and the groups it talks to."""

    rank: int = 0
    guidance: int = 1
    ulysses: int = 1
    guidance_group: dist.ProcessGroup | None = None  # the ranks with my sequence part
    ulysses_group: dist.ProcessGroup | None = None  # the ranks on my guidance branch
    control: dist.ProcessGroup | None = None  # all ranks, on the CPU: small decisions
    transport: Transport | None = None  # of attention's data over the ulysses group
    overlap: Overlap | None = None  # None: what is fastest for the layout
    watch: Watch | None = None

    @staticmethod
    def single() -> "Mesh":
        """One rank that does everything."""
        return Mesh()

    @staticmethod
    def init(
        *,
        guidance: int | None = None,
        ulysses: int | None = None,
        backend: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        init_method: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        device: torch.device | None = None,
        transport: Kind | None = None,
        overlap: Overlap | None = None,
    ) -> "Mesh":
        """Join the ranks of torch.distributed, initialising it when it isn't yet; a collective call.

        Rank and world size come from the arguments or torchrun's environment. Without `guidance` and
        `ulysses`, two ranks take a guidance branch each and up to eight work on one sequence: both measured
        faster than the other way. An even number beyond eight is split in two branches. `timeout_seconds`
        bounds how long a dead or hung rank stays unnoticed. The transport is the asked one, or
        `REEL_TRANSPORT`'s, or the fastest.
        """
        keep_multicast_off()
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        patience = timedelta(seconds=max(timeout_seconds, PATIENCE_SECONDS))
        # NCCL counts from when the host asks for a collective, which may be a long step before its turn.
        limit = timedelta(seconds=timeout_seconds) if backend == "gloo" else patience
        if not dist.is_initialized():
            dist.init_process_group(
                backend,
                init_method=init_method or "env://",
                rank=int(os.environ["RANK"]) if rank is None else rank,
                world_size=int(os.environ["WORLD_SIZE"]) if world_size is None else world_size,
                timeout=limit,
            )
        world, me = dist.get_world_size(), dist.get_rank()
        if device is None:
            on_gpu = dist.get_backend() == "nccl"
            device = torch.device("cuda", me % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # before NCCL starts
        g, u = choose_layout(world, guidance, ulysses)
        grid = torch.arange(world).view(g, u)
        own: dict[str, dist.ProcessGroup] = {}
        # Every rank must take part in making every group, its own or not.
        for kind, rows in (("ulysses", grid.tolist()), ("guidance", grid.T.tolist())):
            for ranks in rows:
                group = dist.new_group(ranks, timeout=limit)
                if me in ranks:
                    own[kind] = group
        control = dist.new_group(backend="gloo", timeout=patience)
        asked = transport or os.environ.get("REEL_TRANSPORT", "auto")
        carrier = None
        if u > 1:
            carrier = choose_transport(asked, own["ulysses"], control, device, timeout_seconds)
        watch = watch_ranks(control, timeout_seconds, device)
        return Mesh(me, g, u, own["guidance"], own["ulysses"], control, carrier, overlap, watch)

    @property
    def size(self) -> int:
        """How many ranks."""
        return self.guidance * self.ulysses

    @property
    def branch(self) -> int:
        """This rank's guidance branch: 0 conditional, 1 unconditional."""
        return self.rank // self.ulysses

    @property
    def layout(self) -> str:
        """Such as "2x4": guidance branches x sequence parts."""
        return f"{self.guidance}x{self.ulysses}"

    def sequence(self, attend: Attend = sdpa, cross_attend: Attend | None = None) -> Sequence:
        """How a transformer's tokens lie on this mesh."""
        if self.ulysses == 1 or self.ulysses_group is None:
            return WholeSequence(attend, cross_attend, self.pulse)
        # Two passes hide each other's transfers whole. One pass hides v and q under the next projections; its
        # output in two groups of heads cost more than all of its transfers.
        best = Overlap(split_qkv=False) if self.guidance == 1 else Overlap()
        return UlyssesSequence(
            self.ulysses_group, attend, cross_attend, self.transport, self.overlap or best, self.pulse
        )

    def space(self, rows: int, columns: int) -> Space:
        """How the ranks share frames of rows x columns latents in the VAE; too small ones aren't shared."""
        if self.control is None or max(rows, columns) < self.size:
            return WholeFrame()
        return StripedFrame(None, rows, columns)

    def both_branches(self, mine: Tensor) -> Tensor:
        """The predictions of both guidance branches, [2, ...], from this rank's own, [1, ...]."""
        return all_gather(mine, self.guidance_group).flatten(0, 1)

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank."""
        return bool(self.share(int(flag)))

    def anyone(self, flag: bool) -> bool:
        """Whether any rank's flag is set, on every rank."""
        if self.control is None:
            return flag
        box = torch.tensor([int(flag)])
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
        return bool(box.item())

    def share(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        if self.control is None:
            return number
        box = torch.tensor([number])
        dist.broadcast(box, src=0, group=self.control)
        return int(box.item())

    def meet(self, seconds: float = MEETING_SECONDS) -> None:
        """Wait for all ranks, longer than they may otherwise differ: after loading, which takes its time."""
        if self.control is not None:
            dist.monitored_barrier(self.control, timedelta(seconds=seconds))

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the ranks compute together; raises RankLost when one of them is lost."""
        with self.watch.working() if self.watch is not None else nullcontext():
            yield

    def beat(self) -> None:
        """This rank got on: it doesn't hang."""
        if self.watch is not None:
            self.watch.beat()

    def pulse(self) -> None:
        """The device got to here, once it does: the host may be a whole step ahead of it."""
        if self.watch is not None:
            self.watch.pulse()

    def close(self) -> None:
        """Leave torch.distributed. After a rank was lost on GPUs only the end of the process frees all."""
        if self.watch is not None:
            self.watch.close()
        if self.transport is not None:
            self.transport.close()
        lost_on_gpu = self.watch is not None and self.watch.lost and torch.cuda.is_available()
        if self.control is not None and dist.is_initialized() and not lost_on_gpu:
            dist.destroy_process_group()


def choose_layout(world: int, guidance: int | None, ulysses: int | None) -> tuple[int, int]:
    """(g, u) with g * u = world, filling in what isn't given."""
    if guidance is None:
        guidance = world // ulysses if ulysses else (2 if world % 2 == 0 and not 2 < world <= 8 else 1)
    ulysses = ulysses or world // guidance
    if guidance not in (1, 2) or guidance * ulysses != world:
        raise ValueError(
            f"a layout of {guidance}x{ulysses} doesn't fit {world} ranks: "
            "guidance must be 1 or 2 and guidance times ulysses the number of ranks"
        )
    return guidance, ulysses
