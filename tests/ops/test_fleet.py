"""A whole deployment by its real command lines: an upgrade, a lost, a drained and an added node, no job lost.

The tests go in order on one deployment: starting nodes is what takes the time.
"""

import hashlib
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ops.compose import ROOT, Deployment, Process, until
from tests.ops.fleet import NODE, QUICK, Fleet, bucket

DATA = Path(__file__).parent / "data"
MAY_BE_EMPTY = {
    "Scaler: nodes desired and targeted", "Scaler: price an hour",  # it has been stopped by then
    "GPUs busy, mean and least by node", "GPU memory in use, fullest by node",  # there are none here
    "Cost a video",  # these nodes have no price
}  # fmt: skip
# The wait is one that 12 jobs in line never meet, on however fast a machine: or the load, which keeps their
# number and not their seconds, would ask for two nodes at one time and for three at another.
SCALER = """
interval = 0.5
[[pool]]
model = "tiny-t2v"
driver = "simulated"
node_model = "{model}"
logs = "{logs}"
boot = 0
target_wait = 0.2
max_nodes = 3
max_add = 1
add_cooldown = 600
remove_window = 3
price_per_hour = 10
"""


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the last release (see scripts/previous.sh)."""
    folder = tmp_path_factory.mktemp("previous")
    with tarfile.open(DATA / "previous.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def nodes() -> dict[str, Process]:
    """The nodes that run, from test to test."""
    return {}


def test_s3_is_healthy_only_when_it_takes_requests(tmp_path: Path) -> None:
    """Its master is up seconds before its gateway is; the API and the nodes start on that check's word."""
    (tmp_path / "model").mkdir()
    one = Deployment(tmp_path, tmp_path / "model")
    try:
        one.start("s3")
        until(lambda: one.healthy("s3"), 60, "S3")
        bucket(one).ensure_bucket()
    finally:
        one.close()


def test_the_last_release_and_todays_code_share_one_queue(
    deployment: Deployment, fleet: Fleet, previous: Path, nodes: dict[str, Process]
) -> None:
    """A rolling upgrade: old API, workers and node at work, new ones beside them, the old ones leave."""
    whose = [sys.executable, "-c", "import jobs, worker; print(jobs.__file__, worker.__file__)"]
    env, cwd = deployment.env("api", previous), deployment.folder
    said = subprocess.run(whose, env=env, cwd=cwd, capture_output=True, text=True, check=True)
    assert said.stdout.count(str(previous)) == 2  # or the test compares today's code with itself
    port = str(deployment.free_port())
    # That release had one S3 user with all rights, as only the operator's is today.
    user = {"REEL_S3_ACCESS_KEY": "ops", "REEL_S3_SECRET_KEY_FILE": deployment.secret("s3_secret_ops")}
    # That release's node made the bucket, and its API ended where it was first; its container started again.
    bucket(deployment).ensure_bucket()
    old_api = deployment.start("api", "api-old", code=previous, REEL_API_PORT=port, **QUICK, **user)
    old_worker = deployment.start("celery-worker", "celery-worker-old", code=previous, **QUICK, **user)
    nodes["old"] = fleet.node("old", code=previous, **user)
    for service in ("celery-beat", "exporter", "prometheus"):
        deployment.start(service, **QUICK)
    until(lambda: deployment.healthy("api", REEL_API_PORT=port), 60, lambda: f"the old API: {old_api.said()}")
    fleet.serving("old")
    old_url = f"http://127.0.0.1:{port}"
    first = fleet.submit(4, old_url)

    for service in ("api", "celery-worker"):
        deployment.start(service, **QUICK)
    for name in ("a", "b", "c"):
        nodes[name] = fleet.node(name)
    until(lambda: deployment.healthy("api"), 60, "the new API")
    assert fleet.job(first[0])["id"] == first[0]  # the new API reads the old one's records
    second = fleet.submit(4) + fleet.submit(4, old_url)
    assert old_worker.stop() == 0
    fleet.serving("a", "b", "c")
    second += fleet.submit(6) + fleet.submit(6, old_url)
    deployment.ops("drain", "old")
    assert nodes.pop("old").popen.wait(60) == 0
    fleet.all_done(60)
    read = {fleet.job(job_id, old_url)["state"] for job_id in fleet.jobs}
    assert read == {"succeeded"}  # the old API reads the new nodes' records
    assert old_api.stop() in (0, -signal.SIGTERM)  # uvicorn ends, then dies by the signal it was sent

    rows = fleet.all_done(5)
    assert {row.state for row in rows.values()} == {"succeeded"}
    charged = [fleet.story(row.id) for row in rows.values() if row.attempts]
    assert not charged, "\n".join(charged)
    by_old = {job_id for job_id, row in rows.items() if row.owner == "old"}
    assert by_old & {*first}
    assert {*second} - by_old, "the new nodes ran none of the old API's jobs"
    assert any(rows[job_id].owner != "old" for job_id, api in fleet.jobs.items() if api == old_url)


