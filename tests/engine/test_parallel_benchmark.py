"""The parallel benchmark rehearsed on two CPU ranks, its model of 8 GPUs and its timeline."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks._eight import Measured, predict, report, traffic_bytes
from benchmarks._layouts import MODELS, Contestant, contestants, share_route
from benchmarks._timeline import draw, lines
from benchmarks._verify import WrongResult
from benchmarks.parallel import check
from engine.attention import Overlap
from tests.engine.ranks import environment

MEASURED = Measured(16_000.0, 370.0, 40, 75_600, MODELS["A14B"])


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.parallel", "--device", "cpu", "--gpus", "2", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.timeout(300)
def test_a_rehearsal_gives_every_kind_of_figure(tmp_path: Path) -> None:
    """A real layout, an 8-GPU share with and without transfers, the parts, the model, the pictures."""
    wanted = ["1x1", "1x2, push", "share of 1x8, push, interleaved", "share of 1x8, off, interleaved"]
    places = ["--json", str(tmp_path / "figures.json"), "--timeline", str(tmp_path)]
    done = rehearse("--seconds", "0.01", *places, "--only", *wanted, "link", "vae", "text")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(row["ms"] > 0 and row["repetitions"] > 1 for row in figures["steps"].values())
    assert {name for want in wanted for name in figures["steps"] if want in name} == set(figures["steps"])
    assert len(figures["steps"]) == 4
    assert figures["link"]["gb_s"] > 0
    assert figures["vae"]["decode psnr_db"] > 60
    assert figures["vae"]["decode speed-up"] > 0
    assert {"on every rank", "one rank a prompt, broadcast", "sharded over all ranks"} <= set(figures["text"])
    assert figures["text"]["sharded, relative error"] < 1e-5
    assert {row["layout"] for row in figures["eight"]["rows"]} == {"1x2", "2x1", "1x8", "2x4"}
    assert "| share of 1x8, push, interleaved |" in done.stdout
    for layout in ("1x2", "1x8"):
        ElementTree.fromstring((tmp_path / f"timeline-{layout}.svg").read_text())


class Sloppy:
    """A benchmark whose 1x2 is as far from the right result as told."""

    device = torch.device("cpu")
    grid = (1, 1, 1)

    def __init__(self, error: float) -> None:
        self.error, self.model = error, SimpleNamespace(blocks=[1, 2, 3])

    def set_grid(self, grid: tuple[int, int, int]) -> None:
        self.grid = grid

    def exact(self) -> torch.Tensor:
        return torch.ones(4)

    def step(self, one: Contestant) -> Callable[[], torch.Tensor]:
        return lambda: torch.ones(4) * (1 + (self.error if one.layout == "1x2" else 1e-3))


@pytest.mark.parametrize(
    ("error", "right"), [(1.05e-3, True), (1.2e-3, False), (-9e-4, False), (math.nan, False)]
)
def test_wrong_results_stop_the_benchmark(world_of_one: dist.ProcessGroup, error: float, right: bool) -> None:
    """Further from fp32 than one GPU by over a tenth, or on its other side: no figure may follow."""
    bench, rows = Sloppy(error), [Contestant("1x1"), Contestant("1x2", "push")]
    if right:
        assert len(check(bench, rows)) == 2  # type: ignore[arg-type]
        assert bench.model.blocks == [1, 2, 3]
    else:
        with pytest.raises(WrongResult, match="1x2, push"):
            check(bench, rows)  # type: ignore[arg-type]


def test_the_contestants_of_two_gpus() -> None:
    """Every push of a share or a layout has its twin without transfers; names tell all apart."""
    rows = contestants(2)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    twins = [name.replace(", push,", ", off,") for name in names if ", push," in name]
    missing = set(twins) - set(names)
    # What may lose is run without a twin: two ways that are there to be compared with the others' times.
    assert missing <= {
        "share of 1x8, off, split qkv + two head groups",
        "share of 1x8, off, split qkv + interleaved",
    }
    assert Contestant("1x1") in contestants(1)
    assert {row.layout for row in contestants(8)} == {"1x1", "1x8", "2x4"}
    assert Contestant("2x4", "push", Overlap(True, 2, False)).name == "2x4, push, split qkv + two head groups"


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_share_sends_its_peer_all_that_it_would_send(parts: int) -> None:
    """Each rank keeps one piece; the others fill all places of the peer but the peer's own."""
    routes = [share_route(rank, parts) for rank in range(2)]
    for route in routes:
        assert route.targets[route.mine] == (route.rank, route.mine)
        peer = routes[1 - route.rank]
        places = {place for rank, place in route.targets if rank == peer.rank}
        assert places == set(range(parts)) - {peer.mine}


def test_the_traffic_of_eight_gpus_is_the_known_one() -> None:
    """84.7 MB for each of q, k, v and o a block and pass; 2x4 has longer rows and fewer peers."""
    assert traffic_bytes(MEASURED, 1, 8) == pytest.approx(2 * 84.7e6, rel=1e-3)
    assert traffic_bytes(MEASURED, 2, 4) == pytest.approx(145.2e6, rel=1e-3)
    eight = predict(MEASURED, 1, 8)
    assert eight["ms"] == pytest.approx(2000 + eight["exposed_ms"] + eight["gather_ms"])
    assert eight["exposed_ms"] == pytest.approx(4 * 84.7 / 370, rel=1e-3)
    assert predict(MEASURED, 2, 4)["exposed_ms"] == pytest.approx(40 * 145.2 / 370, rel=1e-3)


def test_the_model_states_its_errors() -> None:
    steps = {
        "1x2, push, interleaved": {"ms": 8100.0},
        "1x2, off, interleaved": {"ms": 8000.0},
        "share of 1x8, push, interleaved": {"ms": 2020.0},
        "share of 1x8, off, interleaved": {"ms": 2000.0},
    }
    rows = {row["layout"]: row for row in report(MEASURED, steps)["rows"]}
    assert rows["1x2"]["error"] == pytest.approx(rows["1x2"]["ms"] / 8100 - 1)
    assert rows["1x8"]["arithmetic_error"] == pytest.approx(0)
    assert rows["1x8"]["from_share_ms"] == pytest.approx(2020 + rows["1x8"]["gather_ms"])
    assert "measured_ms" not in rows["2x4"]


def test_a_timeline_has_a_line_a_stream() -> None:
    def event(name: str, category: str, stream: int, start: float, length: float) -> dict[str, object]:
        return {
            "ph": "X",
            "name": name,
            "cat": category,
            "ts": start,
            "dur": length,
            "args": {"stream": stream},
        }

    events = [
        event("flash_fwd <int>", "kernel", 7, 100.0, 900.0),
        event("nvjet_gemm", "kernel", 7, 1000.0, 300.0),
        event("Memcpy DtoD", "gpu_memcpy", 13, 400.0, 200.0),
        event("ncclDevKernel_SendRecv", "kernel", 20, 500.0, 100.0),
        {"ph": "X", "name": "aten::mm", "cat": "cpu_op", "ts": 90.0, "dur": 5.0, "tid": 1},
        {"ph": "M", "name": "process_name"},
    ]
    assert list(lines(events)) == ["stream 7", "stream 13", "stream 20"]
    picture = draw(events, "a step & more")
    root = ElementTree.fromstring(picture)
    colours = [rect.get("fill") for rect in root.iter() if rect.tag.endswith("rect")]
    for kind in ("#4c78a8", "#f58518", "#e45756", "#b279a2"):
        assert colours.count(kind) == 2  # the event and the legend
    assert "a step &amp; more: 1.20 ms" in picture
