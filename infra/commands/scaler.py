"""`reel scaler`: how many nodes each model gets, from the queue, within limits."""

from pathlib import Path
from typing import Annotated

import typer

from infra.errors import CliError
from infra.stack_env import Stack, use_stack


def scaler(
    config: Annotated[Path, typer.Option(help="Its pools, in TOML; see infra/scaler/example.toml.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do and why; change nothing.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="One pass, then end.")] = False,
    metrics_port: Annotated[int | None, typer.Option(help="Serve Prometheus metrics there.")] = None,
    stack: Stack = None,
) -> None:
    """Order, drain and remove nodes. Any number may run: one leads, the others stand by."""
    use_stack(stack, "REEL_REDIS_URL")
    from infra.scaler.config import ConfigError
    from infra.scaler.driver import DriverError
    from infra.scaler.main import run
    from jobs.settings import get_settings

    try:
        code = run(get_settings(), config, dry_run=dry_run, once=once, metrics_port=metrics_port)
    except (ConfigError, DriverError) as error:
        raise CliError(str(error)) from None
    raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(rich_help_panel="Parts of a deployment")(scaler)
