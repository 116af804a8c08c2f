"""`python -m tests.chaos`: a chaos run, for `make chaos`. Exit code 1: a promise broke."""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from infra.models import DEMO_MODEL, has_checkpoint
from tests.chaos.run import LONG_PAUSES, Plan, chaos, say

JOBS_AN_HOUR, FAULTS_AN_HOUR = 10_000, 500  # of the long version, at least
# Ends as soon as every kind has fired three times: after about two minutes on two usual cores. A slow machine
# gets more, as a node takes longer to come back there than the next fault to come.
SHORT: dict[str, Any] = {
    "seconds": 100.0, "limit": 480.0, "settle": 90.0, "total": 600.0, "floor": 3, "enough": 3
}  # fmt: skip


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=60.0, help="of load and faults")
    parser.add_argument("--short", action="store_true", help="as in `make test`: two minutes, ten at most")
    parser.add_argument("--seed", type=int, default=0, help="0: a random one")
    parser.add_argument("--rate", type=float, default=6.0, help="jobs a second, at most")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--real-jobs", type=int, default=None, help="jobs for a node with the real engine")
    parser.add_argument("--out", type=Path, default=None, help="folder for history, logs and report")
    args = parser.parse_args()
    seed = args.seed or random.SystemRandom().randrange(1, 2**31)
    folder = args.out or Path(tempfile.mkdtemp(prefix="reel-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    again = " --short" if args.short else f" --minutes {args.minutes:g}"
    say(f"seed {seed}: repeat with python -m tests.chaos{again} --seed {seed}; everything in {folder}")
    if args.short:
        plan = Plan(seed, **SHORT, nodes=args.nodes, real_jobs=args.real_jobs or 0)
    else:
        seconds = args.minutes * 60
        real = 220 if args.real_jobs is None else args.real_jobs
        plan = Plan(
            seed,
            seconds,
            limit=seconds * 1.05,
            settle=180.0,
            total=seconds * 1.05 + 600.0,
            floor=10,
            least_jobs=round(JOBS_AN_HOUR * args.minutes / 60),
            least_faults=round(FAULTS_AN_HOUR * args.minutes / 60),
            nodes=args.nodes,
            rate=args.rate,
            pauses=LONG_PAUSES,
            real_jobs=real,
            long_outage=60.0 if args.minutes >= 20 else 0.0,
        )
    model = real_model(folder) if plan.real_jobs else None
    report = asyncio.run(chaos(plan, folder.resolve(), model))
    for kind, count in sorted(report.faults.items()):
        print(f"  {count:5d}  {kind}")
    print(f"  jobs by state: {dict(report.states)}")
    for name, figure in report.figures.items():
        print(f"  {name}: {figure}")
    for violation in report.violations[:50]:
        print(f"VIOLATION  {violation}")
    say(f"{len(report.violations)} violations, {sum(report.faults.values())} faults, seed {seed}")
    return 1 if report.violations else 0


def real_model(folder: Path) -> Path:
    """The demo model if it is there, else a tiny random checkpoint."""
    if has_checkpoint(DEMO_MODEL):
        return DEMO_MODEL
    from engine.tiny import make_tiny

    return make_tiny(folder / "tiny")


if __name__ == "__main__":
    sys.exit(main())
