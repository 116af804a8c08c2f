"""The actors' output, brought to the supervisor's stderr through a FIFO instead of Ray's log files."""

import contextlib
import os

from jobs.log import setup_logging
from worker.plan import NodePlan


def join_logs(plan: NodePlan) -> None:
    """Send this process's stdout and stderr into the plan's log pipe, and set up structured logging on it."""
    with contextlib.suppress(OSError):  # a supervisor that is gone takes us with it in a moment anyway
        pipe = os.open(plan.log_pipe, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(pipe, True)
        for number in (1, 2):
            os.dup2(pipe, number)
        os.close(pipe)
    setup_logging("node", plan.settings.log_level)
