"""How many nodes and jobs one Redis carries, from measured figures, and what breaks first beyond that.

    python -m benchmarks.capacity                       # measure, and plan 10, 1,000 and 10,000 nodes
    python -m benchmarks.capacity --docs docs           # and write the tables into docs/operations.md

Starts its own redis-server with the append-only file on, as in production, and runs whole jobs through the
real store, one call at a time. Counted is what Redis itself says: CPU time of its process, bytes in and out,
growth of the append-only file and of the memory in use. A plan multiplies; nothing is measured at that size.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.client import connect
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import redis_server

BEGIN, END = "<!-- capacity: begin -->", "<!-- capacity: end -->"
DAY = 86_400
HEARTBEATS = 2.0  # a second and running job (worker/reporter.py)
BEATS = 1.0  # a second and node (worker/node.py)
READS = 10.0  # of a job by its customer, while it lives: polls or one stream's reads
CORE = 0.7  # of Redis' one core that may be used
MEMORY = 48 * 2**30  # bytes of one Redis; a fork for a rewrite needs as much again at worst
DISK = 200e6  # bytes a second of append-only file


@dataclass(frozen=True)
class Cost:
    """One call: microseconds of Redis' CPU, bytes over the wire, bytes of append-only file."""

    micros: float
    wire: float
    disk: float


@dataclass(frozen=True)
class Measured:
    """What one run said. waiting, ended: bytes of memory a job."""

    redis: str
    jobs: int
    costs: dict[str, Cost]
    waiting: float
    ended: float


@dataclass(frozen=True)
class Plan:
    """A fleet's demand on Redis. Each share is of one Redis's limit; shards: how many Redises that makes."""

    nodes: int
    days: float  # for which ended jobs are kept
    jobs_a_day: float
    core: float
    memory: float
    disk: float
    wire: float  # bytes a second
    uploads: float  # bytes a second, to S3
    first: str  # what breaks first
    shards: int


def measure(jobs: int, settle: float = 1.2) -> Measured:
    """Run `jobs` whole jobs of 50 keys and read Redis' own counters.

    settle: seconds until the append-only file has what was written; a write waits for an fsync under way.
    """
    with redis_server("--appendonly", "yes", "--appendfsync", "everysec") as server:
        settings = Settings(redis_url=server.url, lease_seconds=3600)
        client: Any = connect(settings)
        store, registry = JobStore(client, settings), NodeRegistry(client)
        news = [new_job(f"key_{n % 50}") for n in range(jobs)]
        held: list[tuple[str, int]] = []

        def claim(_: int) -> None:
            job = store.claim("tiny", "n")
            assert job is not None
            held.append((job.id, job.token))

        def beat(n: int) -> None:
            store.heartbeat(*held[n], phase="denoising", step=n % 40, progress=(n % 40) / 40)

        registry.register(NodeInfo(id="n", model="tiny"))
        empty = _used(client)
        costs = {"submit": _cost(client, lambda n: store.submit(news[n]), jobs, settle)}
        waiting = (_used(client) - empty) / jobs
        costs["claim"] = _cost(client, claim, jobs, settle)
        costs["heartbeat"] = _cost(client, beat, jobs, settle)
        costs["node beat"] = _cost(client, lambda n: registry.beat("n", "busy", held[n][0]), jobs, settle)
        costs["read"] = _cost(client, lambda n: store.get(held[n][0]), jobs, settle)
        costs["finish"] = _cost(client, lambda n: store.finish(*held[n], result(*held[n])), jobs, settle)
        ended = (_used(client) - empty) / jobs
        version = str(client.execute_command("INFO", "server")["redis_version"])
        return Measured(version, jobs, costs, waiting, ended)


def _cost(client: Any, call: Callable[[int], object], count: int, settle: float) -> Cost:
    call(0)  # loads the script; it is not counted
    time.sleep(settle)
    before = _counters(client)
    for n in range(1, count):
        call(n)
    time.sleep(settle)
    cpu, wire, disk = (now - then for now, then in zip(_counters(client), before, strict=True))
    return Cost(cpu * 1e6 / (count - 1), wire / (count - 1), disk / (count - 1))


