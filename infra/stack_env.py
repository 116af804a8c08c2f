"""How commands on the same machine find a running local stack without a list of exports.

`reel up` writes ``<data>/stack.env`` (mode 0600): the settings of an operator's shell. Commands read it when
the environment says nothing itself, and a shell can ``source`` it.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from infra.errors import CliError
from infra.state import write_private

DEFAULT_DATA = Path(".reel/up")
FILE = "stack.env"
Stack = Annotated[
    Path | None,
    typer.Option(
        "--stack",
        help=f"Data dir of a local stack; else REEL_* variables, else {DEFAULT_DATA}, if there.",
    ),
]


def write_stack_env(data_dir: Path, values: Mapping[str, str]) -> None:
    """Write the file that `use_stack` reads."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in sorted(values.items())]
    write_private(data_dir / FILE, "".join(lines))


def use_stack(stack: Path | None, *needed: str) -> None:
    """Fill in missing REEL_* variables from a local stack, if one is named or one is here.

    needed: the variables that the command cannot do without; when any is set in the environment, the
    stack in the default place is not looked at. Raises CliError if the named stack was never started.
    """
    if stack is None:
        if any(name in os.environ for name in needed) or not (DEFAULT_DATA / FILE).exists():
            return
        stack = DEFAULT_DATA
    try:
        text = (stack / FILE).read_text()
    except OSError as error:
        raise CliError(
            f"--stack: {stack} has no {FILE} ({error.strerror}): start it with `reel up`"
        ) from None
    explicit = stack is not DEFAULT_DATA
    for word in shlex.split(text):
        name, found, value = word.partition("=")
        if found and (explicit or name not in os.environ):
            os.environ[name] = value
