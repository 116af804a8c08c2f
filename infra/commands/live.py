"""The live views of `reel nodes --watch` and `reel jobs --watch`: the same tables, renewed in place."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.errors import StoreUnavailable

Rows = Sequence[Sequence[str]]
STYLES = {
    "running": "cyan", "busy": "cyan", "succeeded": "green", "idle": "green", "failed": "red", "queued": "",
    "draining": "yellow", "starting": "yellow", "stopped": "dim", "canceled": "dim", "expired": "dim",
}  # fmt: skip


def table(title: str, columns: Sequence[str], rows: Rows) -> Table:
    """One table; a state's cell has its colour."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    return made


def watch(look: Callable[[], Sequence[Table]], seconds: float) -> None:
    """Show what `look` finds, again every `seconds`, until Ctrl-C. Says when Redis is away, and waits."""
    console = Console()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                shown = Group(*look(), Text(time.strftime("%H:%M:%S, Ctrl-C ends it"), style="dim"))
            except StoreUnavailable as error:
                shown = Group(Text(str(error), style="red"))
            live.update(shown, refresh=True)
            time.sleep(seconds)
