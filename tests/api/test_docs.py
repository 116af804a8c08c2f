"""Every example of docs/api.md runs as it stands: curl, Python and JavaScript, on a real socket."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import playwright
import pytest
import standardwebhooks
from PIL import Image

from jobs import addresses
from jobs.client import RedisClient
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import Running, finish
from tests.support.jobs import card

DRIVER = Path(playwright.__file__).parent / "driver"
DOC = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
SECRET = "whsec_" + "A" * 43 + "="


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def receivers(language: str, runs: bool) -> list[str]:
    """The blocks of a language that run by themselves, or those that define a webhook receiver."""
    return [block for block in blocks(language) if ("receive(" in block) != runs]


@contextlib.contextmanager
def worker(store: JobStore, settings: Settings) -> Iterator[None]:
    """What a node does, through the store alone, for every job that comes."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.05):
            if any(row.waiting for row in store.queue_stats()):
                finish(store, settings)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def env(
    client: httpx.Client, running: Running, redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """What the page tells its reader to export; a model that takes images; a name that is public."""
    NodeRegistry(redis).publish_model(card(task="ti2v"))
    monkeypatch.setattr(addresses, "_getaddrinfo", lambda host, port: ["1.1.1.1"])
    key = client.headers["authorization"].split()[1]
    path = os.environ["PATH"]
    return {"REEL_API_URL": running.url, "REEL_API_KEY": key, "PATH": path, "PYTHONWARNINGS": "ignore"}


def run(command: list[str], env: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_curl(env: dict[str, str], store: JobStore, settings: Settings, tmp_path: Path) -> None:
    scripts = blocks("sh")
    assert len(scripts) == 6
    with worker(store, settings):
        answers: list[str] = []
        for script in scripts:
            answers.append(run(["bash", "-euo", "pipefail", "-c", script], env, tmp_path))
            env.setdefault("JOB", json.loads(answers[0])["id"])
    assert (tmp_path / "video.mp4").read_bytes() == b"not really a video"
    assert json.loads(answers[1])["state"] == "succeeded"
    assert "event: job.succeeded" in answers[2]
    assert [job["id"] for job in json.loads(answers[4])["data"]] == [env["JOB"]]
    assert json.loads(answers[5])["secret"].startswith("whsec_")


def test_python(env: dict[str, str], store: JobStore, settings: Settings, tmp_path: Path) -> None:
    scripts = receivers("python", runs=True)
    assert len(scripts) == 4
    out = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(out, "PNG")
    (tmp_path / "first.png").write_bytes(out.getvalue())
    with worker(store, settings):
        printed = "".join(run([sys.executable, "-c", script], env, tmp_path) for script in scripts)
    assert "succeeded 100%" in printed
    for name in ("video.mp4", "fox.mp4"):
        assert (tmp_path / name).read_bytes() == b"not really a video"
    assert any(job.request.image for job in store.list("*")[0])


def node_js() -> str:
    """The machine's, else the one that Playwright brings along."""
    found = shutil.which("node", path=os.pathsep.join((os.environ["PATH"], str(DRIVER))))
    assert found is not None, f"no node on the PATH and none in {DRIVER}"
    return found


def test_javascript(env: dict[str, str], store: JobStore, settings: Settings, tmp_path: Path) -> None:
    scripts = receivers("js", runs=True)
    assert scripts
    with worker(store, settings):
        for script in scripts:
            (tmp_path / "example.mjs").write_text(script)
            said = run([node_js(), str(tmp_path / "example.mjs")], env, tmp_path)
    assert "succeeded 100 %" in said
    assert httpx.get(said.split()[-1]).content == b"not really a video"


def delivery(age: float = 0.0) -> tuple[str, dict[str, str]]:
    """A signed body, `age` seconds old."""
    body, then = '{"type":"job.succeeded","data":{"id":"jöb"}}', datetime.now(UTC) - timedelta(seconds=age)
    signature = standardwebhooks.Webhook(SECRET).sign("msg_1", then, body)
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(then.timestamp()))}
    return body, headers | {"webhook-signature": f"v1,AAAA {signature}"}


BAD = [("changed", lambda body, headers: (body.replace("jöb", "job"), headers)),
       ("another id", lambda body, headers: (body, headers | {"webhook-id": "msg_2"})),
       ("old", lambda body, headers: delivery(301))]  # fmt: skip


def test_the_python_receiver() -> None:
    (block,) = receivers("python", runs=False)
    names: dict[str, object] = {}
    exec(compile(block, "api.md", "exec"), names)
    receive = names["receive"]
    assert callable(receive)
    body, headers = delivery()
    assert receive(body.encode(), headers, SECRET)["type"] == "job.succeeded"
    for _, spoil in BAD:
        with pytest.raises(standardwebhooks.webhooks.WebhookVerificationError):
            receive(*spoil(body, headers), SECRET)


def test_the_javascript_receiver(tmp_path: Path) -> None:
    (block,) = receivers("js", runs=False)
    (tmp_path / "receive.mjs").write_text(block)
    body, headers = delivery()
    cases = [(body, headers), *(spoil(body, headers) for _, spoil in BAD)]
    script = f"""import {{ receive }} from "./receive.mjs";
for (const [body, headers] of {json.dumps(cases)}) {{
  try {{ console.log(receive(body, headers, "{SECRET}").type); }} catch (e) {{ console.log(e.message); }}
}}"""
    (tmp_path / "main.mjs").write_text(script)
    said = run([node_js(), str(tmp_path / "main.mjs")], {"PATH": os.environ["PATH"]}, tmp_path)
    assert said.splitlines() == ["job.succeeded", "forged", "forged", "too old"]
