"""docs/architecture.md names every file, in the file's own words."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_file_map_matches_the_code() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "file_map.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
