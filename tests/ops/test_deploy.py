"""Deployment files: schemas, linters, real command lines, metrics that exist; and each check refuses a
tampered file.
"""

import copy
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import check_jsonschema
import httpx
import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from pydantic import SecretStr

from infra.docker.make_secrets import acl, make
from infra.models import has_checkpoint
from jobs.client import connect
from jobs.endpoints import EndpointStore
from jobs.errors import StorageUnavailable, StoreUnavailable
from jobs.job import Phase, WebhookEvent
from jobs.keys import KeyStore
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.outbox import Outbox
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from jobs.timings import Timings
from tests.ops.cli import parse_command
from tests.ops.compose import env_file
from tests.ops.queries import check_query, exported
from tests.support.jobs import new_job, result, video_request
from tests.support.redis import RedisServer, redis_server
from tests.support.s3 import s3_server

ALL = (WebhookEvent.STARTED, WebhookEvent.SUCCEEDED)
ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OWN = [
    name for name, service in COMPOSE["services"].items() if "reelserve-" in service["image"] and name != "s3"
]
ENV_FILES = [{"path": "./infra/docker/defaults.env"}, {"path": "./reel.env", "required": False}]
# What operations.md names for parts elsewhere and a container fixes by its role: nobody sets it in reel.env.
WIRED = {"REEL_API_HOST", "REEL_S3_ACCESS_KEY", "REEL_S3_SECRET_KEY", "REEL_REDIS_URL", "REEL_SECRET_KEY"}


def documented_settings() -> set[str]:
    """The settings that operations.md names."""
    names = re.findall(r"REEL_\w+", (ROOT / "docs/operations.md").read_text())
    return {name for name in names if name.removeprefix("REEL_").lower() in Settings.model_fields}


def check_compose(compose: dict[str, Any]) -> None:
    """The published schema, and what the schema can't say."""
    folder = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    jsonschema.validate(compose, json.loads((folder / "compose-spec.json").read_text()))
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert not str(service["user"]).startswith(("root", "0:")), name
        assert "memory" in service["deploy"]["resources"]["limits"], name
        assert "healthcheck" in service or name == "ops", name
        assert "inside" in service["networks"], name
        assert ":latest" not in service["image"], name
        assert {*service.get("secrets", [])} <= {*compose["secrets"]}, name
        assert {*service.get("depends_on", {})} <= {*compose["services"]}, name
        if "build" in service:
            targets = re.findall(r"AS (\S+)", (INFRA / "docker/Dockerfile").read_text())
            assert service["build"]["target"] in targets, name
        if name in OWN:  # `environment` beats the files, so nothing that operators are told to set is in it
            assert service.get("env_file") == ENV_FILES, name
            fixed = {key.removesuffix("_FILE") for key in service["environment"]} - WIRED
            assert not fixed & documented_settings(), name
        else:
            assert "env_file" not in service, f"{name}: not ours, so our secrets are none of its business"
        for key, value in service.get("environment", {}).items():
            assert "PASSWORD" not in key or value.startswith("/run/secrets/"), f"{name}: {key}"
            field = key.removeprefix("REEL_").removesuffix("_FILE").lower()
            assert not key.startswith("REEL_") or field in Settings.model_fields, f"{name}: no setting {key}"
    assert compose["networks"]["inside"]["internal"]
    # An Alertmanager is elsewhere, and from an internal network alone it would never be reached.
    assert "outside" in compose["services"]["prometheus"]["networks"]


