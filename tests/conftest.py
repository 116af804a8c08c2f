"""What holds for every test: no settings or proxies from the developer's shell, few threads, one seed."""

import os
import random
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import settings

# Before torch is imported anywhere: tiny tensors are slower on many threads.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Before triton is imported anywhere, since its own library is compiled or interpreted at that moment.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
for _name in list(os.environ):
    if (_name.startswith(("REEL_", "AWS_")) and not _name.startswith("REEL_TEST_")) or _name.lower() in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        del os.environ[_name]
# An S3 client without keys would ask the cloud's metadata service for some, where there may be no cloud.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

_strayed: list[str] = []


def _stay_here(event: str, args: tuple[Any, ...]) -> None:
    if event != "socket.connect" or args[0].type != socket.SOCK_STREAM or not isinstance(args[1], tuple):
        return
    host, port = args[1][:2]
    if host == "localhost" or _is_ours(host, args[0].family):
        return
    _strayed.append(f"{host}:{port}")
    raise ConnectionRefusedError(f"a test connects to {host}; tests stay on this machine")


def _is_ours(host: str, family: int) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


sys.addaudithook(_stay_here)


@pytest.fixture(autouse=True)
def no_other_machine() -> Iterator[None]:
    """No test of this process connects to another machine; one that catches the refusal fails as well."""
    yield
    strayed, _strayed[:] = _strayed[:], []
    assert strayed == []


# `make test &`: a shell lets background jobs ignore Ctrl-C, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SEED = int(os.environ.get("REEL_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
settings.register_profile("reel", deadline=None, print_blob=True)  # busy machines: no time limits per example
settings.load_profile("reel")
# Lines of servers in this process go where pytest captures them, not between its dots.
structlog.configure(logger_factory=structlog.stdlib.LoggerFactory())


def pytest_report_header() -> str:
    return f"seed {SEED}: repeat with REEL_TEST_SEED={SEED}"


@pytest.fixture
def rng() -> random.Random:
    """Random numbers of this run's seed, printed in the header and beside a failure."""
    print(f"seed {SEED}: repeat with REEL_TEST_SEED={SEED}")
    return random.Random(SEED)


_seconds: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds["/".join(report.nodeid.split("/")[:2])] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each suite took, to be compared with its budget in docs/log.md."""
    ranked = sorted(_seconds.items(), key=lambda item: -item[1])
    suites = ", ".join(f"{suite} {seconds:.0f}" for suite, seconds in ranked)
    terminalreporter.write_line(f"seconds by suite: {suites}")
