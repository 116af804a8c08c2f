"""Which transport this machine can use: the first that passes a trial on all ranks, named in the log."""

import logging
from typing import Literal, get_args

import torch
import torch.distributed as dist

from engine.attention import QKV
from engine.parallel.collective import CollectiveTransport
from engine.parallel.exchange import Traffic, Transport
from engine.parallel.push import PushTransport, Route
from engine.parallel.shared import SharedWindow
from engine.parallel.symmetric import SymmetricWindow
from kernels.qk_norm_rope import SendLayout

Kind = Literal["auto", "symmetric", "shared", "collective"]  # "auto": the fastest that works
KINDS: tuple[str, ...] = get_args(Kind)
QV: tuple[QKV, ...] = ("q", "v")
TRIAL_SECONDS = 10
log = logging.getLogger(__name__)


def best(device: torch.device) -> Kind:
    """What is tried first: a push that takes no SM on GPUs, gloo on CPUs."""
    return "symmetric" if device.type == "cuda" else "collective"


def make_transport(kind: str, group: dist.ProcessGroup, device: torch.device, timeout: float) -> Transport:
    """A transport of this kind over the group's ranks; "auto" needs `choose_transport`."""
    route = Route.straight(dist.get_rank(group), dist.get_world_size(group))
    if kind == "symmetric":
        return PushTransport(SymmetricWindow(group, device), route, "symmetric memory, by copy engines")
    if kind == "shared":
        return PushTransport(SharedWindow(group, timeout), route, "shared memory of one host")
    return CollectiveTransport(group)


def choose_transport(
    kind: str,
    group: dist.ProcessGroup,
    control: dist.ProcessGroup | None,
    device: torch.device,
    timeout: float = 30.0,
) -> Transport:
    """The asked transport, or for "auto" the fastest that works on every rank; a collective call.

    `control` is a group of all ranks on the CPU. Raises RuntimeError when the asked one doesn't work.
    """
    if kind not in KINDS:
        raise ValueError(f"no transport is called {kind!r}; there are {', '.join(KINDS)}")
    wanted = best(device) if kind == "auto" else kind
    transport = make_transport(wanted, group, device, timeout)
    problem = "" if wanted == "collective" else _trial(transport, device)
    everywhere = torch.tensor([int(not problem)])
    dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=control)
    if not everywhere.item():
        why = problem or "it fails on another rank"
        if kind != "auto":
            raise RuntimeError(f"the transport {transport.name} doesn't work here: {why}")
        log.warning("transport %s passed over: %s", transport.name, why)
        transport.close()
        transport = make_transport("collective", group, device, timeout)
    log.info("attention's transport over %d ranks: %s", transport.ranks, transport.name)
    return transport


def _trial(transport: Transport, device: torch.device) -> str:
    """Why a small exchange gives wrong values or fails, or "" when it works."""
    rank, ranks = transport.rank, transport.ranks
    layout = SendLayout.of(2 * ranks, ranks, 2)
    traffic = Traffic(1, 3, layout, 16, torch.float32, device)
    whole = torch.arange(3.0 * ranks * 2 * ranks * 16, device=device).view(1, 3 * ranks, 2 * ranks, 16)
    mine = whole[:, 3 * rank : 3 * rank + 3]
    try:
        exchange = transport.exchange(traffic, 0)
        exchange.send("v", mine, packed=False)
        exchange.send("q", layout.pack(mine), packed=True)
        received = [[exchange.receive(name, group).clone() for name in QV] for group in range(2)]
        for group, (q, _) in enumerate(received):
            exchange.send_back(group, q)
        back = [exchange.receive_back(group).clone() for group in range(2)]
        window = getattr(transport, "window", None)
        if isinstance(window, SymmetricWindow) and not window.settled(TRIAL_SECONDS):
            return f"nothing arrived within {TRIAL_SECONDS} s"
    except Exception as failure:  # any driver may refuse in any way: the next transport is the remedy
        return f"{type(failure).__name__}: {failure}"
    for group in range(2):
        heads = whole[:, :, [layout.first(group) + rank]]
        if not all(torch.equal(x, heads) for x in received[group]):
            return "what was sent arrived changed"
        if not torch.equal(back[group], mine.flatten(2)[:, :, traffic.columns(group)]):
            return "the output came back changed"
    return ""
