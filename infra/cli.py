"""`reel`, the command line of the whole service.

Commands live in `infra/commands/`, one file a group. They import what they need when they run, so that
``reel --help`` stays fast and the API's image needs no torch.
"""

import contextlib
import sys

import typer

from infra.commands import bench, exporter, generate, listen, local, operate, parts, run, scaler
from infra.errors import CliError, Interrupted

app = typer.Typer(
    name="reel",
    help="Wan 2.2 video generation as a service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (local, generate, run, parts, scaler, exporter, operate, listen, bench):
    module.register(app)


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 with one line on standard error, or 130 after Ctrl-C."""
    sys.exit(invoke(args))


def invoke(args: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    try:
        result = app(args, prog_name="reel", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except CliError as error:
        return _complain(str(error))
    except (KeyboardInterrupt, Interrupted):
        return 130
    except BrokenPipeError:  # `reel jobs | head`
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 1
    except Exception as error:
        from infra.explain import explain

        line = explain(error)
        if line is None:
            raise  # a mistake of ours: its traceback is wanted
        return _complain(line)


def _complain(line: str) -> int:
    print(f"reel: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