def test_a_node_is_lost_one_drained_one_added_and_no_job_is(
    deployment: Deployment, fleet: Fleet, nodes: dict[str, Process]
) -> None:
    """Three nodes under load. One dies with what it runs, Redis restarts, one drains, the scaler adds one."""
    before = {*fleet.jobs}
    with fleet.load(waiting=12):
        held = lose_at_work(fleet, nodes.pop("a"), "a")

        next(process for process in deployment.processes if process.name == "redis").lose()
        deployment.start("redis")
        until(lambda: deployment.healthy("redis"), 30, "Redis, back on its append-only file")

        deployment.ops("drain", "b")
        assert nodes.pop("b").popen.wait(60) == 0
        config = SCALER.format(model=deployment.folder / "model", logs=deployment.folder / "machines")
        (deployment.folder / "etc/scaler.toml").write_text(config)
        scaler = deployment.start("scaler", **deployment_env(deployment))
        added = until(lambda: ordered(scaler), 60, lambda: f"an order of the scaler: {scaler.said()}")
        until(lambda: ran_on(fleet, added), 90, lambda: f"a job on the added node: {scaler.said()}")

    rows = fleet.all_done(120)
    mine = {job_id: row for job_id, row in rows.items() if job_id not in before}
    assert len(mine) == len(fleet.jobs) - len(before)
    assert {row.state for row in mine.values()} == {"succeeded"}
    assert {job_id for job_id, row in mine.items() if row.attempts} == held  # nobody else's job was charged
    assert {mine[job_id].attempts for job_id in held} == {1}
    assert not {mine[job_id].owner for job_id in held} & {"a"}  # another node made them
    assert {"b", "c", added} <= {row.owner for row in mine.values()}

    until(lambda: f"removed {added}" in scaler.said(), 60, lambda: f"its idle node to go: {scaler.said()}")
    assert f"asked {added} to drain" in scaler.said()
    assert scaler.stop() == 0
    assert nodes["c"].running


def lose_at_work(fleet: Fleet, node: Process, name: str) -> set[str]:
    """Lose a node while it runs something; the jobs that it held: on its ranks, perhaps one on its way."""
    for _ in range(200):
        node.freeze()
        held = {row.id for row in fleet.records().values() if (row.state, row.owner) == ("running", name)}
        if held:
            node.lose()
            return held
        node.thaw()
        time.sleep(0.1)
    raise AssertionError(f"node {name} got no job")


def deployment_env(deployment: Deployment) -> dict[str, str]:
    """What a simulated machine's node needs to know; a real one has it from its own template."""
    env = deployment.env("node-cpu", **NODE)
    return {name: value for name, value in env.items() if name.startswith("REEL_") and "REDIS" not in name}


def ran_on(fleet: Fleet, node: str) -> bool:
    """Whether the node has finished a job."""
    return any(row.terminal and row.owner == node for row in fleet.records().values())


def ordered(scaler: Process) -> str | None:
    """The machine that the scaler has ordered."""
    lines = scaler.said().splitlines()
    return next((line.split()[1] for line in lines if line.startswith("  ordered ")), None)


