"""The VAE decode on one GPU: the official computation against the engine's, with PSNR, memory and a profile.

    python -m benchmarks.vae [--seconds 15] [--json FILE]      # 1280x720, 81 frames: about two minutes
    python -m benchmarks.vae --only ours --convolutions        # ours, its kernels, and the convolutions alone

The baseline is the official decode (`benchmarks._official_vae`) with fp32 weights and cuDNN in TF32, twice
untimed (memory, video) and then twice. Every contestant's video is compared with it before its time counts:
one under 60 dB is named as wrong and has no figure. Weights are random, values about [-1, 1].
"""

import argparse
import copy
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import _official_vae as official
from benchmarks._measure import Sampler, burst, profile_kernels
from benchmarks._random_vae import random_vae
from engine.vae import VAE

OFFICIAL, OURS = "official, fp32 with TF32", "ours"
LIMIT_DB = 60.0
H100_SECONDS = 7.63  # the official code at 1280x720, 81 frames, on an H100 80GB HBM3
CONVOLUTIONS = tuple(getattr(torch.ops.aten, name).default for name in ("convolution", "conv2d", "conv3d"))
Decode = Callable[[], Iterator[Tensor]]  # chunks [1, 3, T, H, W], not clamped


@dataclass(frozen=True)
class Decoded:
    """One contestant's figures."""

    seconds: float  # of one decode
    repetitions: int
    psnr_db: float | None  # to the official video; None for itself, infinite where equal
    peak_gib: float  # of all that torch allocated, weights and the official video for comparison left out
    clock_mhz: float
    power_w: float


def psnr(got: Tensor, want: Tensor) -> float:
    """Of videos clamped to [-1, 1], in dB; NaN if any value is."""
    error = 0.0
    for a, b in zip(got.unbind(2), want.unbind(2), strict=True):
        error += float((a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).double().square().mean())
    error /= got.shape[2]
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(decode: Decode, device: torch.device, seconds: float, least: int) -> tuple[Decoded, Tensor]:
    """A decode's figures and its first video; `least` repetitions, more until `seconds` are over."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    for _ in decode():  # chunk by chunk, as the engine hands them on
        pass
    synchronize(device)
    peak = (torch.cuda.max_memory_allocated(device) if cuda else 0) - before
    video = torch.cat(list(decode()), dim=2)
    synchronize(device)
    count = 0
    with Sampler() if cuda else nullcontext() as sampler:
        begin = time.perf_counter()
        while count < least or time.perf_counter() - begin < seconds:
            for _ in decode():
                pass
            synchronize(device)
            count += 1
        taken = (time.perf_counter() - begin) / count
    clock, power = sampler.medians() if sampler is not None else (math.nan, math.nan)
    return Decoded(taken, count, None, peak / 2**30, clock, power), video


def contestants(vae: VAE, latents: Tensor, half: torch.dtype) -> dict[str, Decode]:
    """Ways to decode, by the name that the table shows; the official one first."""

    def engine(model: VAE, benchmark: bool = False) -> Decode:
        dtype = next(model.parameters()).dtype

        def decode() -> Iterator[Tensor]:
            before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = benchmark
            try:
                yield from model.decode_chunks(latents.to(dtype))
            finally:
                torch.backends.cudnn.benchmark = before

        return decode

    in_half = copy.deepcopy(vae).to(half)
    return {
        OFFICIAL: lambda: iter([official.decode(vae, latents)]),
        OURS: engine(in_half),
        "ours, cuDNN tries its algorithms": engine(in_half, benchmark=True),
    }


def run(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Figures of all wanted contestants, and the kernels of ours."""
    vae = random_vae(device, torch.float32)
    generator = torch.Generator().manual_seed(1)
    shape = (1, vae.config.z_dim, arguments.frames, arguments.rows, arguments.columns)
    latents = torch.randn(shape, generator=generator).to(device)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    ways = contestants(vae, latents, half)
    results: dict[str, Decoded] = {}
    found: dict[str, Any] = {"latents": list(shape), "wrong": []}
    want: Tensor | None = None
    for name, decode in ways.items():
        if arguments.only and name != OFFICIAL and not any(part in name for part in arguments.only):
            continue
        if name == OFFICIAL:
            # The official video is the yardstick also where only others are timed.
            if arguments.only and OFFICIAL not in arguments.only:
                want = next(decode()).cpu()
                continue
            figures, video = measure(decode, device, 0, least=2)
            want = video.cpu()
        else:
            figures, video = measure(decode, device, arguments.seconds, least=2)
            assert want is not None
            decibels = psnr(video.cpu(), want)
            limit = LIMIT_DB if half == torch.float16 else 30.0  # bf16, of a rehearsal on a CPU
            figures = replace(figures, psnr_db=decibels)
            if not decibels >= limit:
                found["wrong"].append(f"{name}: {decibels:.1f} dB to the official video, under {limit}")
                print(f"  {found['wrong'][-1]}", file=sys.stderr, flush=True)
                continue
        del video
        results[name] = figures
        print(f"  {name}: {figures.seconds:.3f} s", file=sys.stderr, flush=True)
    found["results"] = {name: asdict(figures) for name, figures in results.items()}
    if device.type == "cuda" and OURS in results:
        kernels = profile_kernels(lambda: [None for _ in ways[OURS]()], repetitions=1)
        found["kernels of ours, ms a decode"] = kernels
    if arguments.convolutions:
        found["convolutions"] = convolutions(ways[OURS], half, device)
    return found


class Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every convolution that runs while it is on: its arguments, and how often."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVOLUTIONS:  # under inference_mode the undivided operations come here
            x, weight = args[:2]
            stride, padding = args[3] if len(args) > 3 else [1], args[4] if len(args) > 4 else [0]
            self.calls[tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding)] += 1
        return func(*args, **(kwargs or {}))


def convolutions(decode: Decode, half: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Each distinct convolution of one decode alone: calls, milliseconds each, TFLOP/s. No bias."""
    with Convolutions() as noted:
        for _ in decode():
            pass
    rows = []
    for (x_shape, w_shape, stride, padding), calls in noted.calls.items():
        conv = alone(x_shape, w_shape, stride, padding, half, device)
        flop = 2 * conv().numel() * math.prod(w_shape[1:])
        ms = timed(conv, device)
        row = {"input": x_shape, "weight": w_shape, "calls": calls, "ms": ms, "tflop_s": flop / ms / 1e9}
        rows.append(row | {"total_ms": ms * calls} | other_ways(x_shape, w_shape, half, device))
    return sorted(rows, key=lambda row: -row["total_ms"])


def alone(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], stride: Any, padding: Any, half: torch.dtype,
    device: torch.device,
) -> Callable[[], Tensor]:  # fmt: skip
    """A convolution of random values, channels-last, without bias."""
    flat = len(x_shape) == 4
    layout = torch.channels_last if flat else torch.channels_last_3d
    x = torch.randn(x_shape, device=device).to(half).contiguous(memory_format=layout)
    weight = torch.randn(w_shape, device=device).to(half).contiguous(memory_format=layout)
    return partial(F.conv2d if flat else F.conv3d, x, weight, None, stride, padding)


def timed(call: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds in a burst; NaN on a CPU, after one call."""
    call()
    return burst(call) if device.type == "cuda" else math.nan


def other_ways(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], half: torch.dtype, device: torch.device
) -> dict[str, float]:
    """The same 3 x 3 x 3 product otherwise: three frames as channels of a 2-D one; outputs filled to 128s."""
    if w_shape[2:] != (3, 3, 3):
        return {}
    outputs, channels = w_shape[:2]
    batch, _, frames, height, width = x_shape
    flat_x, flat_w = (batch * (frames - 2), 3 * channels, height, width), (outputs, 3 * channels, 3, 3)
    filled = (-(-outputs // 128) * 128, *w_shape[1:])
    ways = {
        "as_2d_ms": alone(flat_x, flat_w, 1, 1, half, device),
        "filled_ms": alone(x_shape, filled, 1, (0, 1, 1), half, device),
    }
    return {name: timed(call, device) for name, call in ways.items()}


def table(found: dict[str, Any], device: str) -> str:
    """The figures in Markdown."""
    frames, rows, columns = found["latents"][2:]
    base = found["results"].get(OFFICIAL, {}).get("seconds", math.nan)
    lines = [
        f"### VAE decode, {8 * columns}x{8 * rows}, {4 * frames - 3} frames, on {device}",
        "",
        "| contestant | s | to official | PSNR to official, dB | peak, GiB | MHz | W |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in found["results"].items():
        decibels = "-" if r["psnr_db"] is None else f"{r['psnr_db']:.1f}"
        ratio = "-" if math.isnan(base) else f"{base / r['seconds']:.2f} x"
        lines.append(
            f"| {name} | {r['seconds']:.3f} | {ratio} | {decibels} | {r['peak_gib']:.2f} "
            f"| {r['clock_mhz']:.0f} | {r['power_w']:.0f} |"
        )
    if "H100" in device and [frames, rows, columns] == [21, 90, 160] and abs(base / H100_SECONDS - 1) > 0.05:
        lines.append(
            f"\nthe official decode took {base:.2f} s where an H100 takes {H100_SECONDS}: ask why first"
        )
    kernels = found.get("kernels of ours, ms a decode", {})
    if kernels:
        total = sum(kernels.values())
        lines += ["", f"| kernel of ours, {total:.0f} ms in all | ms | share |", "|---|---|---|"]
        top = list(kernels.items())[:12]
        lines += [f"| `{name[:90]}` | {ms:.1f} | {100 * ms / total:.1f} % |" for name, ms in top]
    if "convolutions" in found:
        lines += [
            "",
            "| convolution alone: input, weight | calls | ms | TFLOP/s | as 2-D | filled | in all, ms |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        lines += [
            f"| {row['input']}, {row['weight']} | {row['calls']} | {row['ms']:.3f} | {row['tflop_s']:.0f} "
            f"| {row.get('as_2d_ms', math.nan):.3f} | {row.get('filled_ms', math.nan):.3f} "
            f"| {row['total_ms']:.1f} |"
            for row in found["convolutions"]
        ]
        total = sum(row["total_ms"] for row in found["convolutions"])
        lines.append(f"| all | | | | | | {total:.0f} |")
    return "\n".join([*lines, *(f"\nwrong, so without a figure: {line}" for line in found["wrong"])])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frames", type=int, default=21, help="of latents")
    parser.add_argument("--rows", type=int, default=90, help="of latents")
    parser.add_argument("--columns", type=int, default=160, help="of latents")
    parser.add_argument("--seconds", type=float, default=15.0, help="of continuous work, but the official's")
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name contains one of these")
    parser.add_argument("--convolutions", action="store_true", help="also time each convolution alone")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.vae needs a CUDA GPU; torch sees none (--device cpu rehearses)")
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    with torch.inference_mode():
        found = run(arguments, device)
    print(table(found, name), flush=True)
    if arguments.json:
        document = {"device": name, "torch": torch.__version__} | found
        arguments.json.write_text(json.dumps(document, indent=1))
    if found["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
