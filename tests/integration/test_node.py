"""A real node: Ray, two gloo ranks, the tiny checkpoint, Redis, S3. The tests share it and run in order."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from engine.tiny import make_tiny
from engine.video import decode_video
from jobs.client import connect
from jobs.ids import new_id
from jobs.job import FailureClass, Job, JobState, NewJob
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from tests.support.jobs import video_request
from tests.support.node import NodeProcess, running_node, until
from tests.support.proxy import Proxy
from tests.support.redis import redis_server
from tests.support.s3 import s3_server

SLOW = {"size": "96*64", "frame_num": 17, "sampling_steps": 250}  # some seconds of small steps
pytestmark = pytest.mark.timeout(150)


@dataclass
class World:
    """Everything around the node."""

    settings: Settings
    store: JobStore
    storage: ObjectStore
    registry: NodeRegistry
    s3: Proxy
    model: Path
    folder: Path

    def submit(self, **fields: object) -> str:
        """A job in the queue."""
        request = video_request(**{"model": "tiny-t2v", "frame_num": 9, **fields})
        job, _ = self.store.submit(NewJob(id=new_id("job"), key_id="key_a", request=request))
        return job.id

    def ended(self, job_id: str, seconds: float = 60) -> Job:
        """The job when it has ended."""

        def probe() -> Job | None:
            job = self.store.get(job_id)
            return job if job.terminal else None

        return until(probe, seconds, f"the end of {job_id}")

    def at_step(self, job_id: str, step: int) -> Job:
        """The job when it is that far."""

        def probe() -> Job | None:
            job = self.store.get(job_id)
            assert not job.terminal, job
            return job if job.phase == "denoising" and job.step >= step else None

        return until(probe, 60, f"step {step} of {job_id}")

    def frames(self, job: Job) -> np.ndarray:
        """The committed video's decoded frames."""
        assert job.result is not None, job
        path = self.folder / f"{job.id}.mp4"
        self.storage.get_file(job.result.video_key, path)
        return decode_video(path)[1]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="reel-test-"))
    with redis_server() as redis, s3_server() as s3:
        host, port = s3.endpoint.removeprefix("http://").split(":")
        proxy = Proxy((host, int(port)))
        settings = Settings(
            redis_url=redis.url,
            s3_endpoint=f"http://127.0.0.1:{proxy.port}",
            s3_access_key=s3.access_key,
            s3_secret_key=s3.secret_key,
            node_ranks=2,
            node_id="node-a",
            lease_seconds=4.0,
            poll_seconds=0.2,
            drain_seconds=1.0,
            step_timeout_seconds=12.0,
            data_dir=folder / "data",
        )
        ObjectStore(settings).ensure_bucket()  # Celery's part
        client = connect(settings)
        yield World(
            settings, JobStore(client, settings), ObjectStore(settings), NodeRegistry(client), proxy,
            make_tiny(folder / "tiny"), folder,
        )  # fmt: skip
        proxy.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def node(world: World) -> Iterator[NodeProcess]:
    with running_node(world.settings, world.model, world.folder / "node.log") as running:
        began = time.monotonic()
        until(lambda: [n for n in world.registry.list() if n.state == "idle"], 120, "the node")
        print(f"node up after {time.monotonic() - began:.1f} s")
        yield running
        print(running.text()[-6000:])


def test_a_job_runs_from_queue_to_s3(world: World, node: NodeProcess) -> None:
    card = world.registry.models()[0]
    assert (card.name, card.default_size) == ("tiny-t2v", "64*48")
    job = world.ended(world.submit(prompt="a cat walks on the grass"))
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    frames = world.frames(job)
    assert frames.shape == (9, 48, 64, 3)
    assert (job.result.frames, job.result.width, job.result.height, job.result.fps) == (9, 64, 48, 8.0)
    keys = world.storage.list_keys(f"jobs/{job.id}/")
    assert keys == sorted([job.result.video_key, job.result.poster_key, job.result.manifest_key])
    manifest = json.loads(world.storage.get_bytes(job.result.manifest_key))
    assert manifest["request"]["prompt"] == "a cat walks on the grass"
    assert manifest["layout"]["ranks"] == 2
    assert set(manifest["seconds"]) == {"encoding", "denoising", "decoding"}
    assert manifest["versions"]["torch"]
    assert world.storage.get_bytes(job.result.poster_key)[:2] == b"\xff\xd8"


