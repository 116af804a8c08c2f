"""`reel listen`: see webhooks arrive, while you write the program that will take them."""

import signal
from types import FrameType
from typing import Annotated

import typer

from infra.errors import CliError
from infra.stack_env import Stack, use_stack


def listen(
    port: Annotated[int, typer.Option(help="To listen on; 0: a free one.")] = 9000,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    secret: Annotated[
        str | None, typer.Option(envvar="REEL_WEBHOOK_SECRET", help="whsec_..., shown when the key was made.")
    ] = None,
    stack: Stack = None,
) -> None:
    """Receive webhooks, verify their signatures, print each as a JSON line.

    Use the address as a job's --callback-url.
    """
    import os

    if secret is None:
        use_stack(stack)
        secret = os.environ.get("REEL_WEBHOOK_SECRET")
    if not secret:
        raise CliError("no secret: give --secret or REEL_WEBHOOK_SECRET (shown when the API key was made)")
    from infra.receiver import Receiver

    try:
        receiver = Receiver(host, port, secret)
    except OSError as error:
        raise CliError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    except ValueError as error:
        raise CliError(f"--secret is no whsec_ secret: {error}") from None

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    typer.echo(f"listening on http://{host}:{receiver.server_address[1]}/", err=True)
    with receiver:
        try:
            receiver.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            return


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(rich_help_panel="Operate")(listen)
