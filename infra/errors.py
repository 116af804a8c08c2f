"""The one error that the command line shows as a single line, without a traceback."""


class CliError(Exception):
    """Something the operator can act on; its text is the whole message, and the exit code is 1."""