def _counters(client: Any) -> tuple[float, float, float]:
    """CPU seconds of the server's process, bytes over the wire, bytes of append-only file, so far."""
    info = client.execute_command("INFO")
    cpu = float(info["used_cpu_user"]) + float(info["used_cpu_sys"])
    wire = info["total_net_input_bytes"] + info["total_net_output_bytes"]
    return cpu, float(wire), float(info["aof_current_size"])


def _used(client: Any) -> int:
    return int(client.execute_command("INFO", "memory")["used_memory"])


def plan(found: Measured, nodes: int, seconds: float, days: float, video: float) -> Plan:
    """`nodes` always busy with jobs of `seconds`, kept so many `days` after their end; `video`: bytes."""
    rate = nodes / seconds  # jobs a second
    calls = {"submit": rate, "claim": rate, "finish": rate, "read": READS * rate,
             "heartbeat": HEARTBEATS * nodes, "node beat": BEATS * nodes}  # fmt: skip
    total = {
        field: sum(calls[name] * getattr(cost, field) for name, cost in found.costs.items())
        for field in ("micros", "wire", "disk")
    }
    memory = rate * days * DAY * found.ended + 200_000 * found.waiting
    shares = {
        "Redis' core": total["micros"] / 1e6 / CORE,
        "memory of ended jobs": memory / MEMORY,
        "the append-only file": total["disk"] / DISK,
    }
    first = max(shares, key=lambda name: shares[name])
    core, kept, disk = shares.values()
    return Plan(
        nodes,
        days,
        rate * DAY,
        core,
        kept,
        disk,
        total["wire"],
        rate * video,
        first,
        math.ceil(shares[first]),
    )


def tables(found: Measured, plans: list[Plan], seconds: float, video: float) -> str:
    """Markdown."""
    lines = [
        f"Measured on Redis {found.redis} with its append-only file, {found.jobs:,} jobs of 50 keys:",
        "",
        "| call | microseconds of CPU | bytes on the wire | bytes of append-only file |",
        "|---|---|---|---|",
        *(f"| {name} | {c.micros:.0f} | {c.wire:,.0f} | {c.disk:,.0f} |" for name, c in found.costs.items()),
        "",
        f"Memory: {found.waiting / 1000:.1f} KB a waiting job, {found.ended / 1000:.1f} KB an ended one.",
        "",
        f"Nodes always busy, {seconds:g} s a job, {video / 1e6:g} MB a video; shares of "
        f"one Redis at {CORE:.0%} of a core, {MEMORY / 2**30:.0f} GiB and {DISK / 1e6:.0f} MB/s of disk:",
        "",
        "| nodes | kept, days | jobs a day | core | memory | disk | network | S3 | first limit | Redises |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {p.nodes:,} | {p.days:g} | {p.jobs_a_day:,.0f} | {p.core:.0%} | {p.memory:.0%} "
            f"| {p.disk:.0%} | {p.wire / 1e6:,.1f} MB/s | {p.uploads / 1e6:,.1f} MB/s "
            f"| {p.first} | {p.shards} |"
            for p in plans
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def write(docs: Path, text: str, kept: dict[str, Any]) -> None:
    """The tables into operations.md, the figures beside the simulation's."""
    page = docs / "operations.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    (docs / "simulation" / "capacity.json").write_text(json.dumps(kept, indent=1) + "\n")


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=3000, help="to measure with")
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--seconds", type=float, default=78.0, help="a job's own, on one node")
    parser.add_argument("--days", type=float, nargs="+", default=[7.0, 0.5], help="ended jobs are kept")
    parser.add_argument("--video-mb", type=float, default=4.0)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    found, video = measure(args.jobs), args.video_mb * 1e6
    plans = [plan(found, nodes, args.seconds, days, video) for nodes in args.nodes for days in args.days]
    text = tables(found, plans, args.seconds, video)
    print(text)
    if args.docs is not None:
        asked = {name: getattr(args, name) for name in ("seconds", "days", "nodes")} | {"video": video}
        write(args.docs, text, {"asked": asked, "measured": asdict(found)})


if __name__ == "__main__":
    main()
