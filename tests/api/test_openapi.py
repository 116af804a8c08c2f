"""Schemathesis over the OpenAPI document: no 5xx, no undocumented answer; docs/api.md's examples run."""

import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from api.app import create_app
from jobs.job import JobState
from jobs.keys import KeyStore, Scope
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import Running, finish, submit

DOC = Path(__file__).resolve().parents[2] / "docs" / "api.md"
DOCUMENT = create_app(Settings(secret_key="x" * 40, s3_endpoint="http://127.0.0.1:1")).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda item: f"{item.method} {item.path}")
def test_no_undocumented_answer(
    operation: Any, running: Running, keys: KeyStore, store: JobStore, node: Any
) -> None:
    """Random requests, with ids of this key's job and of another key's."""
    plain = keys.create("fuzz", (Scope.SUBMIT, Scope.READ, Scope.ADMIN), max_outstanding=5)[1]
    other = keys.create("other")[1]
    headers = {"Authorization": f"Bearer {plain}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=30) as client:
        own = str(submit(client)["id"])
        client.headers["Authorization"] = f"Bearer {other}"
        theirs = str(submit(client)["id"])

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(), job=st.sampled_from([None, own, theirs]))
    def probe(case: Any, job: str | None) -> None:
        for name in ("job_id", "video_id"):
            if job and name in (case.path_parameters or {}):
                case.path_parameters[name] = job
        sent = {name: value for name, value in (case.headers or {}).items() if name.lower() != "prefer"}
        case.headers = {**sent, **headers}  # no Prefer: each example would wait for a job that nobody runs
        if operation.path.endswith("/events"):  # endless for a live job
            case.path_parameters["job_id"] = "job_none"
        case.call_and_validate(base_url=running.url, checks=list(CHECKS), timeout=20)

    probe()


def test_the_document_describes_every_operation() -> None:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            assert operation.get("summary"), (method, path)
            assert operation.get("description"), (method, path)
            if path.startswith("/v1"):
                assert {"401", "429", "503"} <= set(operation["responses"]), (method, path)
    assert set(DOCUMENT["components"]["schemas"]["JobIn"]["properties"]) >= {"prompt", "size", "callback_url"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), re.DOTALL)


def test_the_documents_examples_run(
    client: httpx.Client, running: Running, store: JobStore, settings: Settings, tmp_path: Path
) -> None:
    """curl as written; Python as written, with a node's part played by the store between its steps."""
    key = client.headers["authorization"].split()[1]
    env = {"REEL_URL": running.url, "REEL_API_KEY": key, "PATH": "/usr/bin:/bin"}
    submit(client)
    job = finish(store, settings)
    env["JOB"] = job.id
    assert blocks("sh")
    for script in blocks("sh"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, script + done.stderr
    assert (tmp_path / "video.mp4").read_bytes() == b"not really a video"
    for waiting in store.list("*", state=JobState.QUEUED)[0]:  # the curl example's own job
        store.cancel(waiting.id)
    for script in blocks("python"):
        submit_first = script.replace("http://127.0.0.1:8080", running.url).replace("rk_...", key)
        worker = _finish_soon(store, settings)
        exec(compile(submit_first.replace("video.mp4", str(tmp_path / "p.mp4")), "api.md", "exec"), {})
        worker.join()
    assert (tmp_path / "p.mp4").read_bytes() == b"not really a video"


def _finish_soon(store: JobStore, settings: Settings) -> Any:
    import threading
    import time

    def work() -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if any(row.waiting for row in store.queue_stats()):
                finish(store, settings)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    return thread
