"""What a job costs: from the finished attempt to the record, the live tables and `reel bench cost`."""

import contextlib
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cost import lines, measured, parse_price, parse_video, price_of, table
from infra.commands.tables import NODE_COLUMNS, node_rows
from jobs.client import connect
from jobs.nodes import GpuUse, NodeInfo
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import redis_server
from worker.gpus import GpuMeter, parse
from worker.spent import spent
from worker.video import VideoFacts

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"encoding": 1.0, "denoising": 40.0, "decoding": 4.0, "publishing": 9.0}


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    with redis_server() as server:
        yield Settings(redis_url=server.url)


def facts(**manifest: object) -> VideoFacts:
    return VideoFacts("job_x", 64, 48, 5, 16.0, 1, "0", SECONDS, manifest)


def test_a_finished_attempt_says_what_it_used() -> None:
    """45 s on 8 GPUs; uploading holds none. A node of 36 an hour costs a hundredth a second."""
    made = facts(layout={"ranks": 8}, device="NVIDIA H200")
    assert spent(made, 36.0) == {"device": "NVIDIA H200", "gpus": 8, "gpu_seconds": 360.0, "cost": 0.45}
    assert spent(made, 0.0)["cost"] is None
    assert spent(facts(), 0.0) == {"device": "", "gpus": 1, "gpu_seconds": 45.0, "cost": None}


def finish(store: JobStore, device: str, gpu_seconds: float, cost: float | None = None) -> None:
    job, _ = store.submit(new_job())
    claimed = store.claim("tiny", "n")
    assert claimed is not None
    used = {"device": device, "gpus": 8, "gpu_seconds": gpu_seconds, "cost": cost}
    store.finish(job.id, claimed.token, result(job.id, claimed.token).model_copy(update=used))


def test_bench_cost_of_a_deployment(settings: Settings) -> None:
    """Median GPU-seconds by kind, at the prices given, else at the nodes' own."""
    store = JobStore(connect(settings), settings)
    for seconds in (340.0, 360.0, 900.0):
        finish(store, "NVIDIA H200", seconds)
    finish(store, "NVIDIA H100 80GB HBM3", 480.0, cost=0.5)
    finish(store, "cpu", 10.0)
    env = {**os.environ, "REEL_REDIS_URL": settings.redis_url}
    argv = [sys.executable, "-m", "infra.cli", "bench", "cost", "--price", "H200=3.5"]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    by_kind = {row[2]: row[3:] for row in rows}
    assert by_kind == {
        "8 x NVIDIA H200": ["3", "45.0", "360.0", "0.3500"],  # 0.1 GPU-hours at 3.5
        "8 x NVIDIA H100 80GB HBM3": ["1", "60.0", "480.0", "0.5000"],
        "8 x cpu": ["1", "1.2", "10.0", "no price"],
    }


def test_bench_cost_of_times_from_elsewhere() -> None:
    videos = [parse_video("H200 8 50"), parse_video("NVIDIA H100 8 72")]
    found = lines(videos, dict([parse_price("H100=2"), parse_price("H200=3.6")]))
    assert [(line.device, line.cost) for line in found] == [("NVIDIA H100", 0.32), ("H200", 0.4)]
    assert "| given | as measured | 8 x H200 | 1 | 50.0 | 400.0 | 0.4000 |" in table(found)
    assert price_of("NVIDIA H100 NVL", {"H100": 1.0, "H100 NVL": 2.0}) == 2.0
    assert measured([]) == []
    for wrong in ("H200", "=3", "H200=x", "H200=-1"):
        with pytest.raises(Exception, match="per GPU-hour"):
            parse_price(wrong)


def nvidia_smi(folder: Path, body: str) -> str:
    """A program that answers as the driver's would."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_gpu_load_is_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meter = GpuMeter(nvidia_smi(tmp_path, "echo '0, 97, 71234, 81559'; echo '1, 3, 10, 81559'"))
    assert meter.sample()
    assert [gpu.busy for gpu in meter.latest] == [0.97, 0.03]
    assert meter.latest[0].memory_used == 71234 << 20
    nvidia_smi(tmp_path, "echo broken >&2; exit 9")
    assert meter.sample()  # tried again later
    assert meter.latest == []
    nvidia_smi(tmp_path, "echo '[Not Supported]'")
    assert meter.sample()
    nvidia_smi(tmp_path, """case "$1" in --id=2,3) echo '2, 1, 2, 3';; *) exit 6;; esac""")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")  # only the node's own
    assert meter.sample()
    assert [gpu.index for gpu in meter.latest] == [2]
    assert not GpuMeter(str(tmp_path / "none")).sample()
    with pytest.raises(ValueError, match="utilization"):
        parse("1, 2")


def test_nodes_show_their_gpus() -> None:
    gpus = [GpuUse(index=n, busy=busy, memory_used=60, memory_total=80) for n, busy in enumerate((1.0, 0.5))]
    node = NodeInfo(
        id="n1", model="m", state="busy", job_id="job_1", seen_at=98.0, gpus=gpus, drain_requested=True
    )
    (row,) = node_rows([node, *[]], now=100.0)
    shown = dict(zip(NODE_COLUMNS, row, strict=True))
    assert (shown["gpus"], shown["memory"], shown["heard"], shown["drain"]) == (
        "75%",
        "75%",
        "2 s ago",
        "asked",
    )
    assert node_rows([NodeInfo(id="n2", model="m")], 0.0)[0][5:7] == ["", ""]  # a CPU


@pytest.mark.parametrize("what", ["jobs", "nodes"])
def test_live_views_follow_the_queue(what: str, settings: Settings) -> None:
    """In a terminal: what changes appears, and Ctrl-C ends it with 130."""
    client: Any = connect(settings)
    store = JobStore(client, settings)
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "infra.cli", what, "--watch"]
    env = {
        **os.environ,
        "REEL_REDIS_URL": settings.redis_url,
        "TERM": "xterm",
        "COLUMNS": "200",
        "LINES": "40",
    }
    process = subprocess.Popen(argv, env=env, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        read_until(ours, "Ctrl-C ends it")
        if what == "jobs":
            job, _ = store.submit(new_job())
            seen = read_until(ours, job.id)
            assert "waiting" in seen  # the queue above
        else:
            from jobs.nodes import NodeRegistry

            NodeRegistry(client).register(NodeInfo(id="node-that-came", model="tiny", state="idle"))
            read_until(ours, "node-that-came")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, words: str, seconds: float = 30.0) -> str:
    """What the terminal shows until `words` appear."""
    seen, end = "", time.monotonic() + seconds
    while words not in seen:
        assert time.monotonic() < end, f"no {words!r} in:\n{seen[-3000:]}"
        if select.select([terminal], [], [], 0.5)[0]:
            with contextlib.suppress(OSError):
                seen += os.read(terminal, 65_536).decode(errors="replace")
    return seen
