"""A node's memory, as an operator sees it."""

from pathlib import Path

import psutil
import pytest

from worker.vitals import Memory, parse_smi, read_memory


def test_smi_lines_are_summed() -> None:
    assert parse_smi("61234, 81559\n10, 81559\n") == Memory(61244 * 2**20, 163118 * 2**20)
    for nonsense in ("", "[N/A], [N/A]\n", "No devices were found\n", "1\n"):
        assert parse_smi(nonsense) is None


def test_a_cpu_nodes_ranks() -> None:
    found = read_memory("cpu", [psutil.Process(), psutil.Process()])
    assert found is not None
    assert 2 * 10 * 2**20 < found.used < found.total == psutil.virtual_memory().total
    gone = psutil.Popen(["true"])
    gone.wait()
    assert read_memory("cpu", [gone]) is None


def test_the_driver_is_asked_for_the_nodes_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$1" in --id=2,3) echo "1, 2"; echo "3, 4";; *) exit 6;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert read_memory("cuda", []) == Memory(4 * 2**20, 6 * 2**20)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert read_memory("cuda", []) is None
