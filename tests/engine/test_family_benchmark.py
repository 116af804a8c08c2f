"""The family benchmark rehearsed on small models: every section's figures, a section that fails, a cut."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import family
from benchmarks._disk import cached, drop, filesystem, in_memory
from benchmarks._family_bench import Bench
from benchmarks._random_model import RandomState
from benchmarks._sections import run_section, write_json
from engine.checkpoint_writer import write_expert
from engine.tiny import TINY_DIT


def figures_of(name: str, folder: Path) -> dict[str, Any]:
    """One tiny section in this process."""
    found: dict[str, Any] = {}
    family.run_here(name, Bench(found.__setitem__, tiny=True), folder, family.TINY_GIGABYTES)
    return found


def test_a_model_gives_its_plan_steps_and_decode(tmp_path: Path) -> None:
    a14b = figures_of("a14b", tmp_path)
    assert a14b["plan"]["fits"]
    assert a14b["plan"]["gib"]["total"] > 0
    for name in ("step of high", "step of low"):
        assert a14b[name]["seconds"] > 0
        assert (a14b[name]["forwards"], a14b[name]["rows_a_forward"], a14b[name]["tokens"]) == (2, 1, 4)
    assert a14b["decode"]["frames"] == 5
    assert a14b["text"]["seconds"] > 0
    five = figures_of("5b", tmp_path)
    assert {"step of expert", "with an image, step of expert", "decode"} <= set(five)
    assert (five["step of expert"]["forwards"], five["step of expert"]["rows_a_forward"]) == (1, 2)


def test_loading_is_compared_with_a_plain_read(tmp_path: Path) -> None:
    load = figures_of("load", tmp_path)
    assert load["written"]["files"] == 12
    assert load["written"]["gigabytes"] >= family.TINY_GIGABYTES
    assert load["folder"] == {"filesystem": filesystem(tmp_path), "in_memory": in_memory(tmp_path)}
    states = ("cold", "warm") if load["cold"]["possible"] else ("warm",)
    assert {f"{state} {kind}" for state in states for kind in ("plain", "load")} <= set(load["gb_per_s"])
    assert {f"{state}, to plain" for state in states} <= set(load["ratio_to_plain_read"])


def test_ten_jobs_are_timed_with_and_without_a_warm_up(tmp_path: Path) -> None:
    warm, cold = figures_of("jobs", tmp_path), figures_of("unwarmed", tmp_path)
    assert warm["warm_up_seconds"] > 0
    assert "warm_up_seconds" not in cold
    for jobs in (warm, cold):
        assert len(jobs["seconds"]) == 10
        assert jobs["first_to_tenth"] == pytest.approx(jobs["first"] / jobs["tenth"])


@pytest.mark.timeout(170)
def test_a_section_that_fails_is_written_down_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too little room for the files in one, a missing first run in the next; then one that works."""
    out = tmp_path / "figures.json"
    before = signal.getsignal(signal.SIGTERM)
    try:
        family.main(
            [
                "--tiny",
                "--json",
                str(out),
                "--gigabytes",
                "1e9",
                "--sections",
                "load",
                "restarted",
                "unwarmed",
            ]
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    sections = json.loads(out.read_text())["sections"]
    assert json.loads(capsys.readouterr().out)["sections"] == sections
    assert "GB free" in sections["load"]["failed"]
    assert sections["load"]["folder"]["filesystem"]
    assert "jobs" in sections["restarted"]["failed"]
    assert "failed" not in sections["unwarmed"]
    assert len(sections["unwarmed"]["seconds"]) == 10


def test_no_section_begins_when_the_time_is_up(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = argparse.Namespace(seconds=0.0, json=out, sections=["a14b", "5b"], tiny=True)
    run = family.Run(arguments, {"sections": {}}, tmp_path)
    for name in arguments.sections:
        run.section(name)
    sections = json.loads(out.read_text())["sections"]
    assert all("no time was left" in sections[name]["failed"] for name in ("a14b", "5b"))


SPEAKS_THEN_HANGS = """
import subprocess, sys, time
from benchmarks._sections import speak
emit = speak()
print("noise of a library")
emit("step", {"seconds": 1})
emit("grandchild", subprocess.Popen(["sleep", "600"]).pid)
time.sleep(600)
"""


def test_a_section_that_is_cut_keeps_its_figures_and_leaves_no_process() -> None:
    found: dict[str, Any] = {}
    environment = dict(os.environ)
    failure = run_section([sys.executable, "-c", SPEAKS_THEN_HANGS], environment, 5, found.__setitem__)
    assert failure == "stopped after 5 s: its time was up"
    assert found["step"] == {"seconds": 1}
    until = time.monotonic() + 10
    while alive(found["grandchild"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(found["grandchild"])


def alive(pid: int) -> bool:
    """Whether a process runs: one that nobody has reaped yet doesn't."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_section_that_dies_is_named() -> None:
    failure = run_section([sys.executable, "-c", "import os; os._exit(7)"], {}, 60, lambda *_: None)
    assert failure == "its process ended with 7"


def test_the_page_cache_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "some"
    path.write_bytes(b"x" * (1 << 20))
    share = cached([path])
    assert share == 1.0  # just written
    if not in_memory(tmp_path):
        drop([path])
        assert cached([path]) == 0.0
    assert in_memory(Path("/dev/shm")) == (filesystem(Path("/dev/shm")) == "tmpfs")
    assert filesystem(Path("/proc/self")) == "proc"


def test_a_document_is_replaced_whole(tmp_path: Path) -> None:
    for number in (1, 2):
        write_json(tmp_path / "figures.json", {"number": number})
        assert json.loads((tmp_path / "figures.json").read_text()) == {"number": number}
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_an_expert_s_tensors_are_asked_for_once(tmp_path: Path) -> None:
    """A state that makes tensors on demand would make tens of gigabytes twice."""
    asked: list[str] = []

    class Counted(RandomState):
        def __getitem__(self, name: str) -> Any:
            asked.append(name)
            return super().__getitem__(name)

    state = Counted(TINY_DIT, Bench(lambda *_: None, tiny=True).device)
    write_expert(tmp_path, TINY_DIT, "t2v", state, shards=2)
    assert sorted(asked) == sorted(state)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * state[name].numel() for name in state)
