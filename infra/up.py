"""`reel up`: the local stack in the foreground."""

import sys
from pathlib import Path

from infra.errors import Interrupted
from infra.local import LocalConfig, LocalStack, running
from infra.stack_env import write_stack_env


def say(text: str) -> None:
    """A line of progress, on standard error: standard output carries the ready line alone."""
    print(f"reel: {text}", file=sys.stderr, flush=True)


def run_up(data_dir: Path, port: int | None, nodes: int, model: Path | None) -> int:
    """Run until a signal; the exit code: 0, or 130 when stopped before it was ready."""
    ready = False
    try:
        with running(LocalConfig(data_dir, port, nodes, model), say) as stack:
            write_stack_env(data_dir, stack.operator_env())
            print(ready_line(stack), flush=True)
            say(f"logs are in {data_dir / 'logs'}; stop with Ctrl-C")
            ready = True
            while True:
                stack.supervisor.pause(1.0)
    except Interrupted as signal:
        say(f"stopped ({signal})")
    return 0 if ready else 130


def ready_line(stack: LocalStack) -> str:
    """What a script waits for, and all it needs to submit a job and check its webhooks."""
    return f"ready {stack.url} api-key {stack.api_key} webhook-secret {stack.webhook_secret}"
