"""The family at full size on one GPU: memory, a real step of each expert, decoding, loading, warm-up.

    python -m benchmarks.family [--sections a14b 5b jobs ...] [--seconds 570] [--json FILE] [--folder DIR]

Weights are random, shapes are the published ones. Each section runs in a process of its own, so that one
that fails spoils no other; what failed is written down as such. Figures go to `--json` as soon as they
exist, so that a run that is cut off keeps them. No section runs on after `--seconds`; they come in this
order:

a14b       both experts, text encoder and VAE on the device: the memory plan against the real peak, one
           guided 1280*720 x 81 step of each expert, one decode of 81 frames, the text
5b         TI2V-5B: one guided 1280*704 x 121 step without and with an image, one decode
jobs       ten equal short jobs after a warm-up, in a fresh process with nothing compiled
load       writes an fp32 transformer of `--gigabytes` in 12 shards and loads it in bf16, against a plain
           read of the same files: cold (page cache dropped, where that can be) and warm
restarted  `jobs` again in a process that finds what that one compiled
unwarmed   `jobs` with nothing compiled and no warm-up

`--tiny` runs everything on small models, also on a CPU: a rehearsal, not a measurement.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks._disk import in_memory
from benchmarks._family_bench import Bench, Emit, failed, say
from benchmarks._family_load import load_section
from benchmarks._family_model import model_section, ten_jobs
from benchmarks._sections import run_section, speak, write_json
from engine.compiled import keep_compiled

SECTIONS = ("a14b", "5b", "jobs", "load", "restarted", "unwarmed")
JOBS = ("jobs", "restarted", "unwarmed")
GIGABYTES, TINY_GIGABYTES = 28.0, 1e-3
SHARE = 0.6  # of the whole time at the most for one section, so that one that hangs leaves some to the others


def run_here(name: str, bench: Bench, folder: Path, gigabytes: float) -> None:
    """One section in this process; `folder` is for the files of `load`."""
    if name == "a14b":
        model_section(bench, "A14B", "branches")
    elif name == "5b":
        model_section(bench, "5B", "resident")
    elif name == "load":
        load_section(bench, folder, gigabytes)
    else:
        ten_jobs(bench, warm=name != "unwarmed")


def child(name: str, emit: Emit, arguments: argparse.Namespace) -> None:
    """A section's process: its figures and how it failed go up the pipe."""
    try:
        bench = Bench(emit, tiny=arguments.tiny, seconds=arguments.seconds)
        emit("device", torch.cuda.get_device_name() if bench.on_gpu else "cpu")
        run_here(name, bench, arguments.folder, arguments.gigabytes)
    except Exception as error:
        traceback.print_exc()
        emit("failed", failed(error)["failed"])
        sys.exit(1)


@dataclass
class Run:
    """All sections one after another; `document` is what is known so far."""

    arguments: argparse.Namespace
    document: dict[str, Any]
    scratch: Path  # compiled kernels, and the files of `load` where it is a disk
    began: float = field(default_factory=time.perf_counter)

    def section(self, name: str) -> None:
        """One section; whatever happens to it is written down and the next one can go on."""
        result: dict[str, Any] = {}
        self.document["sections"][name] = result
        began = time.perf_counter()
        try:
            limit = self._limit(name)
            if name == "restarted" and "tenth" not in self.document["sections"].get("jobs", {}):
                raise RuntimeError("it needs what `jobs` compiled, and that didn't run to its end")
            failure = self._in_a_process(name, limit, result)
            if failure is not None:
                result.setdefault("failed", failure)
        except Exception as error:
            result |= failed(error)
        result["wall_seconds"] = time.perf_counter() - began
        say(f"{name}: {result.get('failed', 'done')} ({result['wall_seconds']:.0f} s)")
        self.save()

    def save(self) -> None:
        """Write down what is known so far."""
        if self.arguments.json:
            write_json(self.arguments.json, self.document)

    def _limit(self, name: str) -> float:
        """Seconds that a section may take; TimeoutError where there are none."""
        seconds = self.arguments.seconds
        left = seconds - (time.perf_counter() - self.began)
        if left <= 0:
            raise TimeoutError("no time was left for it")
        last = [one for one in SECTIONS if one in self.arguments.sections][-1]
        return float(left if name == last else min(left, SHARE * seconds))

    def _in_a_process(self, name: str, limit: float, result: dict[str, Any]) -> str | None:
        def on_part(part: str, value: Any) -> None:
            result[part] = value
            self.save()

        environment = dict(os.environ) | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        if name in JOBS:
            kept = ("_CACHE_DIR", "CACHE_PATH")
            environment = {key: value for key, value in environment.items() if not key.endswith(kept)}
            keep_compiled(self.scratch / ("jobs" if name == "restarted" else name), environment)
        with tempfile.TemporaryDirectory(dir=self._place() if name == "load" else None) as folder:
            command = [sys.executable, "-m", "benchmarks.family", "--here", name, "--seconds", str(limit)]
            command += ["--gigabytes", str(self.arguments.gigabytes), "--folder", folder]
            command += ["--tiny"] if self.arguments.tiny else []
            return run_section(command, environment, limit, on_part)

    def _place(self) -> Path:
        """Where `load` writes: as asked, else the temporary folder, else here if that one is in memory."""
        if self.arguments.folder:
            return Path(self.arguments.folder)
        return Path() if in_memory(self.scratch) and not in_memory(Path()) else self.scratch


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--gigabytes", type=float, help=f"that `load` writes, {GIGABYTES:g} unless tiny")
    parser.add_argument("--folder", type=Path, help="where `load` writes; else a temporary folder on a disk")
    parser.add_argument("--tiny", action="store_true", help="small models: a rehearsal")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all sections together")
    parser.add_argument("--json", type=Path, help="write the figures here, each as soon as it exists")
    parser.add_argument("--here", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.gigabytes is None:
        arguments.gigabytes = TINY_GIGABYTES if arguments.tiny else GIGABYTES
    if arguments.here:
        child(arguments.here, speak(), arguments)
        return
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks.family at full size needs a CUDA GPU; torch sees none (--tiny rehearses)")
    # A run that is told to end ends its section's processes and leaves no files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # The device's name is the sections' to tell: asked here, it would take memory from them.
    document = {"torch": torch.__version__, "tiny": arguments.tiny, "sections": {}}
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(arguments, document, Path(scratch))
        for name in (name for name in SECTIONS if name in arguments.sections):
            run.section(name)
    print(json.dumps(document, indent=1), flush=True)


if __name__ == "__main__":
    main()