def test_compose() -> None:
    check_compose(COMPOSE)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda c: c["services"]["api"].update(comand=["api"]),
        lambda c: c["services"]["redis"].update(read_only=False),
        lambda c: c["services"]["node-cpu"].update(user="root"),
        lambda c: c["services"]["api"]["environment"].update(REEL_REDIS_ULR="x"),
        lambda c: c["services"]["api"]["secrets"].append("none"),
        lambda c: c["services"]["api"]["build"].update(target="apy"),
        lambda c: c["services"]["s3"].pop("healthcheck"),
        lambda c: c["networks"]["inside"].update(internal=False),
        lambda c: c["services"]["prometheus"].update(networks=["inside"]),
        lambda c: c["services"]["celery-beat"].pop("env_file"),
        lambda c: c["services"]["node-gpu"]["env_file"].pop(),
        lambda c: c["services"]["api"]["env_file"].reverse(),
        lambda c: c["services"]["node-cpu"]["environment"].update(REEL_DRAIN_SECONDS="600"),
        lambda c: c["services"]["api"]["environment"].update(REEL_METRICS_TOKEN_FILE="/run/secrets/x"),
        lambda c: c["services"]["grafana"].update(env_file=ENV_FILES),
    ],
)
def test_a_tampered_compose_file_is_refused(tamper: Callable[[dict[str, Any]], object]) -> None:
    compose = copy.deepcopy(COMPOSE)
    tamper(compose)
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_compose(compose)


def test_compose_defaults_are_settings_and_the_operators_file_stays_here() -> None:
    defaults = env_file(ROOT / "infra/docker/defaults.env")
    assert "REEL_S3_PUBLIC_ENDPOINT" in defaults
    assert {key.removeprefix("REEL_").lower() for key in defaults} <= {*Settings.model_fields}
    for name in (".gitignore", ".dockerignore"):
        assert "reel.env" in (ROOT / name).read_text().split()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("service", OWN)
def test_each_services_command_line_is_one_of_the_real_cli(service: str) -> None:
    words = COMPOSE["services"][service]["command"]
    path = ["/models/demo", "/models/wan"]
    parse_command([str(ROOT) if word in path else word for word in words])
    with pytest.raises(Exception, match=r"(?i)no such|not one of|missing|unexpected"):
        parse_command([*words, "--no-such-flag"])


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run([str(program), str(path)], capture_output=True, text=True, check=False)


