"""`reel` run in this process."""

from collections.abc import Callable

import pytest

from infra.cli import invoke

Reel = Callable[..., str]


def reel_group(group: str, capsys: pytest.CaptureFixture[str]) -> Reel:
    """Runs `reel GROUP ...`, expecting the exit status `code` (0), and gives what it printed."""

    def run(*args: str, code: int = 0) -> str:
        capsys.readouterr()
        assert invoke([group, *args]) == code
        seen = capsys.readouterr()
        return seen.out + seen.err

    return run
