"""What ends a command without a traceback."""

import signal


class CliError(Exception):
    """Something the operator can act on; its text is the whole message, and the exit code is 1."""


class Interrupted(Exception):
    """A signal asked the command to stop; the exit code is 130."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
