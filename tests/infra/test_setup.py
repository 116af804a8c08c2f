"""scripts/setup.sh: skips what is done, and says what is missing. (Installing is what CI does.)"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the real script, in a folder whose name has a space."""
    root = tmp_path / "a project"
    (root / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
        shutil.copy(ROOT / name, root / name)
    return root


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def setup(project: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    script = project / "scripts" / "setup.sh"
    return subprocess.run(
        [script], capture_output=True, text=True, cwd="/", env={**os.environ, **env}, check=False, timeout=60
    )


def good_python(project: Path) -> Path:
    """Stands for Python: makes a venv of itself, and notes what pip is asked for."""
    return program(
        project / "python",
        'echo "$@" >>"$NOTES"\n'
        'case "$1 $2" in "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python";; esac\n'
        '[ "$1" = --version ] && echo Python 3.12.1\n'
        'case "$*" in *"$FAIL"*) echo "no such package"; exit 1;; esac\n'
        "exit 0\n",
    )


def test_an_old_python_is_named(project: Path) -> None:
    old = program(project / "old", '[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    done = setup(project, PYTHON=str(old))
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.2" in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_installs_torch_first_and_then_nothing_twice(project: Path) -> None:
    notes = project / "notes"
    env = {"PYTHON": str(good_python(project)), "NOTES": str(notes), "FAIL": "nothing"}
    done = setup(project, **env)
    assert done.returncode == 0, done.stderr
    pips = [line for line in notes.read_text().splitlines() if "pip install" in line]
    assert len(pips) == 2
    assert pips[0].endswith("torch==2.13.0")
    assert pips[1].endswith("-c constraints.txt -e .[dev]")

    notes.unlink()
    began = time.monotonic()
    again = setup(project, **env)
    assert (again.returncode, again.stderr) == (0, "")
    assert time.monotonic() - began < 5
    assert not notes.exists()

    with (project / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert setup(project, **env).returncode == 0
    assert "pip install" in notes.read_text()


def test_a_failed_install_is_shown_and_tried_again(project: Path) -> None:
    env = {"PYTHON": str(good_python(project)), "NOTES": str(project / "notes")}
    done = setup(project, **env, FAIL="constraints.txt")
    assert done.returncode == 1
    assert "no such package" in done.stderr
    assert "setup: failed:" in done.stderr.splitlines()[-1]
    assert setup(project, **env, FAIL="nothing").returncode == 0


def test_the_pins_agree() -> None:
    """The torch that is installed first is the one that the constraints allow."""
    script = (ROOT / "scripts" / "setup.sh").read_text()
    (pin,) = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    assert f'quietly "${{pip[@]}}" {pin}\n' in script
