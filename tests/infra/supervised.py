"""A supervisor in a process of its own, for test_supervisor.py: what it does to itself stays there.

Usage: python -m tests.infra.supervised FOLDER CASE
"""

import sys
from pathlib import Path

from infra.errors import CliError, Interrupted
from infra.process import PartSpec
from infra.reaper import guard
from infra.state import lock_data_dir
from infra.supervisor import Supervisor

# A child with a grandchild in a session of its own, which no process group or parent-death signal reaches.
FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
print('family is up', flush=True)
time.sleep(600)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('deaf is up', flush=True)
time.sleep(600)
"""
WRONG = "print('the model is missing'); raise SystemExit(1)"
FLAKY = """
import pathlib, time
mark = pathlib.Path('flaky')
if not mark.exists():
    mark.touch()
    raise SystemExit(3)
print('flaky is up', flush=True)
time.sleep(600)
"""
CASES = {"family": [FAMILY], "deaf": [DEAF], "wrong": [FAMILY, WRONG], "flaky": [FLAKY]}


def main(folder: Path, case: str) -> int:
    """Run the case's parts until a signal."""
    import os

    try:
        lock_data_dir(folder)
        guard()
        with Supervisor(lambda text: print(text, flush=True)) as supervisor:
            for number, code in enumerate(CASES[case]):
                argv = (sys.executable, "-c", code)
                log = folder / f"part-{number}.log"
                supervisor.add(PartSpec(f"part-{number}", argv, os.environ, log, folder, stop_seconds=0.5))
            first = supervisor.parts[0]
            supervisor.wait_for(lambda: "is up" in first.log_tail(), 20, "the part", first)
            if case != "wrong":
                supervisor.ready = True
            print(f"up {first.pid}", flush=True)
            while True:
                supervisor.pause(1.0)
    except Interrupted as signal:
        print(f"interrupted {signal}", flush=True)
        return 0
    except CliError as error:
        print(f"error {error}", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
