"""Dispatch latency: from a job's place in the queue to a node's claim, while nodes wait.

    python benchmarks/dispatch.py --jobs 500 --nodes 4

The nodes are processes with the node's own claim loop (claim, else sleep on the wake key); a claimed job ends
at once. Both times are Redis' own. In the same run, as the baseline: the same with polling alone, once a
second.
"""

import argparse
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.client import connect
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import redis_server

READY = "bench:ready"  # counts the nodes that are up


def node(url: str, name: str, wake: bool) -> None:
    """Claim and finish for ever, as worker.claims does without the ranks."""
    settings = Settings(redis_url=url)
    store = JobStore(connect(settings), settings)
    store.claim("tiny", name)  # loads the script
    store.redis.execute_command("INCR", READY)
    while True:
        job = store.claim("tiny", name)
        if job is not None:
            store.finish(job.id, job.token, result(job.id, job.token))
        elif wake:
            store.wait_wake("tiny", settings.poll_seconds)
        else:
            time.sleep(settings.poll_seconds)


def latencies(url: str, jobs: int, nodes: int, wake: bool) -> list[float]:
    """Milliseconds from queued to claimed of so many jobs, submitted at random moments."""
    settings = Settings(redis_url=url)
    store = JobStore(connect(settings), settings)
    store.redis.execute_command("FLUSHALL")
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=node, args=(url, f"node-{number}", wake), daemon=True)
        for number in range(nodes)
    ]
    for worker in workers:
        worker.start()
    while int(store.redis.execute_command("GET", READY) or 0) < nodes:
        time.sleep(0.05)
    ids = []
    for _ in range(jobs):
        new = new_job()
        store.submit(new)
        ids.append(new.id)
        time.sleep(random.uniform(0.0, 0.05))
    deadline = time.monotonic() + 60
    while not all(store.get(job_id).terminal for job_id in ids[-nodes * 2 :]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for worker in workers:
        worker.terminate()
        worker.join()
    found = [store.get(job_id) for job_id in ids]
    return [(job.started_at - job.queued_at) * 1000 for job in found if job.started_at is not None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--nodes", type=int, default=4)
    args = parser.parse_args()
    with redis_server("--appendonly", "yes", "--appendfsync", "everysec") as server:
        for name, jobs, wake in (("wake key", args.jobs, True), ("polling alone", args.jobs // 5, False)):
            cuts = statistics.quantiles(taken := latencies(server.url, jobs, args.nodes, wake), n=100)
            print(
                f"{name:<14} {len(taken)} jobs, {args.nodes} nodes: enqueue to claim p50 {cuts[49]:.2f} ms  "
                f"p99 {cuts[98]:.2f} ms  max {max(taken):.2f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
