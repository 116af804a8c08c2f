"""`reel bench`: run a benchmark by name; they live in `benchmarks/`, one file a claim."""

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from infra.errors import CliError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def available() -> dict[str, Path]:
    """Benchmarks by name: files of `benchmarks/` (and one level below) that run as programs."""
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("*/*.py")]
    return {
        "/".join(path.relative_to(FOLDER).with_suffix("").parts): path
        for path in sorted(files)
        if not path.name.startswith("_") and "__main__" in path.read_text()
    }


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without it, the list.")] = None,
) -> None:
    """Run a benchmark; arguments after its name are its own."""
    found = available()
    if name is None:
        for known in found:
            typer.echo(known)
        if not found:
            raise CliError(f"no benchmarks in {FOLDER}")
        return
    if name not in found:
        raise CliError(f"no benchmark {name!r}; there are: {', '.join(found) or 'none'}")
    sys.argv = [str(found[name]), *context.args]
    sys.path.insert(0, str(FOLDER.parent))
    runpy.run_path(str(found[name]), run_name="__main__")


def register(app: typer.Typer) -> None:
    """Add this command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=settings, rich_help_panel="Operate")(bench)
