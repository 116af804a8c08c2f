"""Estimates: learned from finished videos by shape, honest about what nobody can know."""

import time

import pytest

from jobs.client import RedisClient
from jobs.forecast import Forecast
from jobs.job import Job, Phase
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.store import JobStore
from jobs.timings import SHAPES_CAP, Timings, shape_of
from tests.support.jobs import new_job, video_request

SECONDS = {"encoding": 1.0, "denoising": 8.0, "decoding": 3.0}  # 4 steps of 2 s, and 4 s besides


@pytest.fixture
def timings(redis: RedisClient) -> Timings:
    return Timings(redis)


def node(redis: RedisClient, name: str, job: Job | None = None, **more: object) -> None:
    state = "busy" if job else "idle"
    info = {"id": name, "model": "tiny", "state": state, "job_id": job.id if job else None, **more}
    NodeRegistry(redis).register(NodeInfo.model_validate(info))


def forecast(store: JobStore) -> Forecast:
    """A fresh one: it keeps what it saw for a second."""
    return Forecast(store, NodeRegistry(store.redis))


def test_a_shape_is_learned_and_scales_with_its_steps(timings: Timings) -> None:
    assert timings.of("tiny").expect(video_request()) is None
    timings.learn(video_request(), SECONDS)
    known = timings.of("tiny")
    assert known.expect(video_request()) == pytest.approx(12)
    assert known.expect(video_request(sampling_steps=10)) == pytest.approx(24)
    assert known.expect(video_request(frame_num=9)) is None, "another shape was never seen"
    assert known.mean == pytest.approx(12)
    assert timings.of("other").mean is None


def test_newer_measurements_win_slowly(timings: Timings) -> None:
    timings.learn(video_request(), SECONDS)
    timings.learn(video_request(), {**SECONDS, "denoising": 16.0})
    after_one = timings.of("tiny").expect(video_request())
    assert after_one is not None
    assert 12 < after_one < 20
    for _ in range(20):
        timings.learn(video_request(), {**SECONDS, "denoising": 16.0})
    assert timings.of("tiny").expect(video_request()) == pytest.approx(20, abs=0.1)


def test_shapes_are_bounded_and_nonsense_is_not_learned(timings: Timings) -> None:
    for number in range(SHAPES_CAP + 5):
        timings.learn(video_request(size=f"{number}*16"), SECONDS)
    assert len(timings.of("tiny").shapes) == SHAPES_CAP
    timings.learn(video_request(model="new"), {})
    assert timings.of("new").mean is None
    assert shape_of(video_request()) == "64*48:5"
    assert shape_of(video_request(quality="8bit")) == "64*48:5:8bit"


def submit(store: JobStore, count: int) -> list[Job]:
    return [store.submit(new_job())[0] for _ in range(count)]


def start(store: JobStore, job: Job) -> float | None:
    return forecast(store).start_at(job, store.position(job.id))


def test_a_waiting_jobs_start(store: JobStore, redis: RedisClient, timings: Timings) -> None:
    first, *waiting = submit(store, 5)
    assert start(store, first) is None, "no node, no promise"
    running = store.claim("tiny", "a")
    assert running is not None
    assert running.started_at is not None
    node(redis, "a", running)
    assert start(store, waiting[0]) is None, "nothing was measured yet"
    timings.learn(video_request(), SECONDS)
    starts = [start(store, job) for job in waiting]
    assert starts == [pytest.approx(running.started_at + 12 * n, abs=1.01) for n in range(1, 5)]
    assert [start(store, job) for job in waiting] == starts, "the ETag holds as long as nothing changes"
    assert forecast(store).start_at(running, store.position(running.id)) is None
    node(redis, "b", state="draining")
    node(redis, "c", model="other")
    assert [start(store, job) for job in waiting] == starts, "neither takes one of these"
    node(redis, "d", state="idle")
    soon = start(store, waiting[0])
    assert soon is not None
    assert soon <= time.time() + 2
    assert start(store, waiting[2]) == pytest.approx(soon + 12, abs=1.01), "two nodes, twice as fast"


