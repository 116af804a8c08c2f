"""What the training scripts share: a schedule that fits a time budget, EMA, logs, where files lie."""

import argparse
import json
import math
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import DiTConfig, VAEConfig

SIZES = ("128*128", "192*192")
MODEL_DIR = Path(__file__).resolve().parents[1]  # models/demo
SEED = 2026

Z_DIM = 16
TEXT_DIM = 192
TEXT_LEN = 64
DIT = DiTConfig(
    dim=256, ffn_dim=1024, num_heads=2, num_layers=6, text_dim=TEXT_DIM, text_len=TEXT_LEN, freq_dim=256
)


# The Wan 2.1 VAE with a base width of 16, which tensor cores like, in place of 96. While training, latents
# aren't normalised; what reel.json says of them is measured at the end.
VAE_CONFIG = VAEConfig(
    kind="2.1",
    base_dim=16,
    decoder_base_dim=16,
    z_dim=Z_DIM,
    latent_mean=(0.0,) * Z_DIM,
    latent_std=(1.0,) * Z_DIM,
)


def arguments(description: str, seconds: float) -> argparse.ArgumentParser:
    """The flags that every training script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="checkpoint folder to write")
    parser.add_argument("--seconds", type=float, default=seconds, help="wall-clock budget of the loop")
    parser.add_argument(
        "--until", type=float, default=0.0, help="epoch second at which the loop ends at last"
    )
    parser.add_argument("--max-steps", type=int, default=10**9, help="stop after this many steps")
    parser.add_argument("--batch", type=int, default=0, help="clips or captions a step (0: the script's own)")
    parser.add_argument("--lr", type=float, default=0.0, help="peak learning rate (0: the script's own)")
    parser.add_argument("--resume", action="store_true", help="start from the weights in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


class Budget:
    """Learning rate over a wall-clock budget: a short warm-up, then a cosine down to nothing.

    The schedule is a function of time spent, not of steps, so that the same command fits any GPU. The
    clock starts at the first step's end, so that compilation and autotuning aren't counted.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr: float,
        seconds: float,
        max_steps: int,
        warmup_steps: int = 100,
        until: float = 0.0,
    ) -> None:
        self.optimizer = optimizer
        self.lr = lr
        self.seconds = seconds
        self.until = until  # epoch seconds; 0: no such end
        self.max_steps = max_steps
        self.warmup_steps = warmup_steps
        self.done = 0.0  # share of the budget that is used

    def steps(self) -> Iterator[int]:
        """Yield step numbers until the budget is used, setting the learning rate before each."""
        start = None
        step = 0
        while self.done < 1 and step < self.max_steps:
            scale = min(1.0, (step + 1) / self.warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * self.done))
            for group in self.optimizer.param_groups:
                set_rate(group, self.lr * max(scale, 1e-3))
            yield step
            step += 1
            if start is None and step >= min(5, self.max_steps):
                start = time.monotonic()
                if self.until:
                    self.seconds = max(0.0, min(self.seconds, self.until - time.time()))
            if start is not None:
                spent = time.monotonic() - start
                self.done = max(spent / max(self.seconds, 1e-3), step / self.max_steps)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a parameter group's learning rate, in place where a recorded CUDA graph reads it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def prepare(device: str, seed: int = SEED) -> None:
    """Seeds and precision of a training process."""
    random.seed(seed)
    torch.manual_seed(seed)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 4  # of the heuristic's candidates; each costs start-up time
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def spread(function: Callable[[Any], Any], jobs: list[Any], workers: int = 0) -> list[Any]:
    """`function` of every job, in processes. Call it before anything touches the GPU: it forks.

    Results come pickled through pipes: torch's own way, shared memory, runs into small machines' limits.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
        parts = pool.map(partial(_pickled, function), jobs, chunksize=1)
    return [pickle.loads(part) for part in parts]


def _pickled(function: Callable[[Any], Any], job: Any) -> bytes:
    return pickle.dumps(function(job))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there, so that nobody ever reads half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    write(draft)
    draft.replace(path)


class EMA:
    """An exponential moving average of a model's parameters, slower as training goes on."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the model's present parameters in."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], weight)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite a model's parameters by the average."""
        for parameter, average in zip(model.parameters(), self.average, strict=True):
            parameter.copy_(average)


class Log:
    """A loss curve: means over short windows, printed now and then, kept as JSON beside the model.

    A run that resumes weights goes on with their curve.
    """

    def __init__(self, name: str, folder: Path, every: int = 100, resume: bool = False) -> None:
        self.name = name
        self.path = folder / "train" / "curves" / f"{name}.json"
        self.every = every
        before = json.loads(self.path.read_text())["curve"] if resume and self.path.exists() else []
        self.rows: list[dict[str, float]] = before
        self.first_step = before[-1]["step"] if before else 0.0
        self.first_second = before[-1]["seconds"] if before else 0.0
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.start = time.monotonic()

    def add(self, step: int, **values: Tensor) -> None:
        """Take one step's losses (still on the device, so that nothing waits for them)."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, torch.zeros((), device=value.device)) + value.detach().float()
        self.count += 1
        if self.count == self.every:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Close the window."""
        if not self.count:
            return
        seconds = self.first_second + time.monotonic() - self.start
        row = {"step": self.first_step + step + 1, "seconds": round(seconds, 1)}
        row |= {key: round(float(total) / self.count, 6) for key, total in self.sums.items()}
        self.rows.append(row)
        self.sums, self.count = {}, 0
        print(self.name, *(f"{key} {value:g}" for key, value in row.items()), flush=True)

    def save(self, **extra: Any) -> None:
        """Write the curve, and facts of the run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"name": self.name, **extra, "curve": self.rows}))


def to_bf16(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as it is shipped: bf16, contiguous, on the CPU."""
    return {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }


def save_dit(model: nn.Module, folder: Path, config: DiTConfig = DIT) -> None:
    """One expert in the official layout: config.json and safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
        "freq_dim": config.freq_dim,
        "eps": config.eps,
    }
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    save_weights(model, folder / "diffusion_pytorch_model.safetensors")


def save_weights(model: nn.Module, path: Path) -> None:
    """A model as one bf16 safetensors file that everyone may read (safetensors makes it private)."""
    replace_file(path, lambda draft: save_file(to_bf16(model), draft, metadata={"format": "pt"}))
    path.chmod(0o644)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model from such a file."""
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})


def update_reel_json(folder: Path, **values: Any) -> None:
    """Set fields of the checkpoint's reel.json, leaving the others."""
    path = folder / "reel.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    facts |= values
    text = json.dumps(facts, indent=2) + "\n"
    replace_file(path, lambda draft: draft.write_text(text))


def psnr(video: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip, [B]; both are in [-1, 1], so the peak is 2."""
    error = (video.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-12))
