"""`reel generate`: a video through the service."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.commands import fields
from infra.errors import CliError
from infra.stack_env import Stack, use_stack


class PriorityFlag(StrEnum):
    """Lanes."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


def generate(
    prompt: fields.Prompt,
    image: fields.Image = None,
    out: Annotated[Path | None, typer.Option(help="The MP4 to write; else <job id>.mp4 here.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model, when there are several.")] = None,
    negative_prompt: fields.NegativePrompt = None,
    size: fields.Size = None,
    frame_num: fields.FrameNum = None,
    shift: fields.Shift = None,
    sampling_steps: fields.SamplingSteps = None,
    guide_scale: fields.GuideScale = None,
    seed: fields.Seed = None,
    sample_solver: fields.SampleSolver = None,
    loras: fields.Loras = None,
    quality: fields.Quality = None,
    priority: Annotated[PriorityFlag | None, typer.Option(help="high needs a key with that scope.")] = None,
    deadline_seconds: Annotated[float | None, typer.Option(help="Give up unless started by then.")] = None,
    callback_url: Annotated[str | None, typer.Option(help="Where webhooks go.")] = None,
    webhook_event: Annotated[list[str] | None, typer.Option(help="Such as job.started; repeatable.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, kept with it; repeatable.")] = None,
    stack: Stack = None,
) -> None:
    """Submit a job, show its progress, download the MP4.

    Reads REEL_API_URL and REEL_API_KEY; a local stack started here by `reel up` needs neither.
    """
    use_stack(stack, "REEL_API_KEY", "REEL_API_URL")
    from infra.client import ReelClient

    body: dict[str, Any] = {
        "prompt": prompt,
        "model": model,
        "negative_prompt": negative_prompt,
        "size": size,
        "frame_num": frame_num,
        "shift": shift,
        "sampling_steps": sampling_steps,
        "guide_scale": fields.parse_guide_scale(guide_scale),
        "seed": seed,
        "sample_solver": sample_solver.value if sample_solver else None,
        "loras": fields.parse_loras(loras),
        "quality": quality,
        "priority": priority.value if priority else None,
        "deadline_seconds": deadline_seconds,
        "callback_url": callback_url,
        "webhook_events": webhook_event or None,
        "metadata": dict(_pair(item) for item in metadata) if metadata else None,
    }
    with ReelClient.from_env() as client:
        if image is not None:
            body["image"] = client.upload(image)
        run_job(client, {name: value for name, value in body.items() if value is not None}, out)


def run_job(client: Any, body: dict[str, Any], out: Path | None) -> None:
    """Submit, follow and download. Ctrl-C cancels the job. Raises CliError when it ends without a video."""
    from infra.progress import JobProgress, end_of

    job = client.submit(body)
    typer.echo(f"job {job['id']}", err=True)
    try:
        with JobProgress() as progress:
            for job in client.follow(job["id"]):  # noqa: B020 -- each reading replaces the one before
                progress.show(job)
    except KeyboardInterrupt:
        client.call("POST", f"/v1/jobs/{job['id']}/cancel")
        raise CliError(f"canceled job {job['id']}") from None
    if failure := end_of(job):
        raise CliError(failure)
    target = out if out is not None else Path(f"{job['id']}.mp4")
    client.download(client.signed_url(job["id"]), target)
    typer.echo(str(target))


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise CliError(f"--metadata: got {text!r}, expected KEY=VALUE")
    return name, value


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(rich_help_panel="Make videos")(generate)
