"""One run's history and final store, as the checks read them, and the report that they write."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

TERMINAL = ("succeeded", "failed", "canceled", "expired")
Record = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """What the run was set to. floor: least number of each fault kind. s3: objects were looked at.

    least_jobs, least_faults: fewer, and the run proves too little.
    """

    lease: float
    sweep: float
    max_attempts: int
    floor: int = 0
    kinds: tuple[str, ...] = ()
    least_jobs: int = 0
    least_faults: int = 0
    s3: bool = True
    slack: float = 15.0  # seconds on top of lease + sweep: two busy cores, and claimers that were killed


@dataclass
class Report:
    """Violations (none: every promise held) and what was seen."""

    violations: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Any] = field(default_factory=dict)


class Case:
    """What is checked. jobs: of the final store, by id; calls, hooks: of the history, by job."""

    def __init__(self, history: list[Record], final: Record, rules: Rules) -> None:
        self.history, self.final, self.rules = history, final, rules
        self.report = Report()
        self.jobs: dict[str, Record] = final["jobs"]
        self.calls: dict[str, list[Record]] = defaultdict(list)
        self.hooks: dict[str, list[Record]] = defaultdict(list)
        for record in history:
            if record["k"] == "call" and record.get("job"):
                self.calls[record["job"]].append(record)
            elif record["k"] == "hook":
                self.hooks[record["job"]].append(record)

    def wrong(self, promise: int, what: str) -> None:
        """One violation."""
        self.report.violations.append(f"promise {promise}: {what}")


def spread(values: list[float]) -> dict[str, float] | None:
    """Count, median, 90th percentile and maximum."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "p50": round(ordered[len(ordered) // 2], 2),
        "p90": round(ordered[int(len(ordered) * 0.9)], 2),
        "max": round(ordered[-1], 2),
    }
