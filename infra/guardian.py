"""A local stack's last resort: waits for its supervisor to be gone, then kills what it left.

Run as ``python -m infra.guardian REEL_STACK=<id>`` with a pipe from the supervisor as standard input.
"""

import contextlib
import signal
import sys

import psutil

from infra.reaper import sweep


def main() -> None:
    """Wait for the end of standard input, then sweep. Deaf to the signals that stop a stack in order."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    children = []
    for line in sys.stdin.buffer:
        with contextlib.suppress(psutil.Error, ValueError):
            children.append(psutil.Process(int(line)))  # remembers its start: a pid may be used again
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    sweep(sys.argv[1], seconds=60.0)


if __name__ == "__main__":
    main()