def test_a_node_that_was_forgotten_announces_its_model_again(world: World, node: NodeProcess) -> None:
    """Silent for a minute, its model may have been withdrawn."""
    (found,) = world.registry.list()
    world.registry.remove(found.id)
    assert world.registry.retire_model(found.model) == []
    until(lambda: [card.name for card in world.registry.models()] == [found.model], 10, "the card")
    assert [one.id for one in world.registry.list()] == [found.id]


def test_ray_serves_nobody_but_its_own_node(world: World, node: NodeProcess) -> None:
    """No dashboard; a job posted over HTTP runs nowhere; the control plane takes the node's token alone."""
    listening = [
        (process, connection.laddr)
        for process in node.family()
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    heads = node.find("dashboard/dashboard.py")  # Ray keeps a part of it running, without a web server
    assert [address for process, address in listening if process in heads and address.ip != "127.0.0.1"] == []
    marker = world.folder / "ray-job-ran"
    asked = []
    for _, (host, port) in listening:
        assert port not in (8265, 10_001), "the dashboard's and the client server's"
        where = host if host not in ("::", "0.0.0.0") else "127.0.0.1"
        paths = ("/api/jobs/", "/api/job_agent/jobs/", "/get_or_create_runtime_env")
        asked += [(where, port, path) for path in paths]
    with ThreadPoolExecutor(len(asked)) as pool:  # what speaks no HTTP answers by a timeout
        statuses = list(pool.map(lambda one: post_ray_job(*one, marker), asked))
    taken = [one for one, status in zip(asked, statuses, strict=True) if status in range(200, 300)]
    assert taken == []
    (gcs,) = node.find("gcs_server")
    port = next(address.port for process, address in listening if process == gcs)
    token = gcs.environ()["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    tries = (("token", token), ("token", "f" * 64), ("disabled", ""))
    answers = [ask_gcs(port, mode, key) for mode, key in tries]
    assert "b'CLUSTER_METADATA'" in answers[0], answers[0]
    for refused in answers[1:]:
        assert "CLUSTER_METADATA" not in refused
        assert "token" in refused, refused
    assert not marker.exists()


def post_ray_job(host: str, port: int, path: str, marker: Path) -> int | None:
    """The status of an unauthenticated POST to Ray's jobs API; None when it is not HTTP that answers."""
    body = {"entrypoint": f"touch {marker}", "submission_id": "mine", "runtime_env": {}}
    try:
        return httpx.post(f"http://{host}:{port}{path}", json=body, timeout=3, trust_env=False).status_code
    except httpx.HTTPError:
        return None


def ask_gcs(port: int, mode: str, token: str) -> str:
    """What another process with this token reads from the cluster's control plane, or why not."""
    code = (
        "from ray._raylet import GcsClient; "
        f"print(GcsClient(address='127.0.0.1:{port}').internal_kv_keys(b'', namespace=None, timeout=10))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_ranks_hardly_wait_between_two_jobs(world: World, node: NodeProcess) -> None:
    jobs = [world.ended(one) for one in [world.submit(seed=n) for n in range(5)]]
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}
    gaps = [
        float(line.split("ranks idle for ")[1].split()[0])
        for line in node.text().splitlines()
        if "ranks idle for" in line
    ]
    print(f"idle gaps between jobs, seconds: {sorted(gaps)}")
    assert len(gaps) >= 3
    assert sorted(gaps)[len(gaps) // 2] < 0.3  # 0.5 % of a 60 s job


def test_a_request_that_the_model_refuses_fails_once_and_leaves_the_ranks_alone(
    world: World, node: NodeProcess
) -> None:
    before = {p.pid for p in node.ranks()}
    job = world.ended(world.submit(size="32*32"))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.failure_class is FailureClass.USER
    assert "32*32" in job.error.detail
    assert job.attempts == 1
    assert {p.pid for p in node.ranks()} == before


def test_a_job_of_a_newer_schema_is_left_alone(world: World, node: NodeProcess) -> None:
    busy = world.submit(**SLOW)
    world.at_step(busy, 1)  # so that the next one waits
    newer = world.submit()
    world.store.redis.execute_command("HSET", f"reel:job:{newer}", "schema", "99")
    assert world.ended(world.submit()).state is JobState.SUCCEEDED
    assert world.store.get(newer).state is JobState.QUEUED
    world.store.redis.execute_command("HSET", f"reel:job:{newer}", "schema", "1")  # now it is ours
    assert world.ended(newer).state is JobState.SUCCEEDED


def test_a_killed_rank_costs_an_attempt_and_changes_no_pixel(world: World, node: NodeProcess) -> None:
    undisturbed = world.ended(world.submit(seed=11, **SLOW))
    before = {p.pid for p in node.ranks()}
    job_id = world.submit(seed=11, **SLOW)
    first = world.at_step(job_id, 10).token
    killed_at = time.monotonic()
    node.ranks()[1].send_signal(signal.SIGKILL)
    until(lambda: world.store.get(job_id).token > first, 60, "the second attempt")
    print(f"recovery after a rank's SIGKILL: {time.monotonic() - killed_at:.1f} s to the next attempt")
    job = world.ended(job_id)
    assert job.state is JobState.SUCCEEDED, job.error
    assert job.attempts == 1
    assert not before & {p.pid for p in node.ranks()}, "the whole group is made anew"
    assert np.array_equal(world.frames(job), world.frames(undisturbed))
    assert world.storage.list_keys(f"jobs/{job_id}/{first}/") == []


def test_cancel_stops_within_a_step_or_two(world: World, node: NodeProcess) -> None:
    job_id = world.submit(**SLOW)
    world.at_step(job_id, 5)
    before = {p.pid for p in node.ranks()}
    world.store.cancel(job_id)
    asked = time.monotonic()
    job = world.ended(job_id)
    print(f"canceled after {time.monotonic() - asked:.2f} s")
    assert job.state is JobState.CANCELED
    assert world.storage.list_keys(f"jobs/{job_id}/") == []
    assert {p.pid for p in node.ranks()} == before, "a cancel costs no group"


def test_s3_down_while_publishing_delays_but_remakes_nothing(world: World, node: NodeProcess) -> None:
    world.s3.down()
    job_id = world.submit(seed=3)
    until(lambda: world.store.get(job_id).phase == "publishing", 30, "publishing")
    token = world.store.get(job_id).token
    until(lambda: world.s3.refused > 2, 30, "failing uploads")
    time.sleep(world.settings.lease_seconds)  # the lease is kept meanwhile
    assert world.store.get(job_id).state is JobState.RUNNING
    world.s3.up = True
    job = world.ended(job_id)
    assert (job.state, job.attempts, job.token) == (JobState.SUCCEEDED, 0, token)
    assert world.frames(job).shape[0] == 9


def test_a_stopped_rank_is_taken_for_hung(world: World, node: NodeProcess) -> None:
    job_id = world.submit(**SLOW)
    world.at_step(job_id, 5)
    node.ranks()[1].send_signal(signal.SIGSTOP)
    job = world.ended(job_id, 90)
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1)


def test_a_dead_agent_rebuilds_the_cluster(world: World, node: NodeProcess) -> None:
    """The raylet ends by itself when one of its agents does, so this is both."""
    job_id = world.submit(**SLOW)
    world.at_step(job_id, 5)
    old = set(node.family())
    killed_at = time.monotonic()
    node.kill("RuntimeEnvAgent")
    job = world.ended(job_id, 120)
    print(f"agent killed: the job's end came {time.monotonic() - killed_at:.1f} s later")
    assert job.state is JobState.SUCCEEDED, job.error
    assert not old & set(node.family()), "nothing of the old cluster lives on"


def test_drain_gives_back_and_leaves_no_process(world: World, node: NodeProcess) -> None:
    until(lambda: [n for n in world.registry.list() if n.state == "idle"], 60, "the node")
    job_id = world.submit(**{**SLOW, "sampling_steps": 1000})
    world.at_step(job_id, 5)
    node.family()
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(60) == 0
    job = world.store.get(job_id)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0)
    assert world.registry.list() == []
    assert node.leftovers() == []
    world.store.cancel(job_id)


def test_a_supervisor_killed_hard_takes_everything_along(world: World) -> None:
    with running_node(world.settings, world.model, world.folder / "second.log") as node:
        until(lambda: [n for n in world.registry.list() if n.state == "idle"], 120, "the second node")
        job_id = world.submit(**{**SLOW, "sampling_steps": 1000})
        world.at_step(job_id, 5)
        assert node.ranks()
        node.process.kill()
        node.process.wait()
        assert node.leftovers() == []
    world.store.cancel(job_id)


def test_a_broken_checkpoint_ends_the_node_with_one_line(world: World) -> None:
    broken = world.folder / "broken"
    shutil.copytree(world.model, broken)
    (broken / "Wan2.1_VAE.pth").unlink()
    log = world.folder / "broken.log"
    with running_node(world.settings, broken, log) as node:
        assert node.process.wait(120) == 1
    lines = [line for line in log.read_text().splitlines() if line.startswith("reel node: ")]
    assert len(lines) == 1
    assert "VAE.pth" in lines[0]
    assert "Traceback" not in log.read_text()
