"""Operating a deployment: jobs, nodes, drain, models, keys and the dead letter, straight from Redis."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.commands.tables import (
    JOB_COLUMNS,
    KEY_COLUMNS,
    MODEL_COLUMNS,
    NODE_COLUMNS,
    QUEUE_COLUMNS,
    job_rows,
    key_rows,
    node_rows,
    queue_rows,
)
from infra.errors import CliError
from infra.stack_env import Stack, use_stack

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.job import Job
    from jobs.keys import KeyStore
    from jobs.store import JobStore

AsJson = Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Renew it every two seconds, until Ctrl-C.")]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")]
KeyId = Annotated[str, typer.Argument(help="As `reel keys list` shows it.")]
Overlap = Annotated[float, typer.Option(min=0, help="Hours for which the old one goes on.")]
PANEL = "Operate"
WATCH_SECONDS = 2.0
keys_app = typer.Typer(help="API keys: create, list, rotate, revoke.", no_args_is_help=True)
models_app = typer.Typer(help="Models that nodes have announced: list, withdraw.")
dead_app = typer.Typer(help="The dead letter: jobs that used up their attempts.", no_args_is_help=True)


def jobs(
    state: Annotated[str | None, typer.Option(help="Such as queued or failed.")] = None,
    model: Annotated[str | None, typer.Option(help="Of this model alone.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    watch: Watch = False,
    stack: Stack = None,
) -> None:
    """List jobs of all keys, newest first; with --watch, the queue above them, live."""
    use_stack(stack, "REEL_REDIS_URL")
    from jobs.job import JobState

    if state is not None and state not in set(JobState):
        raise CliError(f"--state: got {state!r}, expected one of {', '.join(JobState)}")
    wanted = JobState(state) if state else None
    store = _store()
    if watch:
        _no_json(as_json)
        from infra.commands import live

        def look() -> "list[Table]":
            found, _ = store.list("*", state=wanted, model=model, limit=limit)
            queue = live.table("queue", QUEUE_COLUMNS, queue_rows(store.queue_stats()))
            return [queue, live.table("jobs", JOB_COLUMNS, job_rows(found, time.time()))]

        live.watch(look, WATCH_SECONDS)
    found, _ = store.list("*", state=wanted, model=model, limit=limit)
    _show_jobs(found, as_json)


def nodes(as_json: AsJson = False, watch: Watch = False, stack: Stack = None) -> None:
    """List nodes: state, what they run, how busy their GPUs are, when they were last heard of."""
    use_stack(stack, "REEL_REDIS_URL")
    from jobs.nodes import NodeRegistry

    registry = NodeRegistry(_redis())
    if watch:
        _no_json(as_json)
        from infra.commands import live

        live.watch(
            lambda: [live.table("nodes", NODE_COLUMNS, node_rows(registry.list(), time.time()))],
            WATCH_SECONDS,
        )
    found = registry.list()
    if as_json:
        _lines([node.model_dump(mode="json") for node in found])
        return
    _table(NODE_COLUMNS, node_rows(found, time.time()))


def drain(
    node: Annotated[str, typer.Argument(help="The node's id, as `reel nodes` shows it.")], stack: Stack = None
) -> None:
    """Ask a node to take no more jobs, finish what it runs, and leave."""
    use_stack(stack, "REEL_REDIS_URL")
    from jobs.nodes import NodeRegistry

    registry = NodeRegistry(_redis())
    if not registry.request_drain(node):
        known = ", ".join(item.id for item in registry.list())
        raise CliError(f"no node {node!r}; there are: {known or 'none'}")
    typer.echo(f"{node} will take no more jobs")


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: AsJson = False, stack: Stack = None) -> None:
    """List models that nodes have announced: jobs for them are accepted; and how many nodes serve each."""
    if context.invoked_subcommand is not None:
        return
    use_stack(stack, "REEL_REDIS_URL")
    from jobs.nodes import NodeRegistry

    registry = NodeRegistry(_redis())
    serving = Counter(node.model for node in registry.list() if node.state != "stopped")
    rows = [(card.name, card.task, serving[card.name]) for card in registry.models()]
    if as_json:
        _lines([dict(zip(MODEL_COLUMNS, row, strict=True)) for row in rows])
        return
    _table(MODEL_COLUMNS, [[str(value) for value in row] for row in rows])


@models_app.command("withdraw")
def withdraw_model(
    name: Annotated[str, typer.Argument(help="As `reel models` shows it.")], stack: Stack = None
) -> None:
    """Accept no more jobs for a model that no node serves, until a node announces it again."""
    use_stack(stack, "REEL_REDIS_URL")
    from jobs.nodes import NodeRegistry

    registry = NodeRegistry(_redis())
    try:
        serving = registry.retire_model(name)
    except KeyError:
        known = ", ".join(card.name for card in registry.models())
        raise CliError(f"no model {name!r}; there are: {known or 'none'}") from None
    if serving:
        who = ", ".join(node.id for node in serving)
        raise CliError(
            f"{name} is served by {who}: drain them first (a node that died is forgotten after a minute)"
        )
    typer.echo(f"{name} is withdrawn; jobs that wait for it wait on, see `reel jobs --model {name}`")


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="Repeatable: submit, read, admin, priority_high.")
    ] = None,
    max_outstanding: Annotated[
        int | None, typer.Option(min=1, help="Jobs waiting or running at once; else the service's limit.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute; else the service's limit.")
    ] = None,
    stack: Stack = None,
) -> None:
    """Make an API key. The key and its webhook secret are shown this once."""
    use_stack(stack, "REEL_REDIS_URL")
    from jobs.keys import Scope

    wanted = scope or [Scope.SUBMIT, Scope.READ]
    if unknown := [name for name in wanted if name not in set(Scope)]:
        raise CliError(f"--scope: got {unknown[0]!r}, expected one of {', '.join(Scope)}")
    record, plain, secret = _keys().create(
        name,
        tuple(Scope(scope) for scope in wanted),
        max_outstanding=max_outstanding,
        requests_per_minute=requests_per_minute,
    )
    typer.echo(f"id             {record.id}\nkey            {plain}\nwebhook secret {secret}")


@keys_app.command("list")
def list_keys(as_json: AsJson = False, stack: Stack = None) -> None:
    """List API keys, without their secrets."""
    use_stack(stack, "REEL_REDIS_URL")
    found = _keys().list()
    if as_json:
        _lines([key.model_dump(mode="json") for key in found])
        return
    _table(KEY_COLUMNS, key_rows(found))


@keys_app.command("revoke")
def revoke_key(key_id: KeyId, stack: Stack = None) -> None:
    """Make a key useless at once. Its jobs go on."""
    use_stack(stack, "REEL_REDIS_URL")
    with _known(key_id):
        _keys().revoke(key_id)
    typer.echo(f"revoked {key_id}")


@keys_app.command("rotate")
def rotate_key(key_id: KeyId, overlap_hours: Overlap = 24.0, stack: Stack = None) -> None:
    """Give a key a new value, shown this once; jobs, limits and endpoints stay with it."""
    use_stack(stack, "REEL_REDIS_URL")
    with _known(key_id):
        plain = _keys().rotate(key_id, overlap_hours * 3600)
    typer.echo(f"key            {plain}\nthe old one works for {overlap_hours:g} hours more")


@keys_app.command("rotate-secret")
def rotate_secret(key_id: KeyId, overlap_hours: Overlap = 24.0, stack: Stack = None) -> None:
    """Give a key a new webhook secret, shown this once; both sign meanwhile."""
    use_stack(stack, "REEL_REDIS_URL")
    with _known(key_id):
        secret = _keys().rotate_webhook_secret(key_id, overlap_hours * 3600)
    typer.echo(f"webhook secret {secret}\nthe old one signs as well for {overlap_hours:g} hours more")


@contextlib.contextmanager
def _known(key_id: str) -> Iterator[None]:
    """One clear line for a key that doesn't exist or can't be changed so."""
    try:
        yield
    except KeyError:
        raise CliError(f"no key {key_id!r}; `reel keys list` shows them") from None
    except ValueError as error:
        raise CliError(str(error)) from None


@dead_app.command("list")
def list_dead(limit: Limit = 20, as_json: AsJson = False, stack: Stack = None) -> None:
    """List dead jobs, latest first, with why they failed."""
    use_stack(stack, "REEL_REDIS_URL")
    found, _ = _store().dead(limit=limit)
    _show_jobs(found, as_json)


@dead_app.command("replay")
def replay(job_id: Annotated[str, typer.Argument(help="The job's id.")], stack: Stack = None) -> None:
    """Queue a dead job again with fresh attempts."""
    use_stack(stack, "REEL_REDIS_URL")
    typer.echo(f"{_store().replay(job_id).id} is queued again")


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (jobs, nodes, drain):
        app.command(rich_help_panel=PANEL)(command)
    app.add_typer(models_app, name="models", rich_help_panel=PANEL)
    app.add_typer(keys_app, name="keys", rich_help_panel=PANEL)
    app.add_typer(dead_app, name="dead", rich_help_panel=PANEL)


def _redis() -> Any:
    from jobs.client import connect
    from jobs.settings import get_settings

    client = connect(get_settings())
    client.ping()
    return client


def _store() -> "JobStore":
    from jobs.settings import get_settings
    from jobs.store import JobStore

    return JobStore(_redis(), get_settings())


def _keys() -> "KeyStore":
    from jobs.keys import KeyStore
    from jobs.settings import get_settings

    secret = get_settings().secret_key
    if secret is None:
        raise CliError("REEL_SECRET_KEY is not set: keys are hashed with it; give the API's value")
    return KeyStore(_redis(), secret.get_secret_value())


def _show_jobs(found: "Sequence[Job]", as_json: bool) -> None:
    from jobs.job import jsonable

    if as_json:
        _lines([jsonable(job) for job in found])
        return
    _table(JOB_COLUMNS, job_rows(found, time.time()))


def _no_json(as_json: bool) -> None:
    if as_json:
        raise CliError("--watch draws a table; for programs, run the command with --json in a loop")


def _lines(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        typer.echo(json.dumps(row, default=str))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; a terminal that is too narrow wraps nothing away."""
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for row in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
