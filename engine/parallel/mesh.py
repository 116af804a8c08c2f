"""The mesh of ranks that make one video together: g guidance branches x u sequence parts.

Rank r works on branch r // u (0 conditional, 1 unconditional; with g = 1 each rank does both) and holds
sequence part r % u. Any g of 1 or 2 and any u that divides the model's heads will do.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine.attention import Attend, Sequence, WholeSequence, sdpa
from engine.parallel.collectives import all_gather
from engine.parallel.ulysses import UlyssesSequence


@dataclass(frozen=True)
class Mesh:
    """This rank's place, and the groups it talks to."""

    rank: int = 0
    guidance: int = 1
    ulysses: int = 1
    guidance_group: dist.ProcessGroup | None = None  # the ranks with my sequence part
    ulysses_group: dist.ProcessGroup | None = None  # the ranks on my guidance branch
    control: dist.ProcessGroup | None = None  # all ranks, on the CPU: small decisions

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
        timeout_seconds: float = 600.0,
    ) -> "Mesh":
        """Join the ranks of torch.distributed, initialising it when it isn't yet; a collective call.

        Rank and world size come from the arguments or torchrun's environment. Without `guidance` and
        `ulysses`, an even number of ranks is split in two guidance branches, which measured faster than one
        sequence over all; an odd number works on one sequence.
        """
        if not dist.is_initialized():
            dist.init_process_group(
                backend or ("nccl" if torch.cuda.is_available() else "gloo"),
                init_method=init_method or "env://",
                rank=int(os.environ["RANK"]) if rank is None else rank,
                world_size=int(os.environ["WORLD_SIZE"]) if world_size is None else world_size,
                timeout=timedelta(seconds=timeout_seconds),
            )
        world = dist.get_world_size()
        g, u = choose_layout(world, guidance, ulysses)
        grid = torch.arange(world).view(g, u)
        me = dist.get_rank()
        own: dict[str, dist.ProcessGroup] = {}
        # Every rank must take part in making every group, its own or not.
        for kind, rows in (("ulysses", grid.tolist()), ("guidance", grid.T.tolist())):
            for ranks in rows:
                group = dist.new_group(ranks)
                if me in ranks:
                    own[kind] = group
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return Mesh(me, g, u, own["guidance"], own["ulysses"], control)

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
            return WholeSequence(attend, cross_attend)
        return UlyssesSequence(self.ulysses_group, attend, cross_attend)

    def both_branches(self, mine: Tensor) -> Tensor:
        """The predictions of both guidance branches, [2, ...], from this rank's own, [1, ...]."""
        return all_gather(mine, self.guidance_group).flatten(0, 1)

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank."""
        return bool(self.share(int(flag)))

    def share(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        if self.control is None:
            return number
        box = torch.tensor([number])
        dist.broadcast(box, src=0, group=self.control)
        return int(box.item())

    def close(self) -> None:
        """Leave torch.distributed."""
        if self.control is not None and dist.is_initialized():
            dist.destroy_process_group()


def choose_layout(world: int, guidance: int | None, ulysses: int | None) -> tuple[int, int]:
    """(g, u) with g * u = world, filling in what isn't given."""
    if guidance is None:
        guidance = world // ulysses if ulysses else (2 if world % 2 == 0 else 1)
    ulysses = ulysses or world // guidance
    if guidance not in (1, 2) or guidance * ulysses != world:
        raise ValueError(
            f"a layout of {guidance}x{ulysses} doesn't fit {world} ranks: "
            "guidance must be 1 or 2 and guidance times ulysses the number of ranks"
        )
    return guidance, ulysses