def test_every_customer_got_one_video_and_one_word(fleet: Fleet) -> None:
    """After all of that: each job has its own MP4 in S3, and each end was told once, signed."""
    until(lambda: all(fleet.webhooks().values()), 60, "a webhook of every job")
    assert {tuple(events) for events in fleet.webhooks().values()} == {("job.succeeded",)}
    rows = fleet.records()
    for job_id in fleet.jobs:
        video, result = fleet.video(job_id), rows[job_id].result
        assert result is not None
        assert (hashlib.sha256(video).hexdigest(), len(video)) == (result.sha256, result.bytes)


HEALTHY = ("redis", "s3", "api", "celery-worker", "celery-beat", "node-cpu", "exporter", "prometheus")


@pytest.mark.parametrize("service", HEALTHY)
def test_health_checks_tell_the_living(deployment: Deployment, service: str) -> None:
    assert deployment.healthy(service, REEL_NODE_ID="c")


def test_health_checks_tell_the_dead(deployment: Deployment) -> None:
    nobody = str(deployment.free_port())
    assert not deployment.healthy("scaler")  # it was stopped
    assert not deployment.healthy("api", REEL_API_PORT=nobody)
    until(lambda: not deployment.healthy("node-cpu", REEL_NODE_ID="a"), 30, "the lost node's check to fail")
    (deployment.folder / "nowhere").write_text(f"redis://127.0.0.1:{nobody}/0")
    assert not deployment.healthy("celery-worker", REEL_REDIS_URL_FILE=str(deployment.folder / "nowhere"))


def test_every_service_ran_by_its_own_command(deployment: Deployment) -> None:
    """All but Grafana, which no package registry has, and the GPU node, whose command is the CPU node's."""
    started = {process.name for process in deployment.processes}
    assert {*deployment.compose["services"]} - started == {"grafana", "node-gpu", "node-cpu", "ops"}
    commands = {n: deployment.compose["services"][n]["command"] for n in ("node-cpu", "node-gpu")}
    assert commands["node-cpu"][:2] == commands["node-gpu"][:2]
    for service in started & {*deployment.compose["services"]}:
        words = [str(word) for word in deployment.compose["services"][service]["command"]]
        ran = deployment.argv(service)[-len(words) :]
        same = sum(one == other for one, other in zip(words, ran, strict=False))
        assert service in ("s3", "redis", "prometheus") or same >= len(words) - 2  # a path, a port


def test_prometheus_scrapes_it_all_and_the_dashboard_has_data(deployment: Deployment) -> None:
    """By the compose file's own Prometheus and prometheus.yml, after the load."""

    def ask(path: str, **query: str) -> Any:
        answer = httpx.get(f"{deployment.url('prometheus')}/api/v1/{path}", params=query, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def scraped() -> bool:
        health = {t["labels"]["job"]: t["health"] for t in ask("targets")["activeTargets"]}
        return {"reel-api", "reel-exporter"} <= {job for job, state in health.items() if state == "up"}

    until(scraped, 40, "scrapes of the API and the exporter")
    dashboard = json.loads((ROOT / "infra/grafana/reelserve.json").read_text())

    def without_data() -> set[str]:
        found = set()
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                query = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
                if not ask("query", query=query)["result"]:
                    found.add(panel["title"])
        return found

    empty, end = without_data(), time.monotonic() + 40
    while empty - MAY_BE_EMPTY and time.monotonic() < end:  # a rate needs two scrapes
        time.sleep(1)
        empty = without_data()
    titles = {panel["title"] for panel in dashboard["panels"]}
    assert empty <= MAY_BE_EMPTY, f"no data for {empty - MAY_BE_EMPTY}"
    assert len(titles - empty) > len(titles) / 2
    firing = {alert["labels"]["alertname"] for alert in ask("alerts")["alerts"] if alert["state"] == "firing"}
    assert not firing & {"ReelApiDown", "ReelRedisDown", "ReelRedisNotPersisting", "ReelNoNodes"}
