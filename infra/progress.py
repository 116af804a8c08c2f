"""A job's progress at the terminal: a live bar in a terminal, plain lines anywhere else."""

import sys
import time
from typing import Any

PLAIN_SECONDS = 2.0  # between lines of equal phase


class JobProgress:
    """Shows one job after another reading of it. Use as a context manager."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last = ("", 0.0)
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=32),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self._bar.add_task("queued", total=1.0, note="")

    def __enter__(self) -> "JobProgress":
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def show(self, job: dict[str, Any]) -> None:
        """Show the job's state now."""
        phase = job["phase"] if job["state"] == "running" and job.get("phase") else job["state"]
        note = note_of(job)
        if self._live:
            self._bar.update(self._task, description=f"{phase:<10}", completed=job["progress"], note=note)
            return
        said, at = self._last
        now = time.monotonic()
        if phase != said or now - at >= PLAIN_SECONDS:
            self._last = (phase, now)
            print(f"{phase:<10} {job['progress']:4.0%}  {note}".rstrip(), file=sys.stderr, flush=True)


def note_of(job: dict[str, Any]) -> str:
    """What else is worth a word: place in the queue, step, time left, earlier attempts."""
    words = []
    if job["state"] == "queued" and job.get("queue_position") is not None:
        words.append(f"{job['queue_position']} ahead")
    if job["state"] == "running":
        if job.get("phase") == "denoising":
            words.append(f"step {job['step']}/{job['request']['sampling_steps']}")
        if job.get("eta_seconds") is not None:
            words.append(f"about {job['eta_seconds']:.0f} s left")
    if job.get("attempts"):
        words.append(f"{job['attempts']} failed attempt(s)")
    return ", ".join(words)


def end_of(job: dict[str, Any]) -> str | None:
    """Why an ended job has no video, in one line; None when it has one."""
    if job["state"] == "succeeded":
        return None
    error = job.get("error")
    if error:
        return f"job {job['id']} {job['state']}: {error['title']}: {error['detail']}"
    return f"job {job['id']} {job['state']}"
