"""`reel scaler` against a real Redis: what it reads, what it remembers, who leads."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from infra.errors import CliError
from infra.prometheus import exporter
from infra.scaler.config import ConfigError, ScalerConfig
from infra.scaler.driver import DriverError, Health, Rented
from infra.scaler.main import Loop, run
from infra.scaler.memory import Leadership, RedisMemory, from_json
from infra.scaler.metrics import ScalerMetrics
from infra.scaler.observe import QueueSource, expected_seconds
from infra.scaler.policy import Memory, Policy
from infra.scaler.reconcile import Pool
from jobs.client import connect
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result, video_request
from tests.support.redis import redis_server

POLICY = Policy(target_wait=600, max_nodes=1)
POOL = '[[pool]]\nmodel = "tiny"\ndriver = "simulated"\ntarget_wait = 3\nboot = 0\nremove_window = 0.01\n'


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with redis_server() as running:
        yield running.url


@pytest.fixture
def settings(server: str) -> Settings:
    made = Settings(redis_url=server)
    connect(made).execute_command("FLUSHALL")
    return made


def test_the_queue_as_it_is(settings: Settings) -> None:
    client: Any = connect(settings)
    store = JobStore(client, settings)
    source = QueueSource(store, NodeRegistry(client))
    assert source.load("tiny") == (0, 0, None)
    for _ in range(3):
        store.submit(new_job())
    job = store.claim("tiny", "n1")
    assert job is not None
    store.finish(job.id, job.token, result(job.id, job.token))  # 1.5 s of denoising
    store.claim("tiny", "n1")
    assert source.load("tiny") == (1, 1, 1.5)
    assert source.load("other") == (0, 0, None)
    assert abs(source.now() - time.time()) < 60


def test_job_times_follow_the_shapes_that_wait(settings: Settings) -> None:
    client: Any = connect(settings)
    store = JobStore(client, settings)
    done = []
    for size, seconds in (("64*48", 2.0), ("64*48", 4.0), ("64*48", 90.0), ("128*96", 10.0)):
        store.submit(new_job(request=video_request(size=size)))
        job = store.claim("tiny", "n1")
        assert job is not None
        outcome = result(job.id, 1).model_copy(update={"seconds": {"denoising": seconds, "publishing": 50.0}})
        done.append(store.finish(job.id, job.token, outcome))
    small, large, new = (video_request(size=size) for size in ("64*48", "128*96", "256*256"))
    assert expected_seconds(done, [small]) == 4.0  # the median, not the mean
    assert expected_seconds(done, [small, large]) == 7.0
    assert expected_seconds(done, [new]) == 7.0  # the median of all
    assert expected_seconds([], [small]) is None


def test_dry_run_says_why_and_writes_nothing(settings: Settings, tmp_path: Path) -> None:
    client: Any = connect(settings)
    store = JobStore(client, settings)
    for _ in range(4):
        store.submit(new_job())
    keys = sorted(client.execute_command("KEYS", "*"))
    (tmp_path / "s.toml").write_text(POOL + "job_seconds = 1.5\n")
    said: list[str] = []
    assert run(settings, tmp_path / "s.toml", dry_run=True, say=said.append) == 0
    assert said[0] == "tiny: 0 nodes, 2 desired, target 2"
    assert "  (4 waiting + 0 running) x 1.5 s (assumed) / 3 s -> 2 nodes" in said
    assert "  would order 2" in said
    assert sorted(client.execute_command("KEYS", "*")) == keys


def test_a_taken_metrics_port_is_named(settings: Settings, tmp_path: Path) -> None:
    """By the scaler and by the exporter, before either does anything."""
    (tmp_path / "s.toml").write_text(POOL)
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics-port: got {port} .*in use"):
            run(settings, tmp_path / "s.toml", metrics_port=port)
        with pytest.raises(CliError, match=f"--port: got {port} .*in use"):
            exporter.run(settings, port)


def test_one_pass_orders_and_remembers_over_a_restart(settings: Settings, tmp_path: Path) -> None:
    client: Any = connect(settings)
    JobStore(client, settings).submit(new_job())
    (tmp_path / "s.toml").write_text(POOL + "job_seconds = 3\n")
    for _ in range(2):  # the second finds the first one's order in its memory and makes no other
        assert run(settings, tmp_path / "s.toml", once=True, say=lambda line: None) == 0
        memory = RedisMemory(client, Leadership(client, 1)).load("tiny")
        assert len(memory.orders) == 1
    assert client.execute_command("EXISTS", "reel:scaler:leader") == 0  # it left the lead


def test_one_leads_and_a_dead_leader_is_followed(settings: Settings) -> None:
    first, second = (Leadership(connect(settings), 1.0) for _ in range(2))
    assert first.hold()
    assert first.hold()
    assert not second.hold()
    second.leave()  # not its own to give up
    assert not second.hold()
    time.sleep(1.1)
    assert second.hold()
    assert not first.hold()
    second.leave()
    assert first.hold()


class SlowCloud:
    """A cloud whose list takes `seconds`, and lets `meanwhile` happen."""

    def __init__(self, seconds: float = 0.0, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.seconds = seconds
        self.meanwhile = meanwhile
        self.rented: list[str] = []

    def machines(self) -> list[Rented]:
        found = [Rented(name, Health.PENDING, time.time()) for name in self.rented]
        time.sleep(self.seconds)
        self.meanwhile()
        return found

    def add(self, name: str) -> None:
        self.rented.append(name)

    def remove(self, name: str) -> None:
        self.rented.remove(name)


def loop(settings: Settings, cloud: SlowCloud, seconds: float, said: list[str]) -> Loop:
    """A scaler of its own with one pool in `cloud`, whose lead lasts `seconds`."""
    client: Any = connect(settings)
    lead = Leadership(client, seconds)
    source = QueueSource(JobStore(client, settings), NodeRegistry(client))
    pool = Pool("tiny", POLICY, cloud, source, RedisMemory(client, lead))
    return Loop(ScalerConfig(0.1, ()), [pool], lead, ScalerMetrics(), said.append)


def test_a_cloud_slower_than_the_lead_does_not_cost_it(settings: Settings) -> None:
    store = JobStore(connect(settings), settings)
    store.submit(new_job())
    slow = SlowCloud(2.0)
    first = threading.Thread(target=loop(settings, slow, 1.0, []).one_pass)
    first.start()
    time.sleep(1.4)  # the lead would be over by now, and the first has ordered nothing yet
    other = SlowCloud()
    loop(settings, other, 1.0, []).one_pass()
    first.join()
    assert (len(slow.rented), other.rented) == (1, [])


def test_a_plan_made_under_a_lead_that_ended_is_dropped(settings: Settings) -> None:
    """The process stood still, say: another one led, acted and left before the first goes on."""
    store = JobStore(connect(settings), settings)
    store.submit(new_job())
    quick, said = SlowCloud(), list[str]()

    def another_acts() -> None:
        store.redis.execute_command("DEL", "reel:scaler:leader")
        loop(settings, quick, 30, []).one_pass()

    stale = SlowCloud(meanwhile=another_acts)
    loop(settings, stale, 30, said).one_pass()
    assert (len(quick.rented), stale.rented) == (1, [])
    assert said == ["scaler: the lead was lost during the pass for tiny: its plan is dropped"]
    memory = RedisMemory(store.redis, Leadership(store.redis, 1)).load("tiny")
    assert [name for name, _ in memory.orders] == quick.rented


def test_a_lead_that_ended_is_not_kept_by_taking_it_again(settings: Settings) -> None:
    client: Any = connect(settings)
    lead = Leadership(client, 0.2)
    assert lead.hold()
    with lead.kept():
        client.execute_command("DEL", "reel:scaler:leader")
        time.sleep(0.15)
        assert not lead.write("reel:scaler:memory:tiny", "{}")
    assert client.execute_command("EXISTS", "reel:scaler:leader", "reel:scaler:memory:tiny") == 0


class BrokenCloud(SlowCloud):
    """A cloud whose tool fails."""

    def machines(self) -> list[Rented]:
        raise DriverError("no credentials")


def test_one_pools_broken_cloud_does_not_keep_the_others_from_theirs(settings: Settings) -> None:
    client: Any = connect(settings)
    JobStore(client, settings).submit(new_job())
    good, said = SlowCloud(), list[str]()
    one = loop(settings, good, 60.0, said)
    broken = Pool("other", POLICY, BrokenCloud(), one._pools[0]._source, one._pools[0]._memory)
    one._pools.insert(0, broken)
    assert one.run(once=True) == 0
    assert "scaler: other: no credentials" in said
    assert len(good.rented) == 1
    get = one._metrics.registry.get_sample_value
    assert get("reel_scaler_errors_total", {"model": "other"}) == 1
    assert get("reel_scaler_errors_total", {"model": "tiny"}) is None


def test_a_damaged_memory_stops_its_own_pool_alone(settings: Settings) -> None:
    """Without its memory a pool would order again what is on its way: it is said, and nothing is ordered."""
    client: Any = connect(settings)
    JobStore(client, settings).submit(new_job())
    client.execute_command("SET", "reel:scaler:memory:other", "{")
    good, other, said = SlowCloud(), SlowCloud(), list[str]()
    one = loop(settings, good, 60.0, said)
    one._pools.insert(0, Pool("other", POLICY, other, one._pools[0]._source, one._pools[0]._memory))
    assert one.run(once=True) == 0
    assert any("other" in line and "delete the key" in line for line in said)
    assert (len(other.rented), len(good.rented)) == (0, 1)
    assert one._metrics.registry.get_sample_value("reel_scaler_errors_total", {"model": "other"}) == 1


def test_a_redis_that_is_away_does_not_end_it(tmp_path: Path) -> None:
    """The pass is counted as failed and said; the next one may find it again."""
    said: list[str] = []
    one = loop(Settings(redis_url=f"unix://{tmp_path}/none.sock", redis_timeout=0.2), SlowCloud(), 60.0, said)
    assert one.run(once=True) == 0
    assert any("scaler: " in line and "pools" not in line for line in said)
    assert one._metrics.registry.get_sample_value("reel_scaler_errors_total", {"model": "queue"}) == 1


def test_who_stands_by_says_nothing_of_what_it_saw_when_it_led(settings: Settings) -> None:
    """Or an old pass would look like a stuck scaler, and old failures like today's."""
    one = loop(settings, SlowCloud(), 60.0, [])
    assert one.run(once=True) == 0
    registry = one._metrics.registry
    assert 'reel_scaler_pass_timestamp_seconds{model="tiny"}' in generate_latest(registry).decode()
    assert Leadership(connect(settings), 60.0).hold()
    assert one.run(once=True) == 0
    said = generate_latest(registry).decode()
    assert "reel_scaler_pass_timestamp_seconds{" not in said
    assert 'reel_scaler_ordered_total{model="tiny"}' in said


def test_only_one_of_many_gets_the_lead(settings: Settings) -> None:
    start, got = threading.Barrier(8), []

    def try_it() -> None:
        leader = Leadership(connect(settings), 30)
        start.wait()
        if leader.hold():
            got.append(leader)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_drains_go_through_the_registry_and_odd_memory_is_named(settings: Settings) -> None:
    client: Any = connect(settings)
    registry = NodeRegistry(client)
    registry.register(NodeInfo(id="n1", model="tiny", state="idle"))
    source = QueueSource(JobStore(client, settings), registry)
    source.drain("n1")
    source.drain("unknown")
    assert source.nodes("tiny")[0].drain_requested
    assert source.nodes("other") == []
    for text in ("[1]", "{"):
        with pytest.raises(ValueError, match="delete the key"):
            from_json(text)
    assert from_json('{"failed_orders": 2, "later_field": 1}') == Memory(failed_orders=2)
