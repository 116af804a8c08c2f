"""`reel up` and `reel demo`: the whole service on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from infra.stack_env import DEFAULT_DATA

Model = Annotated[
    Path | None, typer.Option(help="Checkpoint folder; else models/demo, else a tiny random checkpoint.")
]


def up(
    port: Annotated[int | None, typer.Option(help="Of the API; else 8080, or a free one.")] = None,
    nodes: Annotated[int, typer.Option(help="Nodes; GPUs are shared out among them.")] = 1,
    data: Annotated[Path, typer.Option(help="Where everything is kept between starts.")] = DEFAULT_DATA,
    model: Model = None,
) -> None:
    """Run the whole stack in the foreground until Ctrl-C.

    Prints `ready URL api-key KEY webhook-secret SECRET` when a job would run.
    """
    from infra.up import run_up

    raise typer.Exit(run_up(data.expanduser().resolve(), port, nodes, model))


def demo(
    data: Annotated[Path | None, typer.Option(help="Else .reel/demo in the project.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the MP4; else out/ in the project.")] = None,
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="Else one that suits the model.")] = None,
) -> None:
    """Make one video through every real part, check it, and stop everything. What `make demo` runs."""
    from infra.demo import run_demo

    raise typer.Exit(run_demo(data, out, model, prompt))


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(rich_help_panel="This machine")(up)
    app.command(rich_help_panel="This machine")(demo)
