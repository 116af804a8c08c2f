"""Every figure that needs a GPU, from one command: tests first, then what they allow to be measured.

    python -m benchmarks.figures [--out out/figures] [--budget 1700] [--only kernels models ...]

Lanes run side by side, one GPU each; what needs all GPUs comes after them. In a lane a job that fails ends
the lane: no figure is made by kernels whose tests failed. What a job says goes to NAME.log in `--out`, its
figures to NAME.json. A job that was done is not done again until its NAME.done is removed, and none begins
that would not end within `--budget` seconds, so a machine that is lent for minutes is used in several calls.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks._sections import kill_group

# A machine that is lent for its GPUs may lack the other suites' plugins, so their settings are left out.
PYTEST = ("-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "--confcutdir", "tests/gpu")


@dataclass(frozen=True)
class Job:
    """One command of this Python; `{out}` in it is the folder and `{gpus}` the number of GPUs."""

    name: str
    words: tuple[str, ...]
    seconds: float  # that it may take; it is ended then


@dataclass(frozen=True)
class Lane:
    """Jobs in order; `gpus` is how many it needs, 0 for all."""

    name: str
    jobs: tuple[Job, ...]
    gpus: int = 1


def bench(name: str, seconds: float, *words: str, module: str = "") -> Job:
    """A benchmark that writes NAME.json."""
    return Job(
        name, ("-m", f"benchmarks.{module or name}", *words, "--json", f"{{out}}/{name}.json"), seconds
    )


KERNEL_TESTS = tuple(f"tests/gpu/test_{name}.py" for name in ("kernels", "block", "vae"))
LANES = (
    Lane(
        "kernels",
        (
            Job("kernel-tests", (*PYTEST, *KERNEL_TESTS), 240),
            Job("tune", ("-m", "benchmarks.tune"), 400),
            bench("vae", 200, "--convolutions"),
            bench("block", 260, "--shares", "8"),
            bench("lossless", 120, "--model", "models/demo"),
            bench("block-480p", 240, "--size", "480p", "--seconds", "10", module="block"),
            bench("block-5b", 240, "--model", "5B", "--seconds", "10", module="block"),
            bench("block-shares", 500, "--shares", "4", "2", "1", "--seconds", "10", module="block"),
        ),
    ),
    Lane("models", (bench("family", 590),)),
    Lane(
        "presets",
        (
            Job("preset-tests", (*PYTEST, "tests/gpu/test_eight_bit.py"), 120),
            bench("preset_speed", 330, "--seconds", "10", "--budget", "280"),
            Job("calibrate", ("-m", "benchmarks.calibrate", "--out", "{out}/calibrated.json"), 300),
        ),
    ),
    Lane(
        "parallel",
        (
            Job("parallel-tests", (*PYTEST, "tests/gpu/test_parallel.py"), 120),
            bench("parallel", 590, "--gpus", "{gpus}", "--resume", "--timeline", "{out}"),
        ),
        gpus=0,
    ),
    Lane("node", (bench("node", 590, "--gpus", "{gpus}", "--resume"),), gpus=0),
)


@dataclass
class Sitting:
    """One call's run of lanes on these GPUs."""

    out: Path
    gpus: Sequence[str]
    ends: float  # time.monotonic()
    told: list[str] = field(default_factory=list)  # a line a job, in the order they ended

    def run(self, lanes: Sequence[Lane]) -> list[str]:
        """Lanes of one GPU side by side, then those of all GPUs; returns what became of each job."""
        waiting = [lane for lane in lanes if lane.gpus]
        lock = threading.Lock()

        def serve(gpu: str) -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    lane = waiting.pop(0)
                self.lane(lane, {"CUDA_VISIBLE_DEVICES": gpu})

        threads = [threading.Thread(target=serve, args=(gpu,)) for gpu in self.gpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for lane in lanes:
            if not lane.gpus:
                self.lane(lane, {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)})
        return self.told

    def lane(self, lane: Lane, environment: Mapping[str, str]) -> None:
        """Its jobs up to the first that fails."""
        for job in lane.jobs:
            if not self.job(job, environment):
                return

    def job(self, job: Job, environment: Mapping[str, str]) -> bool:
        """Whether it is done, now or before."""
        done = self.out / f"{job.name}.done"
        if done.exists():
            return self._tell(job, "was done before", 0.0) is None
        left = self.ends - time.monotonic()
        if left < job.seconds / 2:
            self._tell(job, f"not begun: {left:.0f} s are left, it may take {job.seconds:.0f}", 0.0)
            return False
        words = [
            word.replace("{out}", str(self.out)).replace("{gpus}", str(len(self.gpus))) for word in job.words
        ]
        began = time.monotonic()
        code = self._run(job, words, environment, min(left, job.seconds))
        took = time.monotonic() - began
        postponed = self._postponed(job)
        if code == 0 and not postponed:
            done.touch()
        words_for = {
            0: f"more to do: {', '.join(postponed)}" if postponed else "done",
            None: "its time was up",
        }
        self._tell(job, words_for.get(code, f"failed, exit {code}"), took)
        return code == 0

    def _postponed(self, job: Job) -> list[str]:
        """What a resumable benchmark left for the next call, as its figures say."""
        path = self.out / f"{job.name}.json"
        return list(json.loads(path.read_text()).get("postponed", [])) if path.exists() else []

    def _run(
        self, job: Job, words: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> int | None:
        """The exit code, None if the time was up; nothing that the job started outlives it."""
        with (
            (self.out / f"{job.name}.log").open("wb") as log,
            subprocess.Popen(
                [sys.executable, *words], env={**os.environ, **environment}, stdout=log, stderr=log,
                process_group=0,
            ) as process,
        ):  # fmt: skip
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                kill_group(process.pid)

    def _tell(self, job: Job, what: str, seconds: float) -> None:
        self.told.append(f"{job.name}: {what}" + (f" ({seconds:.0f} s)" if seconds else ""))
        print(self.told[-1], file=sys.stderr, flush=True)


def main(given: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 if a job that began was not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/figures"))
    parser.add_argument("--budget", type=float, default=1700.0, help="seconds for all of this call")
    parser.add_argument("--only", nargs="+", choices=[lane.name for lane in LANES], help="lanes; else all")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    arguments = parser.parse_args(given)
    lanes = [lane for lane in LANES if not arguments.only or lane.name in arguments.only]
    if arguments.list:
        for lane in lanes:
            for job in lane.jobs:
                print(f"{lane.name:9} {job.seconds:4.0f} s  python {' '.join(job.words)}")
        return 0
    if not torch.cuda.is_available():
        sys.exit("benchmarks.figures needs CUDA GPUs; torch sees none (--list says what it would run)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpus = [str(number) for number in range(torch.cuda.device_count())]
    told = Sitting(arguments.out, gpus, time.monotonic() + arguments.budget).run(lanes)
    print("\n".join(told))
    return int(any("failed" in line or "time was up" in line for line in told))


if __name__ == "__main__":
    sys.exit(main())
