"""Which of a cluster's processes it can't live without, and that their end is noticed."""

import subprocess
import time
from typing import Any

import psutil
import pytest

from worker import cluster
from worker.host import ClusterBroke, check


class Process:
    """A process with this command line; None: one that has ended."""

    def __init__(self, *words: str | None) -> None:
        self.words = words

    def cmdline(self) -> list[str]:
        if self.words == (None,):
            raise psutil.NoSuchProcess(1)
        return [word for word in self.words if word]


WHOLE = [
    Process("/opt/ray/core/src/ray/gcs/gcs_server", "--port=0"),
    Process("/opt/ray/core/src/ray/raylet/raylet", "--store=x"),
    Process("ray::DashboardAgent "),
    Process("ray::RuntimeEnvAgent"),
]
OTHERS = [
    Process("python", "raylet"),
    Process("tail", "-f", "/tmp/gcs_server"),
    Process("ray::RankActor"),
    Process(),
    Process(None),
]


def test_the_vital_processes_are_known_by_program_or_title(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_family", lambda: [*OTHERS, *WHOLE, *OTHERS])
    found: list[Any] = list(cluster.vital_processes(0.0))
    assert found == WHOLE


def test_one_that_starts_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([WHOLE[:2], WHOLE[:3], WHOLE])
    monkeypatch.setattr(cluster, "_family", lambda: next(looks))
    assert len(cluster.vital_processes(10.0)) == len(WHOLE)


@pytest.mark.parametrize("missing", range(4))
def test_a_cluster_that_lacks_one_is_none(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_family", lambda: WHOLE[:missing] + WHOLE[missing + 1 :])
    with pytest.raises(RuntimeError, match=cluster.VITAL[missing]):
        cluster.vital_processes(0.0)


def test_an_ended_process_breaks_the_cluster_before_anybody_has_waited_for_it() -> None:
    with subprocess.Popen(["sleep", "600"]) as one:
        process = psutil.Process(one.pid)
        check([process])
        one.kill()
        end = time.monotonic() + 10
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(ClusterBroke, match=f"process {one.pid} .*ended"):
            check([psutil.Process(), process])
