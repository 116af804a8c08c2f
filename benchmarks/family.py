"""The family at full size on one GPU: memory, a real step of each expert, decoding, loading, warm-up.

    python -m benchmarks.family [--sections a14b load 5b jobs] [--seconds 570] [--json FILE] [--folder DIR]

Weights are random, shapes are the published ones. Each section runs in a process of its own, so that one
that runs out of memory spoils no other; what failed is written down as such. No section begins after
`--seconds`, and none runs on after it.

a14b    both experts, text encoder and VAE on the device: the memory plan against the real peak, one guided
        1280*720 x 81 step of each expert, one decode of 81 frames
load    writes an fp32 transformer of `--gigabytes` (half an expert's blocks, 29 GB) in 12 shards and loads
        it in bf16, against a plain read of the same files: cold (page cache dropped) and warm
5b      TI2V-5B: one guided 1280*704 x 121 step with and without an image, one decode
jobs    ten equal short jobs after a warm-up, in a fresh process, in a restarted one that finds the first
        one's compiled kernels, and in a fresh one without a warm-up

`--tiny` runs everything on small models, also on a CPU: a rehearsal, not a measurement.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._disk import drop, plain_read
from benchmarks._random_model import FULL, TINY, RandomState, Shape, layout_of, random_pipeline
from engine.checkpoint_writer import write_expert
from engine.compiled import keep_compiled
from engine.conditioning import Conditioning
from engine.dit import DiT, stays_fp32
from engine.ladder import free_memory
from engine.memory import GIB, MemoryPlan, Rung, make_plan, sizes_of
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.requests import resolve
from engine.tracker import Tracker
from engine.transfer import THREADS, Meter
from engine.warmup import warm_up
from engine.weights import load_into, safetensors_files, scan

SECTIONS = ("a14b", "load", "5b", "jobs")
JOBS = 10
ROUNDS = 3  # of reading and loading, as long as LOAD_SECONDS last
LOAD_SECONDS = 150
HIGH_T, LOW_T = 950, 500  # timesteps on either side of the boundary


class Bench:
    """The device and the sizes of this run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tiny: bool = arguments.tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.vae_dtype = torch.float16 if self.on_gpu else torch.float32
        self.shapes = TINY if self.tiny else FULL

    def seconds(self, work: Any, repeats: int = 1) -> float:
        """Median wall seconds of a call, after one that isn't counted."""
        times = []
        for _ in range(1 + repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def wait(self) -> None:
        """For the device's work to end."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        """GiB since the last reset; `driver` is what the whole device has in use now, reserves included."""
        if not self.on_gpu:
            return {}
        free, total = torch.cuda.mem_get_info()
        peaks = {
            "allocated_peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_peak_gib": torch.cuda.max_memory_reserved() / GIB,
            "driver_gib": (total - free) / GIB,
            "beside_torch_gib": (total - free - torch.cuda.memory_reserved()) / GIB,
        }
        torch.cuda.reset_peak_memory_stats()
        return peaks

    def plan(self, shape: Shape, rung: Rung) -> MemoryPlan:
        """The memory plan, printed."""
        layout = layout_of(shape)
        experts = [part.entries for part in (layout.high, layout.low) if part is not None]
        sizes = sizes_of(
            experts, layout.text.entries.values(), layout.vae.entries.values(), self.dtype, self.vae_dtype
        )
        available, host = free_memory(self.device, 1)
        plan = make_plan(
            shape.spec, sizes, Mesh.single(), rung, self.dtype, self.vae_dtype,
            on_gpu=self.on_gpu, available=available, host_available=host,
        )  # fmt: skip
        say(plan.table())
        return plan


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def out_of_memory(part: str, error: BaseException) -> dict[str, str]:
    """A part that failed for lack of memory, said aloud and written down."""
    say(f"{part}: {error}")
    torch.cuda.empty_cache()
    return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def load_section(bench: Bench) -> dict[str, Any]:
    """Loading against a plain read of the same files; the two alternate."""
    config = bench.shapes["A14B"].dit
    with torch.device("meta"):
        bytes_of = [4 * p.numel() for p in DiT(replace(config, num_layers=1)).blocks[0].parameters()]
    wanted = 1e-3 if bench.tiny else bench.arguments.gigabytes
    config = replace(config, num_layers=max(1, round(wanted * 1e9 / sum(bytes_of))))
    with tempfile.TemporaryDirectory(dir=bench.arguments.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        write_expert(folder, config, "t2v", RandomState(config, bench.device), shards=12)
        paths = safetensors_files(folder)
        size = sum(path.stat().st_size for path in paths) / 1e9
        say(f"wrote {size:.2f} GB in {time.perf_counter() - began:.0f} s")
        rates: dict[str, list[float]] = {}
        threaded = f"plain, {THREADS} threads"
        for number in range(ROUNDS):
            if number and time.perf_counter() - began > LOAD_SECONDS:
                break
            for state in ("cold", "warm"):
                for kind in ("plain", "load") if number else ("plain", "load", threaded):
                    if state == "cold":
                        drop(paths)
                    if kind == "load":
                        rate = loading_rate(bench, folder, config)
                    else:
                        rate = plain_read(paths, 1 if kind == "plain" else THREADS)
                    say(f"{state} {kind}: {rate:.2f} GB/s")
                    rates.setdefault(f"{state} {kind}", []).append(rate)
        result: dict[str, Any] = {"gigabytes": size, "files": len(paths), "gb_per_s": rates}
        for state in ("cold", "warm"):
            ours, plain = (statistics.median(rates[f"{state} {kind}"]) for kind in ("load", "plain"))
            result[f"{state}_ratio_to_plain_read"] = ours / plain
            say(f"{state}: {ours / plain:.0%} of a plain read")
        return result


def loading_rate(bench: Bench, folder: Path, config: Any) -> float:
    """GB/s of files that become a model on the device; one tensor is compared with the file."""
    entries, meter = scan(safetensors_files(folder)), Meter()
    with torch.device("meta"):
        model = DiT(config)
    with meter.running():
        load_into(
            model, entries, device=bench.device, meter=meter,
            dtype_of=lambda name: torch.float32 if stays_fp32(name) else bench.dtype,
        )  # fmt: skip
    from safetensors import safe_open

    name = "blocks.0.ffn.2.weight"
    with safe_open(entries[name].path, framework="pt") as file:
        expected = file.get_tensor(name).to(bench.dtype)
    if not torch.equal(dict(model.named_parameters())[name].cpu(), expected):
        raise RuntimeError(f"{name} was loaded wrong: no rate is reported")
    return meter.rate


def step_seconds(bench: Bench, pipeline: Pipeline, expert: DiT, t: int, kind: Conditioning) -> float:
    """One guided step of an expert at the model's largest size."""
    texts: dict[Any, Any] = {}
    latents = pipeline.noise(largest_request(pipeline), kind.size)
    with torch.inference_mode():
        text = torch.randn(2, pipeline.spec.dit.text_len, pipeline.spec.dit.text_dim, device=bench.device)
        text = text.to(bench.dtype)
        flow = pipeline.flow(expert, 3.0, t, latents, text, texts, kind)
        if not flow.isfinite().all():
            raise RuntimeError("the flow isn't finite: no time is reported")
        return bench.seconds(lambda: pipeline.flow(expert, 3.0, t, latents, text, texts, kind), 1)


def largest_request(pipeline: Pipeline) -> Any:
    """The model's largest size and default frames."""
    return resolve(pipeline.spec, "a cat", size=pipeline.spec.sizes[0], seed=1)


class Count:
    """A sink that only counts."""

    frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Count them."""
        self.frames += len(frames)


def decode_seconds(bench: Bench, pipeline: Pipeline) -> dict[str, float]:
    """One decode of the default frames at the largest size, to uint8 frames on the host."""
    request = largest_request(pipeline)
    latents, sink = pipeline.noise(request, request.size), Count()
    with torch.inference_mode():
        seconds = bench.seconds(
            lambda: pipeline.decode(latents, sink, Tracker(pipeline.mesh, pipeline.device))
        )
    return {"seconds": seconds, "frames": sink.frames / 2}


def model_section(bench: Bench, name: str, rung: Rung) -> dict[str, Any]:
    """A whole model on the device: plan, steps, decode, peaks."""
    shape = bench.shapes[name]
    plan = bench.plan(shape, rung)
    result: dict[str, Any] = {
        "rung": rung,
        "plan_gib": {**{n: b / GIB for n, b in (*plan.rows, *plan.phases)}, "total": plan.gib},
        "available_gib": plan.available / GIB,
        "plan_fits": plan.fits,
    }
    began = time.perf_counter()
    pipeline = random_pipeline(shape, plan, bench.device, bench.dtype, bench.vae_dtype)
    bench.wait()
    result["made_in_seconds"] = time.perf_counter() - began
    result["resident"] = bench.memory()
    say(f"resident: {result['resident']}")
    request = largest_request(pipeline)
    with torch.inference_mode():
        result["text_seconds"] = bench.seconds(lambda: pipeline.encode(request))
    kinds = {"": Conditioning(request.size)}
    if pipeline.spec.task == "ti2v":
        latents = pipeline.noise(request, request.size)
        kinds["with an image, "] = Conditioning(request.size, first_latent=latents[:, :1])
    experts = {"high": (pipeline.high, HIGH_T)} if pipeline.low is None else {
        "high": (pipeline.high, HIGH_T), "low": (pipeline.low, LOW_T)
    }  # fmt: skip
    for label, kind in kinds.items():
        for expert_name, (expert, t) in experts.items():
            part = f"{label}step of {expert_name}"
            try:
                result[part] = {"seconds": step_seconds(bench, pipeline, expert, t, kind)} | bench.memory()
            except torch.OutOfMemoryError as error:
                result[part] = out_of_memory(part, error)
            say(f"{part}: {result[part]}")
    try:
        result["decode"] = decode_seconds(bench, pipeline) | bench.memory()
    except torch.OutOfMemoryError as error:
        result["decode"] = out_of_memory("decode", error)
        result["decode, text encoder on the CPU"] = decode_without_text(bench, pipeline)
    say(f"decode: {result['decode']}")
    return result


def decode_without_text(bench: Bench, pipeline: Pipeline) -> dict[str, Any]:
    """The decode once more on the rung that would be chosen for it."""
    pipeline.text_encoder.to("cpu")  # type: ignore[attr-defined]
    torch.cuda.empty_cache()
    try:
        return decode_seconds(bench, pipeline) | bench.memory()
    except torch.OutOfMemoryError as error:
        return out_of_memory("decode, text encoder on the CPU", error)


def jobs_section(bench: Bench) -> dict[str, Any]:
    """Ten jobs in three processes: fresh, restarted with what the first compiled, and without warm-up."""
    result = {}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as other:
        for name, cache, warm in (("fresh", first, True), ("restarted", first, True), ("cold", other, False)):
            environment = {
                k: v for k, v in os.environ.items() if not k.endswith(("_CACHE_DIR", "CACHE_PATH"))
            }
            keep_compiled(Path(cache), environment)
            command = [sys.executable, "-m", "benchmarks.family", "--sections", "ten-jobs"]
            command += ["--tiny"] * bench.tiny + ["--warm"] * warm
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            result[name] = json.loads(done.stdout)["sections"]["ten-jobs"]
            say(f"{name}: {result[name]}")
    return result


def ten_jobs(bench: Bench) -> dict[str, Any]:
    """Ten equal jobs of a 5B model, short enough that what is done once would show."""
    shape = bench.shapes["5B"]
    frames = 5 if bench.tiny else 9
    shape = replace(shape, facts=replace(shape.facts, frame_num=frames, sizes=shape.facts.sizes[:1]))
    plan = bench.plan(shape, "resident")
    pipeline = random_pipeline(shape, plan, bench.device, bench.dtype, bench.vae_dtype)
    request = resolve(pipeline.spec, "a cat", seed=1, sampling_steps=4)
    began = time.perf_counter()
    if bench.arguments.warm:
        warm_up(pipeline)
        bench.wait()
    warm_seconds, seconds = time.perf_counter() - began, []
    for _ in range(JOBS):
        began = time.perf_counter()
        pipeline.generate(request, Count())
        seconds.append(time.perf_counter() - began)
    return {
        "warm_up_seconds": warm_seconds if bench.arguments.warm else None,
        "first": seconds[0],
        "tenth": seconds[-1],
        "first_to_tenth": seconds[0] / seconds[-1],
        "all": seconds,
    }


def run_section(name: str, bench: Bench) -> dict[str, Any]:
    """One section in this process."""
    if name == "load":
        return load_section(bench)
    if name == "a14b":
        return model_section(bench, "A14B", "branches")
    if name == "5b":
        return model_section(bench, "5B", "resident")
    return jobs_section(bench) if name == "jobs" else ten_jobs(bench)


def in_a_process(name: str, arguments: argparse.Namespace, limit: float) -> dict[str, Any]:
    """A section in a process of its own, for `limit` seconds; its result, or how it failed."""
    if limit <= 0:
        return {"failed": "no time was left for it"}
    command = [sys.executable, "-m", "benchmarks.family", "--sections", name, "--here"]
    command += ["--gigabytes", str(arguments.gigabytes), *(["--tiny"] if arguments.tiny else [])]
    command += ["--folder", str(arguments.folder)] if arguments.folder else []
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=limit, check=True
        )
    except subprocess.SubprocessError as error:
        say(f"{name}: {error}")
        return {"failed": str(error)}
    result: dict[str, Any] = json.loads(done.stdout)["sections"][name]
    return result


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS, "ten-jobs"], default=SECTIONS)
    parser.add_argument("--gigabytes", type=float, default=28.0, help="of blocks that `load` writes")
    parser.add_argument("--folder", type=Path, help="where `load` writes; else the temporary folder")
    parser.add_argument("--tiny", action="store_true", help="small models: a rehearsal")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all sections together")
    parser.add_argument("--json", type=Path, help="also write the figures here, after every section")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks.family at full size needs a CUDA GPU; torch sees none (--tiny rehearses)")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    document: dict[str, Any] = {"device": device, "torch": torch.__version__, "tiny": arguments.tiny}
    document["sections"] = {}
    began = time.perf_counter()
    for name in arguments.sections:
        alone = arguments.here or name == "ten-jobs"
        left = arguments.seconds - (time.perf_counter() - began)
        result = run_section(name, Bench(arguments)) if alone else in_a_process(name, arguments, left)
        document["sections"][name] = result
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1))
    print(json.dumps(document, indent=1), flush=True)


if __name__ == "__main__":
    main()
