"""Every kernel compiles for a Hopper GPU, on machines that have none: the interpreter can't tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("module", "kernels"), [("compile_kernels", 10), ("compile_eight_bit", 6)])
def test_every_kernel_compiles(tmp_path: Path, module: str, kernels: int):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == kernels
