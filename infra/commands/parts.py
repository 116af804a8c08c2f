"""`reel api`, `reel node`, `reel celery`: the parts as deployments run them, set by ``REEL_*``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from infra.commands import fields
from infra.errors import CliError


class CeleryRole(StrEnum):
    """What a Celery process does."""

    WORKER = "worker"
    BEAT = "beat"
    ALL = "all"


def api() -> None:
    """Serve the REST API and the page. Settings come from REEL_*."""
    from api.serve import run
    from jobs.settings import get_settings

    run(get_settings())


def node(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint to serve.")],
    name: Annotated[str | None, typer.Option(help="The model's public name; else the checkpoint's.")] = None,
    weights: fields.Weights = None,
) -> None:
    """Serve one model on this machine's GPUs: claim jobs, run them, publish the videos."""
    from infra.models import given_model
    from jobs.settings import get_settings
    from worker.serve import run_node

    settings = get_settings()
    if weights is not None:
        settings = settings.model_copy(update={"weights": weights.value})
    if settings.weights == "8bit" and name is None:
        # Any node of a model's name claims its jobs: this one would take lossless ones and fail them.
        raise CliError(
            "a node that holds 8-bit weights alone (--weights, REEL_WEIGHTS) needs a --name of its own, "
            f"such as --name {model.name}-8bit: jobs for one name go to any node of that name"
        )
    raise typer.Exit(run_node(settings, given_model(model), name))


def celery(
    role: Annotated[CeleryRole, typer.Argument(help="worker runs tasks, beat schedules, all does both.")] = (
        CeleryRole.ALL
    ),
) -> None:
    """Deliver webhooks, sweep lost leases, clean up. Run exactly one beat."""
    from jobs.settings import get_settings
    from worker.serve import run_celery

    raise typer.Exit(run_celery(get_settings(), role.value))


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(rich_help_panel="Parts of a deployment")(api)
    app.command(rich_help_panel="Parts of a deployment")(node)
    app.command(rich_help_panel="Parts of a deployment")(celery)
