"""Run the simulation and write its table and pictures into the docs:

python -m benchmarks.simulation                 # all of it: 100,000 jobs a fleet in the week
python -m benchmarks.simulation --scale 0.02 --docs /tmp/docs    # a quick look
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.simulation.picture import Line, Panel, draw
from benchmarks.simulation.scenarios import SCENARIOS, Outcome, Scenario, fleets, play

BEGIN, END = "<!-- simulation: begin -->", "<!-- simulation: end -->"
DOCS = Path(__file__).resolve().parents[2] / "docs"
SEED = 20


def main() -> None:
    """Run what is asked for, keep each outcome, then write the pages from all outcomes that are kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the time simulated")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--docs", type=Path, default=DOCS, help="where operations.md and simulation/ are")
    parser.add_argument(
        "--only", choices=[scenario.name for scenario in SCENARIOS], help="one scenario alone"
    )
    parser.add_argument(
        "--render", action="store_true", help="run nothing: write from the outcomes that are kept"
    )
    asked = parser.parse_args()
    folder: Path = asked.docs / "simulation"
    folder.mkdir(parents=True, exist_ok=True)
    for scenario in SCENARIOS:
        if not asked.render and asked.only in (None, scenario.name):
            run(scenario, asked.seed, asked.scale, folder)
    write(asked.docs)


def run(scenario: Scenario, seed: int, scale: float, folder: Path) -> None:
    """One scenario with every fleet; its figures and series into a file, its picture beside it."""
    outcomes = []
    for fleet in fleets(scenario):
        start = time.monotonic()
        outcome = play(scenario, fleet, seed, scale)
        outcomes.append(outcome)
        print(f"{row(outcome)}  ({time.monotonic() - start:.0f} s)", flush=True)
        if outcome.lost:
            raise SystemExit(f"{outcome.lost} jobs never finished: no figure is written")
    figures = [{**asdict(outcome), "series": None} for outcome in outcomes]
    kept = {"seed": seed, "scale": scale, "outcomes": figures}
    (folder / f"{scenario.name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    (folder / f"{scenario.name}.svg").write_text(picture(scenario, outcomes))


def picture(scenario: Scenario, outcomes: Sequence[Outcome]) -> str:
    """Nodes, and jobs waiting, over the hours."""
    nodes = [Line(o.fleet, [(t / 3600, float(n)) for t, _, n, _ in o.series]) for o in outcomes]
    waiting = [Line(o.fleet, [(t / 3600, float(w)) for t, w, _, _ in o.series]) for o in outcomes]
    return draw(scenario.title, [Panel("nodes that serve", nodes), Panel("jobs waiting", waiting)])


def row(o: Outcome) -> str:
    """One line of the table."""
    return (
        f"| {o.fleet} | {o.jobs:,} | {o.p50:,.0f} | {o.p95:,.0f} | {o.p99:,.0f} | {o.utilisation:.0%} "
        f"| {o.cost:.3f} | {o.repeats} | {o.lost} |"
    )


def table(scenario: Scenario, folder: Path) -> str:
    """One scenario's part of the page."""
    kept = json.loads((folder / f"{scenario.name}.json").read_text())
    rows = [row(Outcome(**{**figures, "series": []})) for figures in kept["outcomes"]]
    head = "| fleet | jobs | wait p50, s | p95 | p99 | utilisation | cost a video | repeated | jobs lost |"
    lines = [f"**{scenario.title}** (seed {kept['seed']})", "", head, "|---" * 9 + "|", *rows, ""]
    return "\n".join([*lines, f"![{scenario.title}](simulation/{scenario.name}.svg)", ""])


def write(docs: Path) -> None:
    """Put the tables between the marks in operations.md (made if it is not there)."""
    tables = [
        table(s, docs / "simulation") for s in SCENARIOS if (docs / "simulation" / f"{s.name}.json").exists()
    ]
    page = docs / "operations.md"
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(tables) + f"{END}{after}")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