def test_dockerfile_is_clean_and_a_tampered_one_is_not(tmp_path: Path) -> None:
    done = hadolint(INFRA / "docker/Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text((INFRA / "docker/Dockerfile").read_text().replace("WORKDIR /src", "RUN cd /src"))
    assert hadolint(bad).returncode != 0


def test_the_cpu_nodes_image_carries_the_demo_model() -> None:
    """The build copies the checkout's checkpoint, and nothing keeps it out of the build's context."""
    dockerfile = (INFRA / "docker/Dockerfile").read_text()
    assert "COPY models/demo /models/demo" in dockerfile
    assert 'CMD ["node", "--model", "/models/demo"]' in dockerfile
    assert has_checkpoint(ROOT / "models/demo")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not any(pattern.startswith("models") or "pth" in pattern for pattern in ignored)


def closure(extra: str) -> set[str]:
    """Every package that `pip install '.[extra]'` brings, by the installed packages' own words."""
    seen: set[tuple[str, str]] = set()
    todo = [("reelserve", extra), ("reelserve", "")]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in lines:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": wanted}):
                todo += [(need.name.lower(), one) for one in ("", *need.extras)]
    return {name for name, _ in seen}


@pytest.mark.parametrize("extra", ["api", "celery", "scaler"])
def test_images_without_gpus_are_without_torch(extra: str) -> None:
    assert not closure(extra) & {"torch", "ray", "triton", "transformers"}
    assert {"torch", "ray"} <= closure("node")  # or this test sees nothing


def promtool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        if os.environ.get("REEL_TEST_TOOLS") == "required":
            pytest.fail("no promtool on the PATH: install Debian's `prometheus` package")
        pytest.skip("no promtool here; CI installs it")
    return subprocess.run([program, *map(str, args)], capture_output=True, text=True, check=False)


def test_alerts_by_promtool() -> None:
    folder = INFRA / "prometheus"
    for args in (("check", "rules", folder / "alerts.yml"), ("test", "rules", folder / "alerts_test.yml")):
        done = promtool(*args)
        assert done.returncode == 0, done.stdout + done.stderr
    assert promtool("check", "config", folder / "prometheus.yml").returncode == 0


@pytest.mark.parametrize(
    ("old", "new"), [("> 0.8", "> 0.95"), ("> 1800", "> 18000"), ("== 0\n", "== 1\n"), ("> 60\n", "> 600\n")]
)
def test_a_tampered_alert_fails_its_unit_test(old: str, new: str, tmp_path: Path) -> None:
    text = (INFRA / "prometheus/alerts.yml").read_text()
    assert old in text
    (tmp_path / "alerts.yml").write_text(text.replace(old, new))
    tests = yaml.safe_load((INFRA / "prometheus/alerts_test.yml").read_text())
    del tests["tests"][-1]  # the healthy service takes the most time and fails for none of these
    (tmp_path / "alerts_test.yml").write_text(yaml.safe_dump(tests))
    assert promtool("test", "rules", tmp_path / "alerts_test.yml").returncode != 0


def queries() -> Iterator[tuple[str, str]]:
    for panel in json.loads((INFRA / "grafana/reelserve.json").read_text())["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for rule in yaml.safe_load((INFRA / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


def test_every_query_uses_metrics_that_exist_and_parses(tmp_path: Path) -> None:
    known = exported()
    rules = []
    for number, (_, query) in enumerate(queries()):
        check_query(query, known)
        rules.append({"record": f"query:{number}", "expr": query})
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    done = promtool("check", "rules", tmp_path / "rules.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "query", ["reel_jobz", 'reel_jobs{stat="queued"}', "sum by (nodes) (reel_jobs)", "rate(x[5m])"]
)
def test_a_tampered_query_is_refused(query: str) -> None:
    with pytest.raises(AssertionError):
        check_query(query, exported())


def test_every_alert_is_seen_firing_and_silent() -> None:
    rules = yaml.safe_load((INFRA / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    *faults, healthy = yaml.safe_load((INFRA / "prometheus/alerts_test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in faults for one in test["alert_rule_test"] if one["exp_alerts"]}
    silent = {one["alertname"] for one in healthy["alert_rule_test"] if not one["exp_alerts"]}
    assert fired == silent == {rule["alert"] for rule in rules}


def test_every_alert_has_a_runbook() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for rule in yaml.safe_load((INFRA / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]:
        assert f"\n#### {rule['alert']}\n" in page
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_redis_users_may_do_their_part_and_no_more(tmp_path: Path) -> None:
    make(tmp_path / "secrets")
    passwords = {role: role for role in ("api", "celery", "node", "scaler", "ops")}
    (tmp_path / "users.acl").write_text(acl(passwords))
    with redis_server() as plain:
        admin: Any = connect(Settings(redis_url=plain.url))
        for line in acl(passwords).splitlines():
            words = line.split()
            if words[1] != "default":
                admin.execute_command("ACL", "SETUSER", *words[1:])
        api = JobStore(_as("api", plain), Settings())
        image = video_request(image="uploads/key_a/img_1.png")
        job, _ = api.submit(new_job(request=image, callback_url="https://a.example/"))
        EndpointStore(_as("api", plain), Settings(), "x" * 40).add("key_a", "https://b.example/", ALL)
        KeyStore(_as("api", plain), "x" * 40).create("somebody")
        client = _as("node", plain)
        store, registry = JobStore(client, Settings()), NodeRegistry(client)
        registry.register(NodeInfo(id="n1", model="tiny"))
        claimed = store.claim("tiny", "n1")
        assert claimed is not None
        store.heartbeat(claimed.id, claimed.token, phase=Phase.DENOISING, step=1, progress=0.5)
        assert store.finish(claimed.id, claimed.token, result(job.id, 1)).terminal
        replicated = JobStore(client, Settings(redis_wait_replicas=1, redis_wait_ms=1))
        with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):  # there is none, but it may ask
            replicated.finish(claimed.id, claimed.token, result(job.id, 1))
        assert len(Outbox(client, Settings()).for_job(job.id)) == 3  # callback 1, endpoint 2
        Timings(client).learn(image, {"denoising": 1.0})
        for command in (
            ("HGETALL", "reel:apikeys"),
            ("HGETALL", "reel:apikeys:hashes"),
            ("HGETALL", "reel:apikeys:endpoints"),
            ("HSET", "reel:apikeys:hashes", "x", "key_mine 0"),
            ("EVAL", "return redis.call('HGETALL', 'reel:apikeys')", 0),
            ("EVAL", "return redis.call('HSET', 'reel:apikeys', 'key_mine', '{}')", 0),
            ("RENAME", "reel:apikeys", "reel:node:x"),
            ("COPY", "reel:apikeys", "reel:node:x"),
            ("ACL", "SETUSER", "node", "~*"),
            ("CONFIG", "GET", "*"),
            ("FLUSHALL",),
            ("KEYS", "*"),
            ("MONITOR",),
            ("GET", "other"),
        ):
            with pytest.raises(Exception, match=r"(?i)permission|can't access"):
                client.execute_command(*command)
        with pytest.raises(Exception, match=r"(?i)permission"):
            KeyStore(client, "x" * 40).create("mine")
        assert "used_memory" in _as("celery", plain).execute_command("INFO")


def test_s3_users_may_do_their_part_and_no_more(tmp_path: Path) -> None:
    """With a real S3: a node reads input images and writes videos, and that is all."""
    make(tmp_path / "secrets")
    with s3_server((tmp_path / "secrets" / "s3.json").read_text()) as server:

        def store(role: str) -> ObjectStore:
            secret = (tmp_path / "secrets" / f"s3_secret_{role}").read_text().strip()
            return ObjectStore(
                Settings(s3_endpoint=server.endpoint, s3_access_key=role, s3_secret_key=SecretStr(secret))
            )

        api, node, celery = store("api"), store("node"), store("celery")
        celery.ensure_bucket()
        put_when_ready(api, "uploads/key_a/img.png")
        assert node.ready()
        assert node.get_bytes("uploads/key_a/img.png") == b"x"
        node.put_bytes("jobs/j/1/video.mp4", b"v", "video/mp4")
        node.put_bytes("jobs/j/2/video.mp4", b"v", "video/mp4")
        assert node.delete_prefix("jobs/j/2/") == 1
        assert httpx.get(api.presign_get("jobs/j/1/video.mp4")).content == b"v"
        for forbidden in (
            lambda: node.put_bytes("uploads/key_a/mine.png", b"x", "image/png"),
            lambda: node.delete("uploads/key_a/img.png"),
            lambda: node.put_bytes("elsewhere/x", b"x", "text/plain"),
            node.ensure_bucket,
        ):
            with pytest.raises(StorageUnavailable, match="AccessDenied"):
                forbidden()
        assert celery.delete_prefix("jobs/j/") == 1


def put_when_ready(store: ObjectStore, key: str) -> None:
    """Store an object; a fresh S3 takes seconds until a volume is writable."""
    end = time.monotonic() + 60
    while True:
        try:
            return store.put_bytes(key, b"x", "text/plain")
        except StorageUnavailable:
            assert time.monotonic() < end
            time.sleep(0.2)


def _as(user: str, server: RedisServer) -> Any:
    return connect(Settings(redis_url=server.url.replace("unix://", f"unix://{user}:{user}@")))


def test_secrets_are_made_once_and_closed(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    run = [sys.executable, str(INFRA / "docker/make_secrets.py"), str(folder)]
    subprocess.run(run, check=True, capture_output=True)
    assert folder.stat().st_mode & 0o077 == 0
    assert {*COMPOSE["secrets"]} == {path.name for path in folder.iterdir()}
    before = (folder / "secret_key").read_text()
    subprocess.run(run, check=True, capture_output=True)
    assert (folder / "secret_key").read_text() == before
