"""The whole slice through `reel up`: REST, Redis, Ray, engine, S3, signed webhook; and its ways to end.

Two stacks run side by side through the whole module, since a start costs more than anything else here.
"""

import contextlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.tiny import make_tiny
from engine.video import decode_video
from infra.client import ReelClient
from infra.receiver import Receiver
from tests.integration.stack import Stack, parent_of, until
from tests.support.serving import serving

pytestmark = pytest.mark.timeout(420)
INHERITED = "an-operators-own-secret-of-40-characters"
PROMPT = "a red ball bounces over a wooden floor, close up"
LONG = {"prompt": PROMPT, "size": "96*64", "frame_num": 33, "sampling_steps": 100, "seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def stacks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Stack]]:
    """Two, started at the same time; the first from a shell that holds an operator's secret."""
    folder = tmp_path_factory.mktemp("stacks")
    inherited = {"REEL_SECRET_KEY": INHERITED}
    pair = Stack(folder / "first", model, **inherited), Stack(folder / "second", model)
    try:
        yield pair[0].wait_ready(), pair[1].wait_ready()
    finally:
        for stack in pair:
            stack.close()


@contextlib.contextmanager
def receiver_for(stack: Stack) -> Iterator[tuple[str, io.StringIO]]:
    """A webhook receiver with the stack's secret: its URL, and what it prints."""
    printed = io.StringIO()
    with serving(Receiver("127.0.0.1", 0, stack.webhook_secret, printed)) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", printed


def finish(client: ReelClient, job_id: str, seconds: float = 150.0) -> dict[str, Any]:
    """The job when it has ended."""
    deadline = time.monotonic() + seconds
    for job in client.follow(job_id, poll_seconds=0.2):
        if time.monotonic() > deadline:
            raise AssertionError(f"job still {job['state']} after {seconds} s: {job}")
    return job


def lines(printed: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.getvalue().splitlines()]


def test_a_prompt_becomes_a_video_and_a_signed_webhook(stacks: tuple[Stack, Stack], tmp_path: Path) -> None:
    stack = stacks[0]
    body = {"prompt": PROMPT, "size": "96*64", "frame_num": 5, "sampling_steps": 3, "seed": 11}
    with stack.client() as client, receiver_for(stack) as (url, printed):
        job = client.submit({**body, "callback_url": url, "webhook_events": ["job.started", "job.succeeded"]})
        assert job["state"] in ("queued", "running")
        job = finish(client, job["id"])
        assert job["state"] == "succeeded", job
        assert (job["progress"], job["attempts"], job["error"]) == (1.0, 0, None)

        assert until(lambda: len(lines(printed)) >= 2, 30), printed.getvalue()
        started, succeeded = lines(printed)
        assert [started["type"], succeeded["type"]] == ["job.started", "job.succeeded"]
        assert started["verified"] is succeeded["verified"] is True
        assert (succeeded["data"]["id"], succeeded["data"]["state"]) == (job["id"], "succeeded")

        signed = client.signed_url(job["id"])
        client.download(signed, tmp_path / "video.mp4")
    info, frames = decode_video(tmp_path / "video.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (5, 96, 64, 8.0)
    assert frames.std() > 1, "the pictures are empty"

    whole = (tmp_path / "video.mp4").read_bytes()
    assert job["result"]["bytes"] == len(whole)
    assert whole.find(b"moov") < whole.find(b"mdat"), "it can't be played before it is whole"
    part = httpx.get(signed, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert part.headers["content-type"] == "video/mp4"
    changed = signed.replace("video.mp4", "poster.jpg")
    assert httpx.get(changed).status_code == 403, "the signature holds for one object only"


def test_secrets_and_prompts_stay_out_of_every_log(stacks: tuple[Stack, Stack]) -> None:
    """One job with canaries in all its fields, and requests that fail; then every line anybody wrote."""
    stack, canary = stacks[0], f"canary{secrets.token_hex(6)}"
    state = json.loads((stack.data / "stack.json").read_text())
    with stack.client() as client, receiver_for(stack) as (url, printed):
        body = {"prompt": f"{canary} flies", "negative_prompt": canary, "frame_num": 5, "sampling_steps": 2}
        body |= {"callback_url": f"{url}?token={canary}", "metadata": {"ref": canary}}
        job = finish(client, client.submit(body)["id"])
        assert job["state"] == "succeeded"
        signed = client.signed_url(job["id"])
        hook = {"url": f"{url}?token={canary}", "description": canary}
        made = client.call("POST", "/v1/webhooks", json=hook)
        client.call("POST", f"/v1/webhooks/{made['id']}/test")
        assert until(lambda: len(lines(printed)) >= 2, 30)
        client.call("DELETE", f"/v1/webhooks/{made['id']}")
    api = httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {stack.api_key}"})
    with api:
        api.post("/v1/jobs", json={"prompt": canary * 999, canary: canary})
        api.post("/v1/jobs", content=f'{{"prompt": "{canary}', headers={"Content-Type": "application/json"})
        api.post("/v1/jobs", json={"prompt": canary, "image": f"https://127.0.0.1/{canary}"})
        api.get("/v1/jobs", params={"metadata.ref": canary})
        api.get(f"/{canary}", headers={"Authorization": f"Bearer {canary}", "Cookie": canary})
        metrics = api.get("/metrics").text
    hidden = [
        canary, stack.api_key, stack.webhook_secret, made["secret"], state["secret_key"],
        *state["redis_passwords"].values(), *state["s3_secrets"].values(), signed.rsplit("=", 1)[1],
    ]  # fmt: skip
    assert "reel_http_requests_total" in metrics
    written = [*(stack.data / "logs").rglob("*"), stack.said, *ray_logs(stack)]
    texts = {str(path): path.read_text(errors="replace") for path in written if path.is_file()}
    assert {"api.log", "node-1.log", "celery-worker.log", "redis.log", "weed.log"} <= {
        Path(name).name for name in texts
    }
    assert any("raylet" in name for name in texts), "Ray's own logs are looked at too"
    for name, text in {"metrics": metrics, **texts}.items():
        assert not [secret[:4] for secret in hidden if secret.removeprefix("whsec_") in text], name
    forbidden = [INHERITED, state["secret_key"], stack.api_key, stack.webhook_secret]
    for kind in ("redis_passwords", "s3_secrets"):
        forbidden += [state[kind][role] for role in ("api", "celery", "ops")]
    node = family(stack, stack.pid_of("node"))
    assert len(node) > 5
    for pid in node:
        known = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        assert not [secret[:4] for secret in forbidden if secret in known], "a node's own are enough"
    for part in ("api", "node-1", "celery-worker"):
        text = texts[str(stack.data / "logs" / f"{part}.log")]
        # "---": the supervisor's own mark at each start of a part
        entries = [json.loads(line) for line in text.splitlines() if not line.startswith("--- ")]
        mine = [entry for entry in entries if entry.get("job_id") == job["id"]]
        assert mine or part == "celery-worker", part
        if part == "api":
            assert all(entry["request_id"] for entry in mine)
        if part == "celery-worker":
            assert any(entry.get("delivery_id") for entry in entries)


def family(stack: Stack, root: int) -> list[int]:
    """A process of the stack and all below it."""
    found, pids = {root}, stack.pids()
    while more := {pid for pid in pids if pid not in found and parent_of(pid) in found}:
        found |= more
    return sorted(found)


def ray_logs(stack: Stack) -> list[Path]:
    """The files that the stack's Ray processes keep open, and those beside them."""
    folders = set()
    for pid in stack.pids():
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = link.readlink()
                    if target.parent.name == "logs" and "session_" in str(target):
                        folders.add(target.parent)
    return [path for folder in folders for path in folder.rglob("*")]


def test_two_stacks_share_nothing(stacks: tuple[Stack, Stack]) -> None:
    first, second = stacks
    assert first.url != second.url
    assert first.api_key != second.api_key
    assert (
        httpx.get(f"{second.url}/v1/jobs", headers={"Authorization": f"Bearer {first.api_key}"}).status_code
        == 401
    )
    with second.client() as client:
        job = client.submit({"prompt": PROMPT, "frame_num": 5, "sampling_steps": 2})
        assert finish(client, job["id"])["state"] == "succeeded"
    with first.client() as client:
        ids = [item["id"] for item in client.call("GET", "/v1/jobs")["data"]]
        assert job["id"] not in ids


def test_the_same_seed_gives_the_same_video_on_both(stacks: tuple[Stack, Stack]) -> None:
    sums = []
    for stack in stacks:
        with stack.client() as client:
            job = client.submit({"prompt": PROMPT, "frame_num": 5, "sampling_steps": 2, "seed": 3})
            sums.append(finish(client, job["id"])["result"]["sha256"])
    assert sums[0] == sums[1]


def reel(stack: Stack, *args: str) -> "subprocess.Popen[str]":
    """A `reel` command in another shell, which knows the stack by its data dir alone."""
    command = [sys.executable, "-m", "infra.cli", *args, "--stack", str(stack.data)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(processes: list["subprocess.Popen[str]"]) -> list[str]:
    """What they print, all at once since most of a command's time is Python's start; each must succeed."""
    said = [process.communicate(timeout=120) for process in processes]
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, (process.args, err)
    return [out for out, _ in said]


def test_the_command_line_works_from_another_shell(stacks: tuple[Stack, Stack], tmp_path: Path) -> None:
    stack, out = stacks[1], tmp_path / "made.mp4"
    fields = (
        "--size",
        "64*48",
        "--frame-num",
        "5",
        "--sampling-steps",
        "2",
        "--guide-scale",
        "3,4",
        "--seed",
        "5",
    )
    more = ("--shift", "3", "--sample-solver", "dpm++", "--priority", "high", "--metadata", "ref=cli")
    (made,) = answers([reel(stack, "generate", PROMPT, "--out", str(out), *fields, *more)])
    assert made.strip() == str(out)
    assert decode_video(out)[0].frames == 5
    jobs, nodes, keys, dead, fresh = answers(
        [
            reel(stack, "jobs", "--json", "--state", "succeeded"),
            reel(stack, "nodes"),
            reel(stack, "keys", "list"),
            reel(stack, "dead", "list"),
            reel(stack, "keys", "create", "a second key", "--scope", "read"),
        ]
    )
    newest = json.loads(jobs.splitlines()[0])
    assert newest["metadata"] == {"ref": "cli"}
    assert (newest["priority"], newest["request"]["sample_solver"], newest["request"]["shift"]) == (
        "high",
        "dpm++",
        3,
    )
    assert "local-1" in nodes
    assert "tiny-t2v" in nodes
    assert "local" in keys
    assert dead.splitlines()[0].startswith("id ")
    plain = next(line.split()[-1] for line in fresh.splitlines() if line.startswith("key "))
    bearer = {"Authorization": f"Bearer {plain}"}
    assert httpx.get(f"{stack.url}/v1/jobs", headers=bearer).json()["data"] == []
    assert httpx.post(f"{stack.url}/v1/jobs", headers=bearer, json={"prompt": PROMPT}).status_code == 403
    (key_id,) = [line.split()[-1] for line in fresh.splitlines() if line.startswith("id ")]
    answers([reel(stack, "keys", "revoke", key_id)])
    assert httpx.get(f"{stack.url}/v1/jobs", headers=bearer).status_code == 401


@pytest.mark.parametrize("part", ["api", "celery-worker", "redis", "weed"])
def test_a_killed_part_comes_back_and_the_next_job_works(part: str, stacks: tuple[Stack, Stack]) -> None:
    stack = stacks[0]
    pid = stack.pid_of(part)
    os.kill(pid, signal.SIGKILL)
    again = f"reel: {part} started again"
    seen = stack.said.read_text().count(again)
    assert until(lambda: stack.said.read_text().count(again) > seen, 30)
    assert stack.pid_of(part) != pid
    ready = f"{stack.url}/readyz"
    assert until(lambda: _answers(ready), 60)
    with stack.client() as client, receiver_for(stack) as (url, printed):
        job = client.submit({"prompt": PROMPT, "frame_num": 5, "sampling_steps": 2, "callback_url": url})
        assert finish(client, job["id"])["state"] == "succeeded"
        assert until(lambda: len(lines(printed)) == 1, 60)
        assert lines(printed)[0]["verified"]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_ctrl_c_gives_a_running_job_back_and_the_same_stack_finishes_it(
    stacks: tuple[Stack, Stack], model: Path
) -> None:
    stack = stacks[1]
    with stack.client() as client:
        job = client.submit(LONG)
        assert until(lambda: client.job(job["id"])["phase"] == "denoising", 60)
    assert stack.interrupt() == 0
    assert stack.processes() == []

    again = Stack(stack.data, model)
    try:
        again.wait_ready()
        assert (again.url, again.api_key, again.webhook_secret) == (
            stack.url,
            stack.api_key,
            stack.webhook_secret,
        )
        with again.client() as client:
            done = finish(client, job["id"])
            assert (done["state"], done["attempts"]) == ("succeeded", 0), (
                "given back, so no attempt was charged"
            )
    finally:
        again.close()
    assert again.processes() == []


def test_a_killed_supervisor_leaves_no_process(stacks: tuple[Stack, Stack]) -> None:
    stack = stacks[0]
    with stack.client() as client:
        client.submit(LONG)
    assert len(stack.processes()) > 8
    os.kill(stack.supervisor(), signal.SIGKILL)
    assert stack.process.wait(60) == 128 + signal.SIGKILL
    assert stack.processes() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_during_the_start_leaves_no_process(
    number: signal.Signals, model: Path, tmp_path: Path
) -> None:
    """At several moments: before anything runs, while the stores start, while Ray starts."""
    moments = (0.1, 1.0, 5.0, 10.0)
    started = [Stack(tmp_path / f"stack-{index}", model) for index in range(len(moments))]
    began = time.monotonic()
    try:
        for moment, stack in zip(moments, started, strict=True):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            stack.process.send_signal(number)
        for stack in started:
            stack.process.wait(60)
            assert stack.processes() == []
        for stack in started[2:]:  # the earlier ones may have come before Python itself was up
            assert stack.process.returncode == 130, stack.said.read_text()
            assert "Traceback" not in stack.said.read_text()
    finally:
        for stack in started:
            stack.close()
