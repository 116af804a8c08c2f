"""Command lines as the real `reel` parses them, without running them."""

from typing import Any

import typer.main

from infra.cli import app


def parse_command(words: list[str]) -> None:
    """Parse as the real CLI would, without running it."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("reel", list(words))
    while context.protected_args if hasattr(context, "protected_args") else context._protected_args:
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "resolve_command"):
            return
