"""The command that makes every GPU figure, with jobs that need none."""

import time
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.figures import LANES, Job, Lane, Sitting

SAY = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], end='')"


def say(name: str, code: str = SAY, seconds: float = 20) -> Job:
    return Job(name, ("-S", "-c", code), seconds)


def sitting(out: Path, gpus: str = "01", budget: float = 60) -> Sitting:
    return Sitting(out, [*gpus], time.monotonic() + budget)


def test_lanes_share_the_gpus_and_those_for_all_come_last(tmp_path: Path) -> None:
    waits = "import time; time.sleep(0.5); " + SAY
    lanes = [
        Lane("all", (say("all", f"import os; assert os.path.exists('{tmp_path}/b.done'); " + SAY),), gpus=0),
        Lane("a", (say("a", waits),)),
        Lane("b", (say("b", waits),)),
    ]
    told = sitting(tmp_path).run(lanes)
    assert [line.split(":")[0] for line in told][-1] == "all"
    assert all(": done" in line for line in told)
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("a", "b", "all")}
    assert {logs["a"], logs["b"]} == {"0", "1"}  # side by side, a GPU each
    assert logs["all"] == "0,1"


def test_a_failed_job_ends_its_lane_and_a_done_one_is_kept(tmp_path: Path) -> None:
    """No figures after failed tests; the next call begins where this one ended."""
    broken = Lane("a", (say("first"), say("tests", "raise SystemExit(3)"), say("figure")))
    told = sitting(tmp_path, "0").run([broken])
    assert told[1].startswith("tests: failed, exit 3")
    assert not (tmp_path / "figure.log").exists()
    mended = Lane("a", (say("first"), say("tests"), say("figure")))
    told = sitting(tmp_path, "0").run([mended])
    assert told[0] == "first: was done before"
    assert [line.split(" (")[0] for line in told[1:]] == ["tests: done", "figure: done"]


def test_what_takes_too_long_is_ended_or_not_begun(tmp_path: Path) -> None:
    slow = say("slow", "import time; time.sleep(60)", seconds=0.5)
    told = sitting(tmp_path, "0").run([Lane("a", (slow,))])
    assert told[0].startswith("slow: its time was up")
    assert not (tmp_path / "slow.done").exists()
    told = sitting(tmp_path, "0", budget=1).run([Lane("a", (say("long", seconds=100),))])
    assert told[0].startswith("long: not begun")


def test_what_left_something_for_later_is_begun_again(tmp_path: Path) -> None:
    code = "import json, pathlib, sys; p = pathlib.Path(sys.argv[1], 'job.json'); " + (
        "p.write_text(json.dumps({} if p.exists() else {'postponed': ['videos']}))"
    )
    lane = Lane("a", (Job("job", ("-S", "-c", code, "{out}"), 20),))
    assert sitting(tmp_path, "0").run([lane])[0].startswith("job: more to do: videos")
    assert sitting(tmp_path, "0").run([lane])[0].startswith("job: done")
    assert sitting(tmp_path, "0").run([lane])[0] == "job: was done before"


def test_the_shipped_lanes_call_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == sum(len(lane.jobs) for lane in LANES)
    root = Path(figures.__file__).parents[1]
    for job in (job for lane in LANES for job in lane.jobs):
        if job.words[1].startswith("benchmarks."):
            assert (root / job.words[1].replace(".", "/")).with_suffix(".py").exists()
            flags = {word for word in job.words if word.startswith("--")}
            source = (root / job.words[1].replace(".", "/")).with_suffix(".py").read_text()
            assert all(f'"{flag}"' in source for flag in flags), job.name
        for word in job.words:
            assert not word.startswith("tests/") or (root / word).exists()
    names = [job.name for lane in LANES for job in lane.jobs]
    assert len(set(names)) == len(names)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs CUDA GPUs"):
        figures.main([])
