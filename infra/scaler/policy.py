"""The scaling decision as a pure function: what is seen in, what to do and why out.

    desired = ceil((waiting + running) x seconds per job / target wait)

By Little's law (J. D. C. Little, "A Proof for the Queuing Formula L = lambda W", 1961) a fleet that satisfies
it keeps the average time in the system, waiting included, at the target. It is clamped by the pool's limits;
the rest of this file keeps the fleet from flapping and says why it did what it did.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

LONGEST_BACKOFF = 1800.0  # seconds between launches, however long the clouds have had nothing to sell


class MachineState(StrEnum):
    """What a machine is to the scaler."""

    STARTING = "starting"  # ordered; its node has not reported yet
    SERVING = "serving"  # its node claims jobs
    DRAINING = "draining"  # told to claim no more; a job may still run on it
    DRAINED = "drained"  # told so, and its node has ended: it can go
    SILENT = "silent"  # it has served, but its node does not report; gone after `silent_seconds`
    GONE = "gone"  # the cloud took it


@dataclass(frozen=True)
class Machine:
    """One machine of a pool.

    managed: made by this scaler; others count as capacity but are never touched. since: Unix seconds of its
    order.
    """

    name: str
    state: MachineState
    busy: bool = False
    since: float = 0.0
    price: float = 0.0  # per hour
    managed: bool = True


@dataclass(frozen=True)
class Policy:
    """What one model's fleet may be. Times in seconds, money in one currency."""

    target_wait: float  # from submit to the finished video, on average; more than a job's own seconds
    min_nodes: int = 0
    max_nodes: int = 10
    price_per_hour: float = 0.0  # what one more node is expected to cost
    budget_per_hour: float | None = None  # all managed machines together; wins over min_nodes
    job_seconds: float = 120.0  # used until jobs have been measured
    add_cooldown: float = 60.0  # between two orders
    max_add: int = 10  # machines in one order
    remove_window: float = 600.0  # a node goes only when none was wanted for so long
    boot_seconds: float = 1200.0  # a machine without a node after that is given up
    silent_seconds: float = 180.0  # longer than a restart of Redis or of a node's cluster takes
    stock_out_backoff: float = 60.0  # after a failed order; doubles up to LONGEST_BACKOFF

    def __post_init__(self) -> None:
        _require(self.target_wait > 0, "target_wait", self.target_wait, "more than 0 seconds")
        _require(self.min_nodes >= 0, "min_nodes", self.min_nodes, "0 or more")
        _require(self.min_nodes <= self.max_nodes, "max_nodes", self.max_nodes, f"{self.min_nodes} or more")
        _require(self.job_seconds > 0, "job_seconds", self.job_seconds, "more than 0 seconds")
        _require(self.max_add > 0, "max_add", self.max_add, "1 or more")
        _require(self.price_per_hour >= 0, "price_per_hour", self.price_per_hour, "0 or more")
        if self.budget_per_hour is not None:
            _require(
                self.price_per_hour > 0,
                "price_per_hour",
                self.price_per_hour,
                "a price, as there is a budget",
            )


