"""Running a cloud's own command line tool, with a time limit and one line for what went wrong."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from infra.scaler.driver import DriverError

SECONDS = 120.0  # `sky status --refresh` asks every cloud
TAIL = 300  # characters of a tool's complaint that are kept


def call(
    argv: Sequence[str],
    *,
    text: str | None = None,
    seconds: float = SECONDS,
    env: Mapping[str, str] | None = None,
) -> str:
    """The tool's standard output. env: beside this process's own.

    Raises DriverError when it is missing, fails or takes longer than `seconds`.
    """
    try:
        done = subprocess.run(
            argv, input=text, capture_output=True, text=True, timeout=seconds, check=False,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
    except FileNotFoundError:
        raise DriverError(f"{argv[0]} is not installed here: install it, or choose another driver") from None
    except subprocess.TimeoutExpired:
        raise DriverError(f"`{argv[0]} {argv[1]}` took longer than {seconds:.0f} s") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-TAIL:]
        raise DriverError(f"`{argv[0]} {argv[1]}` ended with {done.returncode}: {said}")
    return done.stdout


def parse(argv: Sequence[str], text: str) -> Any:
    """The tool's output as JSON; leading lines that are not JSON (notices, hints) are skipped."""
    starts = [place for place in (text.find("\n["), text.find("\n{")) if place >= 0]
    for start in (0, *sorted(starts)):
        try:
            return json.loads(text[start:])
        except ValueError:
            continue
    raise DriverError(f"`{argv[0]} {argv[1]}`: got {text[:80]!r}, expected JSON")
