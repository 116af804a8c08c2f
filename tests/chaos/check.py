"""The invariant checker: reads a history and the final store, nothing else, and says which promise broke.

The promises are those of docs/promises.md, by number.
"""

from collections import Counter

from tests.chaos.checks import attempts, ends, leases, left, outside
from tests.chaos.checks.case import Case, Record, Report, Rules

CHECKS = (
    ends.accepted_jobs_end,
    ends.one_result,
    ends.stale_owners_lose,
    leases.lost_leases_are_noticed,
    attempts.attempts,
    attempts.cancels,
    outside.answers,
    outside.videos,
    outside.webhooks,
    left.nothing_is_left,
    left.fault_counts,
)


def check(history: list[Record], final: Record, rules: Rules) -> Report:
    """Every check; no violation in the report: every promise held."""
    case = Case(history, final, rules)
    for one in CHECKS:
        one(case)
    case.report.states = Counter(job["state"] for job in case.jobs.values())
    return case.report
