"""Which checkpoint a local stack serves."""

import os
import subprocess
import sys
from pathlib import Path

from infra.errors import CliError
from infra.process import PartSpec
from infra.supervisor import Supervisor

PROJECT = Path(__file__).resolve().parent.parent
DEMO_MODEL = PROJECT / "models" / "demo"


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder looks like a Wan 2.2 checkpoint, in the official or the diffusers layout."""
    return (folder / "model_index.json").is_file() or any(folder.glob("models_t5*.pth"))


def given_model(folder: Path) -> Path:
    """The folder that the operator named, absolute. Raises CliError if it holds no checkpoint."""
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise CliError(f"model folder {folder} does not exist: give --model a Wan 2.2 checkpoint")
    if not has_checkpoint(folder):
        raise CliError(
            f"model folder {folder} holds no checkpoint: expected models_t5*.pth (official layout) "
            "or model_index.json (diffusers layout)"
        )
    return folder


def default_model(data_dir: Path, log: Path, env: dict[str, str], supervisor: Supervisor) -> Path:
    """The trained demo model if it is there, else a tiny random one, made once into the data dir."""
    if has_checkpoint(DEMO_MODEL):
        return DEMO_MODEL
    tiny = data_dir / "tiny"
    if not has_checkpoint(tiny):
        draft = data_dir / f"tiny.{os.getpid()}"
        argv = (sys.executable, "-m", "infra.cli", "make-tiny", str(draft))
        supervisor.run_chore(PartSpec("make-tiny", argv, env, log, data_dir), seconds=120)
        draft.rename(tiny)
    return tiny


def gpus() -> list[str]:
    """The indices of this machine's NVIDIA GPUs, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [index for index in visible.split(",") if index.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))]