def test_an_overdue_job_moves_the_start_in_steps(
    store: JobStore, redis: RedisClient, timings: Timings
) -> None:
    timings.learn(video_request(), SECONDS)
    _, waiting = submit(store, 2)
    running = store.claim("tiny", "a")
    assert running is not None
    redis.execute_command("HSET", f"reel:job:{running.id}", "started_at", "1.0")
    node(redis, "a", running)
    found = start(store, waiting)
    assert found is not None
    assert found % 10 == 0
    assert 0 < found - time.time() < 12


def test_a_running_jobs_eta_before_its_first_step(store: JobStore, timings: Timings) -> None:
    submit(store, 1)
    job = store.claim("tiny", "a")
    assert job is not None
    assert forecast(store).eta(job) is None
    timings.learn(video_request(), SECONDS)
    assert forecast(store).eta(job) == pytest.approx(12, abs=1)
    told = job.model_copy(update={"eta_seconds": 3.0})
    assert forecast(store).eta(told) == 3.0, "the node knows better"
    late = job.model_copy(update={"started_at": 1.0})
    assert forecast(store).eta(late) is None
    publishing = job.model_copy(update={"phase": Phase.PUBLISHING})
    assert forecast(store).eta(publishing) is None, "the GPUs are done with it"


def test_nodes_that_will_not_take_it_count_for_nothing(
    store: JobStore, redis: RedisClient, timings: Timings
) -> None:
    timings.learn(video_request(), SECONDS)
    (job,) = submit(store, 1)
    node(redis, "a")
    assert start(store, job) is not None
    NodeRegistry(redis).request_drain("a")
    assert start(store, job) is None, "it was asked to drain, and hears of it in a second"
    silent = NodeInfo(
        id="b", model="tiny", state="idle", seen_at=time.time() - 3 * store.settings.lease_seconds
    )
    NodeRegistry(redis).register(silent)
    NodeRegistry(redis)._write(silent)
    assert start(store, job) is None, "nobody heard of it for so long that its leases have run out"


def test_what_is_not_known_of_a_node_is_no_promise_and_no_obstacle(
    store: JobStore, redis: RedisClient, timings: Timings
) -> None:
    first, second = submit(store, 2)
    info = NodeInfo(id="a", model="tiny", state="busy", job_id="job_of_which_nothing_is_known")
    NodeRegistry(redis).register(info)
    assert start(store, first) is None
    node(redis, "b")
    assert start(store, first) == pytest.approx(time.time(), abs=2), "the idle one comes first"
    assert start(store, second) is None
    timings.learn(video_request(), SECONDS)
    assert start(store, second) == pytest.approx(time.time() + 6, abs=2), "half-way through an average one"


def test_an_overdue_node_is_believed(store: JobStore, redis: RedisClient, timings: Timings) -> None:
    timings.learn(video_request(), SECONDS)
    _, waiting = submit(store, 2)
    running = store.claim("tiny", "a")
    assert running is not None
    for name, value in (("started_at", "1.0"), ("eta_seconds", "47.0")):
        redis.execute_command("HSET", f"reel:job:{running.id}", name, value)
    node(redis, "a", running)
    assert start(store, waiting) == pytest.approx(time.time() + 47, abs=2)


def test_a_look_serves_for_a_second_and_no_longer(
    store: JobStore, redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = submit(store, 1)
    kept = forecast(store)
    assert kept.start_at(job, 0) is None
    node(redis, "a")
    monkeypatch.setattr("jobs.forecast.FRESH_SECONDS", 60.0)
    assert kept.start_at(job, 0) is None
    monkeypatch.setattr("jobs.forecast.FRESH_SECONDS", 0.0)
    assert kept.start_at(job, 0) is not None
