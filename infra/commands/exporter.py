"""`reel exporter`: metrics of jobs and nodes, read from Redis."""

import signal
import sys
from typing import Annotated

import typer

from infra.stack_env import Stack, use_stack


def exporter(
    port: Annotated[int, typer.Option(help="Where Prometheus finds /metrics.")] = 9102, stack: Stack = None
) -> None:
    """Serve what happened to jobs and nodes to Prometheus. Run exactly one."""
    use_stack(stack, "REEL_REDIS_URL")
    from infra.prometheus.exporter import run
    from jobs.settings import get_settings

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    raise typer.Exit(run(get_settings(), port))


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(rich_help_panel="Parts of a deployment")(exporter)
