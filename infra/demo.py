"""`make demo`: one video through every real part, checked at every hand-over.

REST -> Redis queue -> Ray node -> engine -> MP4 -> S3 -> signed webhook, on a stack that is started for
it and stopped after it. Its data stays in ``.reel/demo``, so the second demo starts faster.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.client import TERMINAL, ReelClient
from infra.errors import CliError, Interrupted
from infra.local import LocalConfig, LocalStack, running
from infra.models import PROJECT
from infra.progress import JobProgress, end_of

PROMPT = "A large red star glides to the right while spinning, under a starry sky"
WEBHOOK_SECONDS = 30.0


@dataclass(frozen=True)
class Checked:
    """The finished video as it was found to be."""

    path: Path
    summary: str


def say(text: str) -> None:
    """A line of progress, on standard error."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def run_demo(data: Path | None, out: Path | None, model: Path | None, prompt: str | None) -> int:
    """Run the demo; the exit code. Raises CliError with the reason and the logs' ends on any failure."""
    started = time.monotonic()
    data_dir = (data or PROJECT / ".reel" / "demo").expanduser().resolve()
    out_dir = (out or PROJECT / "out").expanduser().resolve()
    say("starting Redis, S3, the API, Celery, a webhook receiver and a Ray node")
    try:
        with running(LocalConfig(data_dir, port=0, model=model, receiver=True), say) as stack:
            say(f"ready after {time.monotonic() - started:.1f} s at {stack.url}")
            try:
                checked = _one_video(stack, prompt or PROMPT, out_dir)
            except CliError as error:
                raise CliError(f"{error}\n{_log_tails(stack)}") from None
            say("stopping everything")
    except Interrupted as signal:
        say(f"stopped ({signal})")
        return 130
    say(f"{checked.summary}; {time.monotonic() - started:.1f} s in all")
    print(checked.path, flush=True)
    return 0


def _one_video(stack: LocalStack, prompt: str, out_dir: Path) -> Checked:
    """Submit, follow, take the webhook, download, decode, compare."""
    with ReelClient(stack.url, stack.api_key) as client:
        submitted = time.monotonic()
        job = client.submit(
            {
                "prompt": prompt,
                "seed": 7,
                "callback_url": stack.receiver_url,
                "webhook_events": ["job.started", "job.succeeded", "job.failed"],
            }
        )
        say(f'job {job["id"]}: "{prompt}", {job["request"]["size"]}, {job["request"]["frame_num"]} frames')
        job = _follow(stack, client, job["id"])
        if failure := end_of(job):
            raise CliError(failure)
        seconds = time.monotonic() - submitted
        event = _webhook(stack, job["id"], "job.succeeded")
        say(f"webhook {event['webhook-id']} ({event['type']}): signature verified")
        path = out_dir / f"{job['id']}.mp4"
        size = client.download(client.signed_url(job["id"]), path)
        fps = _model_fps(client, job["request"]["model"])
    facts = _decoded(path, job, fps)
    return Checked(path, f"{facts}, {size / 1024:.0f} KiB, made in {seconds:.1f} s by {job['model']}")


def _follow(stack: LocalStack, client: ReelClient, job_id: str) -> dict[str, Any]:
    """Show progress until the job has ended, looking after the stack meanwhile; the job."""
    with JobProgress() as progress:
        while True:
            job = client.job(job_id)
            progress.show(job)
            if job["state"] in TERMINAL:
                return job
            stack.supervisor.pause(0.25)


def _webhook(stack: LocalStack, job_id: str, kind: str) -> dict[str, Any]:
    """The receiver's line for this job's event. Raises CliError if it didn't come, or wasn't signed right."""
    found: list[dict[str, Any]] = []

    def arrived() -> bool:
        found[:] = [
            line
            for line in _lines(stack.log("receiver"))
            if not line.get("verified") or (line.get("type") == kind and line["data"].get("id") == job_id)
        ]
        return bool(found)

    stack.supervisor.wait_for(arrived, WEBHOOK_SECONDS, f"the {kind} webhook")
    refused = [line for line in found if not line["verified"]]
    if refused:
        raise CliError(f"the receiver refused a webhook: {refused[0].get('reason')}")
    return found[0]


def _lines(log: Path) -> list[dict[str, Any]]:
    """What the receiver printed since it was started."""
    text = log.read_text(errors="replace").rpartition(" starts\n")[2]
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _model_fps(client: ReelClient, model: str) -> float:
    for card in client.call("GET", "/v1/models")["data"]:
        if card["id"] == model:
            return float(card["fps"])
    raise CliError(f"the API does not list the model {model} that just made a video")


def _decoded(path: Path, job: dict[str, Any], fps: float) -> str:
    """Decode every frame and compare with what was asked for. Raises CliError on any difference."""
    from engine.video import decode_video

    info, frames = decode_video(path)
    width, height = map(int, job["request"]["size"].split("*"))
    wanted = (job["request"]["frame_num"], width, height)
    got = (info.frames, info.width, info.height)
    if got != wanted or abs(info.fps - fps) > 0.01:
        raise CliError(
            f"{path} decodes to {got[0]} frames of {got[1]}x{got[2]} at {info.fps} fps, "
            f"expected {wanted[0]} of {wanted[1]}x{wanted[2]} at {fps}"
        )
    if int(frames.max()) == int(frames.min()):
        raise CliError(f"{path}: every pixel of every frame is {int(frames.min())}: an empty picture")
    return f"{info.frames} frames of {info.width}x{info.height} at {info.fps:g} fps"


def _log_tails(stack: LocalStack) -> str:
    parts = [part for part in stack.supervisor.parts if part.spec.name not in ("redis", "weed")]
    tails = [f"the end of {part.spec.log}:\n{part.log_tail(6)}" for part in parts]
    return "\n".join(tails)
