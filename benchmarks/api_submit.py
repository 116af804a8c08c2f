"""What a submit through the API costs, against bare FastAPI + Redis and against `celery.delay` + Redis.

    python benchmarks/api_submit.py --jobs 2000 --waiting 0

All on this machine in one run, in rounds that take turns, so that a busy neighbour hits all alike. One API
process and one Redis with AOF; the load generator runs beside them on the same cores. `--waiting 100000`
fills the queue first: the last line compares with the empty queue.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from celery import Celery

from benchmarks._http_load import load
from infra.ports import PortBlock
from jobs.client import connect
from jobs.keys import KeyStore
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from tests.support.jobs import card, new_job
from tests.support.redis import redis_server
from tests.support.s3 import s3_server

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 4
MANY = 10_000_000


class Figures:
    """Latencies (ms) and rates of one thing over the rounds."""

    def __init__(self, name: str) -> None:
        self.name, self.taken, self.rates = name, list[float](), list[float]()

    def add(self, taken: list[float], seconds: float) -> None:
        """One round."""
        self.taken += taken
        self.rates.append(len(taken) / seconds)

    @property
    def cuts(self) -> tuple[float, float]:
        """p50, p99."""
        parts = statistics.quantiles(self.taken, n=100)
        return parts[49], parts[98]

    def __str__(self) -> str:
        p50, p99 = self.cuts
        rate = statistics.median(self.rates)
        return f"{self.name:<42} p50 {p50:7.2f} ms  p99 {p99:7.2f} ms  {rate:6.0f}/s"


@contextlib.contextmanager
def server(argv: list[str], env: dict[str, str], port: int) -> Iterator[None]:
    """A server process that answers on `port`."""
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/docs", timeout=1).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError(f"{argv} does not answer") from None
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(20)


def bodies(count: int) -> list[bytes]:
    """Request bodies as a client sends them."""
    fields = {"prompt": "a red ball rolls over a table", "model": "tiny", "metadata": {"ref": "bench"}}
    return [json.dumps({**fields, "seed": seed}).encode() for seed in range(count)]


def nothing(body: dict[str, object]) -> None:
    """The task; no worker runs here, only its message is sent."""


def delays(app: Celery, count: int) -> tuple[list[float], float]:
    """`delay` of a task that does nothing, one after the other, from one process."""
    task = app.tasks["bench.nothing"]
    taken, began = [], time.perf_counter()
    for seed in range(count):
        start = time.perf_counter()
        task.delay({"prompt": "a red ball rolls over a table", "seed": seed})
        taken.append((time.perf_counter() - start) * 1000)
    return taken, time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000, help="submits of each kind at each concurrency")
    parser.add_argument("--waiting", type=int, default=0, help="jobs already in the queue")
    args = parser.parse_args()
    block = PortBlock.claim()
    with redis_server("--appendonly", "yes", "--appendfsync", "everysec") as redis, s3_server() as s3:
        env = {
            "REEL_REDIS_URL": redis.url,
            "REEL_S3_ENDPOINT": s3.endpoint,
            "REEL_S3_ACCESS_KEY": s3.access_key,
            "REEL_S3_SECRET_KEY": s3.secret_key,
            "REEL_SECRET_KEY": secrets.token_hex(16),
            "REEL_API_PORT": str(block.ports[0]),
            "REEL_RATE_LIMIT": str(MANY),
            "REEL_MAX_QUEUED": str(MANY),
            "REEL_MAX_OUTSTANDING_PER_KEY": str(MANY),
            "REEL_LOG_LEVEL": "WARNING",
        }
        settings = Settings.model_validate({name[5:].lower(): value for name, value in env.items()})
        ObjectStore(settings).ensure_bucket()
        client = connect(settings)
        NodeRegistry(client).publish_model(card())
        _, key, _ = KeyStore(client, env["REEL_SECRET_KEY"]).create("bench")
        celery = Celery("bench", broker=f"redis+socket://{redis.socket}", set_as_current=False)
        celery.conf.task_ignore_result = True
        celery.task(name="bench.nothing", shared=False)(nothing)
        whole = {**os.environ, **env, "PYTHONPATH": str(ROOT)}
        api = [sys.executable, "-m", "infra.cli", "api"]
        bare = [
            sys.executable, "-m", "uvicorn", "benchmarks._bare_app:app", "--port", str(block.ports[1]),
            "--no-access-log", "--log-level", "error",
        ]  # fmt: skip
        with server(api, whole, block.ports[0]), server(bare, whole, block.ports[1]):
            measure(args.jobs, args.waiting, block.ports, key, celery, JobStore(client, settings))
    block.release()


def measure(jobs: int, waiting: int, ports: list[int], key: str, celery: Celery, store: JobStore) -> None:
    """All rounds, then the table."""
    auth = f"Authorization: Bearer {key}\r\n"
    figures: dict[str, Figures] = {}

    def rounds(label: str, share: int) -> None:
        for _ in range(ROUNDS):
            for clients in (1, 16):
                for name, port, path, headers in (
                    (f"API submit{label}, {clients} at once", ports[0], "/v1/jobs", auth),
                    (f"bare FastAPI + Redis{label}, {clients} at once", ports[1], "/", ""),
                ):
                    done = asyncio.run(load(port, path, bodies(share), headers, clients))
                    figures.setdefault(name, Figures(name)).add(*done)
            name = f"celery.delay + Redis{label}, 1 at once"
            figures.setdefault(name, Figures(name)).add(*delays(celery, share))

    asyncio.run(load(ports[0], "/v1/jobs", bodies(200), auth, 4))  # warm
    asyncio.run(load(ports[1], "/", bodies(200), "", 4))
    rounds("", jobs // ROUNDS)
    if waiting:
        for number in range(waiting):
            store.submit(new_job(f"key_{number % 757}"))
        rounds(f", {waiting} waiting", jobs // ROUNDS)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {jobs} requests a line")
    for one in figures.values():
        print(one)
    for clients in (1, 16):
        ours, bare = (
            figures[f"API submit, {clients} at once"],
            figures[f"bare FastAPI + Redis, {clients} at once"],
        )
        ratio = statistics.median(bare.rates) / statistics.median(ours.rates)
        p50 = ours.cuts[0] / bare.cuts[0]
        print(f"API submit against bare, {clients} at once: p50 {p50:.2f} x, 1/rate {ratio:.2f} x")
    ours, delay = figures["API submit, 1 at once"], figures["celery.delay + Redis, 1 at once"]
    print(f"API submit against celery.delay: p50 {ours.cuts[0] / delay.cuts[0]:.2f} x")
    if waiting:
        full = figures[f"API submit, {waiting} waiting, 1 at once"]
        print(
            f"API submit p99, {waiting} waiting against an empty queue: {full.cuts[1] / ours.cuts[1]:.2f} x"
        )


if __name__ == "__main__":
    main()
