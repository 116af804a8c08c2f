"""The 8-bit kernels compile for a Hopper GPU, and attention uses its 8-bit tensor cores."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_eight_bit"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
