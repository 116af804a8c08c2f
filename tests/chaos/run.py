"""One chaos run: start the world, load it, break it, heal it, look at what is left."""

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from engine.video import decode_video
from jobs.storage import ObjectStore
from tests.chaos.check import check
from tests.chaos.checks.case import Report, Rules
from tests.chaos.engine import frames_of
from tests.chaos.faults import Faults
from tests.chaos.history import History, read_history
from tests.chaos.load import Load
from tests.chaos.snapshot import snapshot
from tests.chaos.world import LEASE_SECONDS, MAX_ATTEMPTS, SWEEP_SECONDS, World

VIDEOS_LOOKED_AT = 40
REST_SECONDS = 12.0  # for looking, checking and stopping
# Mean seconds between two faults of a lane.
SHORT_PAUSES = {
    "nodes": 0.5,
    "ranks": 1.0,
    "frozen": 3.0,
    "roles": 3.0,
    "s3": 1.0,
    "webhooks": 1.0,
    "rest": 1.0,
}
LONG_PAUSES = {
    "nodes": 12.0,
    "ranks": 25.0,
    "frozen": 40.0,
    "roles": 25.0,
    "s3": 25.0,
    "webhooks": 25.0,
    "rest": 25.0,
}


@dataclass(frozen=True)
class Plan:
    """seconds: of load and faults. limit: seconds until which the floor of each kind may still be reached.

    total: wall seconds of the whole run, which shorten `limit` where the start took long.
    floor, least_jobs, least_faults: see Rules.
    """

    seed: int
    seconds: float
    limit: float
    settle: float
    total: float
    floor: int
    least_jobs: int = 0
    least_faults: int = 0
    enough: int = 0  # a kind that fired so often rests; 0: none does
    nodes: int = 4
    rate: float = 6.0  # jobs a second, at most
    pauses: Mapping[str, float] = field(default_factory=lambda: dict(SHORT_PAUSES))
    real_jobs: int = 0
    long_outage: float = 0.0  # seconds that Redis is unreachable, once


async def chaos(plan: Plan, folder: Path, model: Path | None) -> Report:
    """Run, check, and leave history.jsonl, final.json and report.json in `folder`."""
    history = History(folder / "history.jsonl")
    world = World(folder, history, random.Random(plan.seed), plan.nodes, model)
    began = time.monotonic()
    try:
        await world.start()
        say(f"up after {time.monotonic() - began:.0f} s")
        left = plan.total - plan.settle - REST_SECONDS - (time.monotonic() - began)
        faults, load = await _storm(plan, min(plan.limit, left), world, history)
        say(f"storm over after {time.monotonic() - began:.0f} s: {sum(history.counts.values())} faults")
        await _settle(world, plan.settle)
        await asyncio.to_thread(_look_at_videos, world, history, random.Random(plan.seed))
        say(f"settled after {time.monotonic() - began:.0f} s")
        client = redis.Redis.from_url(world.settings().redis_url, decode_responses=True)
        final = await asyncio.to_thread(snapshot, client, world.settings(), world.runs)
        await load.close()
    finally:
        history.close()
        world.close()
    (folder / "final.json").write_text(json.dumps(final))
    rules = Rules(
        LEASE_SECONDS, SWEEP_SECONDS, MAX_ATTEMPTS, plan.floor, tuple(faults.kinds),
        least_jobs=plan.least_jobs, least_faults=plan.least_faults,
    )  # fmt: skip
    report = check(read_history(folder / "history.jsonl"), final, rules)
    (folder / "report.json").write_text(json.dumps(_plain(report), indent=2))
    say(f"checked after {time.monotonic() - began:.0f} s")
    return report


async def _storm(plan: Plan, limit: float, world: World, history: History) -> tuple[Faults, Load]:
    """Load and faults together, until the time is over and every kind has fired often enough."""
    load = Load(world, history, random.Random(plan.seed + 1), plan.rate, plan.real_jobs)
    faults = Faults(world, load, history, random.Random(plan.seed + 2))
    began = time.monotonic()
    loading = asyncio.create_task(load.run(plan.seconds))
    breaking = asyncio.create_task(faults.run(plan.pauses, plan.enough))
    outage = False
    told = 0.0
    while True:
        passed = time.monotonic() - began
        if passed > limit or (passed > plan.seconds and not faults.short(plan.floor)):
            break
        if plan.long_outage and not outage and passed > plan.seconds / 2:
            outage = True
            await faults.roles.redis_away(plan.long_outage)
        if passed - told > 60:
            told = passed
            say(f"{passed:.0f} s: {len(load.accepted)} jobs accepted, {sum(history.counts.values())} faults")
        await asyncio.sleep(0.2)
    faults.stop()
    load.stopped = True
    await asyncio.wait({breaking}, timeout=10)
    breaking.cancel()
    await asyncio.gather(breaking, return_exceptions=True)
    world.heal()
    await asyncio.wait({loading}, timeout=20)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    return faults, load


async def _settle(world: World, seconds: float) -> None:
    """Let the healed service come to rest; replay part of the dead letter on the way."""
    end = time.monotonic() + seconds
    replayed = False
    client = redis.Redis.from_url(world.settings().redis_url, decode_responses=True)
    while time.monotonic() < end:
        waiting = sum(row.waiting + row.running for row in world.store.queue_stats())
        outbox = int(client.zcard("reel:outbox"))
        if not waiting and not replayed:
            replayed = True
            for job_id in client.zrange("reel:dead", 0, 4):
                world.store.replay(str(job_id))
        elif not waiting and not outbox:
            return
        await asyncio.sleep(0.3)
    world.history.add("note", what="not at rest", waiting=waiting, outbox=outbox)


def _look_at_videos(world: World, history: History, rng: random.Random) -> None:
    """Decode some committed videos: do they show their own job's frames?"""
    store = ObjectStore(world.settings())
    jobs = [job for job in world.store.list("*", limit=400)[0] if job.result and job.request.model == "chaos"]
    for job in rng.sample(jobs, min(VIDEOS_LOOKED_AT, len(jobs))):
        assert job.result is not None
        path = world.folder / "look.mp4"
        store.get_file(job.result.video_key, path)
        _, frames = decode_video(path)
        wanted = frames_of(job.request.seed)
        right = frames.shape == wanted.shape and abs(frames.astype(int) - wanted.astype(int)).mean() < 8
        history.add("note", what="video", job=job.id, right=bool(right))


def _plain(report: Report) -> dict[str, Any]:
    return {
        "violations": report.violations,
        "faults": dict(sorted(report.faults.items())),
        "states": dict(report.states),
        "figures": report.figures,
    }


def say(text: str) -> None:
    """One line for whoever watches."""
    print(f"chaos: {text}", flush=True)
