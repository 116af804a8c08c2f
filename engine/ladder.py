"""Which rung of `engine.memory`'s ladder a model is loaded on: the first that fits on every rank."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import ModelSpec
from engine.errors import CheckpointError
from engine.layout import Layout
from engine.memory import GIB, MemoryPlan, Rung, local_tokens, make_plan, sizes_of
from engine.parallel.mesh import Mesh
from engine.preset_memory import held_block_bytes, kept_attention_bytes, without_kept_attention

log = logging.getLogger(__name__)
MOVING: tuple[Rung, ...] = ("shard", "host")  # rungs on which blocks come and go


class DoesNotFit(CheckpointError):
    """The model needs more memory than there is, on every rung; `tables` tell what for."""

    def __init__(self, message: str, tables: str) -> None:
        super().__init__(message)
        self.tables = tables


def plan_memory(
    spec: ModelSpec,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    limit: int | None = None,
    rung: Rung | None = None,
    held: Collection[int] = (),
) -> MemoryPlan:
    """The memory plan of the first rung that fits, in the log; a collective call. Raises DoesNotFit.

    Blocks that are `held` in 8 bits alone stay on the device: such a model knows fewer rungs.
    """
    experts = [part.entries for part in (layout.high, layout.low) if part is not None]
    sizes = sizes_of(experts, layout.text.entries.values(), layout.vae.entries.values(), dtype, vae_dtype)
    if held:
        size = held_block_bytes(sizes.block, spec.dit, dtype)
        sizes = replace(sizes, held=len(held), held_block=size)
    on_gpu = device.type == "cuda"
    available, host = free_memory(device, mesh.size)
    if limit is not None:
        available = min(available, limit)

    def plan_of(rung: Rung) -> MemoryPlan:
        return make_plan(
            spec, sizes, mesh, rung, dtype, vae_dtype, on_gpu=on_gpu, available=available, host_available=host
        )

    rungs = [rung] if rung is not None else allowed(mesh, len(experts), on_gpu)
    if held:
        rungs = [rung for rung in rungs if rung not in MOVING]
        if not rungs:
            raise CheckpointError(f"8-bit weights alone don't go with the rung {rung!r}, which moves blocks")
    try:
        plan, passed = choose(plan_of, rungs, smallest(mesh))
    except DoesNotFit as error:
        log.error("%s", error.tables)
        raise
    log.info("%s", plan.table())
    if passed:
        log.warning(
            "memory: %s, since %s would take %.1f GiB of the %.1f GiB that are free: videos are the same, "
            "and slower", plan.words, passed[0].words, passed[0].gib, available / GIB,
        )  # fmt: skip
    return plan


def plan_kept_attention(
    spec: ModelSpec, plan: MemoryPlan, mesh: Mesh, dtype: torch.dtype
) -> tuple[ModelSpec, MemoryPlan]:
    """Both with room for the presets' kept self-attention, or with those presets refused; a collective call.

    It never moves a model to a lower rung: that would slow down every video for the sake of some.
    """
    size = kept_attention_bytes(spec, local_tokens(spec, mesh), 2 if mesh.guidance == 1 else 1, dtype)
    if not size:
        return spec, plan
    with_it = replace(plan, rows=(*plan.rows, ("self-attention kept from step to step", size)))
    if smallest(mesh)(int(with_it.fits)):
        log.info("memory: %.2f GiB more for self-attention kept from step to step", size / GIB)
        return spec, with_it
    reason = f"its attention cache takes {size / GIB:.3f} GiB of each GPU, more than the model leaves free"
    log.warning("memory: presets that keep self-attention are refused: %s", reason)
    return without_kept_attention(spec, reason), plan


def allowed(mesh: Mesh, experts: int, on_gpu: bool) -> list[Rung]:
    """The rungs that can be, best first. A CPU has nothing to move off it."""
    if not on_gpu:
        return ["resident", "branches"] if mesh.guidance == 1 else ["resident"]
    rungs: list[Rung] = ["resident"]
    if mesh.guidance == 1:
        rungs.append("branches")
    rungs.append("text")
    if mesh.size > 1:
        rungs.append("shard")
    elif experts > 1:
        rungs.append("host")
    return rungs


def choose(
    plan_of: Callable[[Rung], MemoryPlan], rungs: Sequence[Rung], agree: Callable[[int], int]
) -> tuple[MemoryPlan, list[MemoryPlan]]:
    """(the plan of the first rung that fits on every rank, the plans passed over).

    `agree` gives the ranks' smallest number. Raises DoesNotFit with the first and the smallest table.
    """
    passed: list[MemoryPlan] = []
    for rung in rungs:
        plan = plan_of(rung)
        if agree(int(plan.fits)):
            return plan, passed
        passed.append(plan)
    least = min(passed, key=lambda plan: plan.total)
    raise DoesNotFit(
        f"{passed[0].title}: takes {passed[0].gib:.3f} GiB, at the least {least.gib:.3f} GiB "
        f"({least.words}), and {least.available / GIB:.3f} GiB are free"
        + (f" (of host memory {least.host_available / GIB:.3f})" if least.host else "")
        + ": use GPUs with more memory, more of them, or allow smaller requests (sizes and max_frame_num in "
        "reel.json)",
        tables="\n".join(plan.table() for plan in dict.fromkeys((passed[0], least))),
    )


def smallest(mesh: Mesh) -> Callable[[int], int]:
    """A number's minimum over the mesh's ranks."""

    def agree(number: int) -> int:
        if mesh.control is None:
            return number
        box = torch.tensor([number])
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=mesh.control)
        return int(box.item())

    return agree


def free_memory(device: torch.device, ranks: int) -> tuple[int, int]:
    """(bytes free on the device, this rank's share of the host's free memory)."""
    host = _free_host_memory() // ranks
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host), host


def _free_host_memory() -> int:
    """MemAvailable, within the container's limit where there is one; a huge number where nothing says."""
    found = [2**60]
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        # What the page cache holds counts as used there, and goes when it is needed.
        cached = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        found.append(int(limit.read_text()) - int(used.read_text()) + int(cached.get("inactive_file", 0)))
    return max(min(found), 0)