def _require(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {got}, expected {expected}")


@dataclass(frozen=True)
class Seen:
    """One look at a model's queue and machines. job_seconds: measured on its recent jobs; None: none yet."""

    now: float
    waiting: int
    running: int
    job_seconds: float | None
    machines: tuple[Machine, ...]


@dataclass(frozen=True)
class Memory:
    """What a decision must remember; stored in Redis, so a restarted scaler goes on where it was."""

    added_at: float | None = None  # the last order
    wanted: tuple[
        tuple[float, int], ...
    ] = ()  # (time, nodes wanted): falling peaks of the last remove_window
    failed_orders: int = 0  # in a row
    no_orders_until: float = 0.0
    orders: tuple[tuple[str, float], ...] = ()  # (name, time) of machines that have not served yet
    drains: tuple[tuple[str, float], ...] = ()  # (name, time) of machines told to drain
    silent: tuple[tuple[str, float], ...] = ()  # (name, time) of machines whose node stopped reporting
    served: tuple[str, ...] = ()  # machines whose node has been seen


@dataclass(frozen=True)
class Decision:
    """What to do now. desired: by load alone; target: after the limits."""

    desired: int
    target: int
    capacity: int  # machines that serve or will
    add: int
    drain: tuple[str, ...]
    remove: tuple[str, ...]
    reasons: tuple[str, ...]
    memory: Memory


def nodes_for(jobs: int, job_seconds: float, target_wait: float) -> int:
    """The formula, without limits."""
    return math.ceil(jobs * job_seconds / target_wait)


def decide(policy: Policy, seen: Seen, memory: Memory) -> Decision:
    """What one model's pool should do now. Same arguments, same answer; nothing else is read or changed."""
    reasons: list[str] = []
    desired = _desired(policy, seen, reasons)
    silent = _silent_since(seen, memory)
    remove, failed = _ended(policy, seen, silent, reasons)
    machines = tuple(machine for machine in seen.machines if machine.name not in remove)
    target, most = _limit(policy, machines, desired, reasons)
    usable = [m for m in machines if not _leaving(m)]
    memory = _remember(policy, seen, remove, replace(memory, silent=silent), target)
    if failed:  # one pass, one step of back-off, however many machines did not come up
        memory, text = order_failed(policy, memory, seen.now, "no node came")
        reasons.append(text)
    add, drain = 0, ()  # type: tuple[int, tuple[str, ...]]
    if target > len(usable):
        add = _order(policy, seen.now, memory, machines, target - len(usable), reasons)
    elif len(usable) > target:
        drain = _surplus(policy, memory, usable, most, reasons)
    elif not remove:
        reasons.append(f"{len(usable)} nodes are right")
    if add:
        memory = replace(memory, added_at=seen.now)
    return Decision(desired, target, len(usable), add, drain, remove, tuple(reasons), memory)


def order_failed(policy: Policy, memory: Memory, now: float, why: str) -> tuple[Memory, str]:
    """The memory after an order that brought no machine, and why the next one waits longer."""
    pause = min(LONGEST_BACKOFF, policy.stock_out_backoff * 2.0 ** min(memory.failed_orders, 16))
    later = replace(memory, failed_orders=memory.failed_orders + 1, no_orders_until=now + pause)
    return later, f"order failed ({why}): the next one in {pause:.0f} s"


def _desired(policy: Policy, seen: Seen, reasons: list[str]) -> int:
    seconds = seen.job_seconds or policy.job_seconds
    jobs = seen.waiting + seen.running
    desired = nodes_for(jobs, seconds, policy.target_wait)
    kind = "measured" if seen.job_seconds else "assumed"
    reasons.append(
        f"({seen.waiting} waiting + {seen.running} running) x {seconds:.1f} s ({kind})"
        f" / {policy.target_wait:.0f} s -> {desired} nodes"
    )
    return desired


def _silent_since(seen: Seen, memory: Memory) -> tuple[tuple[str, float], ...]:
    before = dict(memory.silent)
    silent = [machine.name for machine in seen.machines if machine.state is MachineState.SILENT]
    return tuple((name, before.get(name, seen.now)) for name in silent)


def _ended(
    policy: Policy, seen: Seen, silent: tuple[tuple[str, float], ...], reasons: list[str]
) -> tuple[tuple[str, ...], int]:
    """Machines to take away now, and how many of them are orders that came to nothing."""
    remove: list[str] = []
    failed = 0
    lost = {name for name, since in silent if seen.now - since > policy.silent_seconds}
    for machine in (m for m in seen.machines if m.managed):
        if machine.state is MachineState.DRAINED:
            reasons.append(f"{machine.name}: drained, remove it")
        elif machine.state is MachineState.GONE:
            reasons.append(f"{machine.name}: lost, clean up after it")
        elif machine.name in lost:
            reasons.append(f"{machine.name}: silent for {policy.silent_seconds:.0f} s, taken for lost")
        elif machine.state is MachineState.STARTING and seen.now - machine.since > policy.boot_seconds:
            reasons.append(f"{machine.name}: no node after {policy.boot_seconds:.0f} s, give it up")
            failed += 1
        else:
            continue
        remove.append(machine.name)
    return tuple(remove), failed


def _limit(
    policy: Policy, machines: tuple[Machine, ...], desired: int, reasons: list[str]
) -> tuple[int, int]:
    """The wish within the limits, and the most that they allow at all."""
    target = max(policy.min_nodes, min(policy.max_nodes, desired))
    if target > desired:
        reasons.append(f"raised to {target}: min_nodes")
    elif target < desired:
        reasons.append(f"cut to {target}: max_nodes")
    affordable = _affordable(policy, machines)
    if affordable is None:
        return target, policy.max_nodes
    if target > affordable:
        target = affordable
        reasons.append(f"cut to {target}: {policy.budget_per_hour:g} an hour buys no more")
    return target, min(policy.max_nodes, affordable)


def _affordable(policy: Policy, machines: tuple[Machine, ...]) -> int | None:
    """How many nodes the budget allows: the free ones, the cheapest of today's, and new ones from what is
    left.

    A draining machine costs until it is gone, so its money can't be spent twice.
    """
    if policy.budget_per_hour is None:
        return None
    left = policy.budget_per_hour - sum(m.price for m in machines if m.managed and _leaving(m))
    count = 0
    for machine in sorted(
        (m for m in machines if not _leaving(m)), key=lambda m: m.price if m.managed else 0.0
    ):
        price = machine.price if machine.managed else 0.0
        if price > left + 1e-9:
            return count
        left -= price
        count += 1
    return count + max(0, math.floor(left / policy.price_per_hour + 1e-9))


def _leaving(machine: Machine) -> bool:
    return machine.state in (MachineState.DRAINING, MachineState.DRAINED, MachineState.GONE)


def _remember(policy: Policy, seen: Seen, remove: tuple[str, ...], memory: Memory, target: int) -> Memory:
    """Drop what no longer matters: wishes outside the window or below a later one, and machines that are
    gone.

    Drains and silences stay until the machine is off the list: its removal may fail.
    """
    cut = seen.now - policy.remove_window
    peaks = tuple((at, count) for at, count in memory.wanted if at > cut and count > target)
    states = {machine.name: machine.state for machine in seen.machines if machine.managed}
    serving = {name for name, state in states.items() if state is MachineState.SERVING}
    starting = {name for name, state in states.items() if state is MachineState.STARTING} - set(remove)
    later = replace(
        memory,
        wanted=(*peaks, (seen.now, target)),
        orders=tuple((n, at) for n, at in memory.orders if n in starting),
        drains=tuple((n, at) for n, at in memory.drains if n in states),
        served=tuple(sorted(serving | (set(memory.served) & set(states)))),
    )
    if serving - set(memory.served):
        later = replace(later, failed_orders=0, no_orders_until=0.0)
    return later


def _order(
    policy: Policy,
    now: float,
    memory: Memory,
    machines: tuple[Machine, ...],
    missing: int,
    reasons: list[str],
) -> int:
    if now < memory.no_orders_until:
        reasons.append(
            f"{missing} missing, but the last order failed: next one in {memory.no_orders_until - now:.0f} s"
        )
        return 0
    if memory.added_at is not None and now - memory.added_at < policy.add_cooldown:
        left = policy.add_cooldown - (now - memory.added_at)
        reasons.append(f"{missing} missing, but the last order was just now: next one in {left:.0f} s")
        return 0
    room = policy.max_nodes - sum(machine.managed for machine in machines)
    count = max(0, min(missing, policy.max_add, room))
    if count < missing:
        reasons.append(
            f"{missing} missing: order {count} (max_add {policy.max_add}, room for {max(0, room)})"
        )
    else:
        reasons.append(f"{missing} missing: order {count}")
    return count


def _surplus(
    policy: Policy, memory: Memory, usable: list[Machine], most: int, reasons: list[str]
) -> tuple[str, ...]:
    """Who drains: down to the most that was wanted within the window, the cheapest loss first."""
    keep = min(most, max(count for _, count in memory.wanted))
    own = [machine for machine in usable if machine.managed]
    count = min(len(own), len(usable) - keep)
    if count <= 0:
        reasons.append(
            f"{len(usable)} nodes, {keep} were wanted within {policy.remove_window:.0f} s: keep them"
            if keep >= len(usable)
            else f"{len(usable)} nodes, {keep} wanted, but none of them is this scaler's"
        )
        return ()
    # A machine that still starts loses nothing; then the idle; then those that cost the most; then the
    # youngest.
    order = sorted(
        own, key=lambda m: (m.state is not MachineState.STARTING, m.busy, -m.price, -m.since, m.name)
    )
    reasons.append(f"{len(usable)} nodes, {keep} wanted for {policy.remove_window:.0f} s: drain {count}")
    return tuple(machine.name for machine in order[:count])
