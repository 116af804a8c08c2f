"""Promise 11: nothing is left without an owner; and whether the run itself was hard enough."""

import re
from collections import Counter

from tests.chaos.checks.case import TERMINAL, Case, Record

GLOBAL = re.compile(
    r"reel:(queues|deadlines|retention|dead|garbage|outbox|outbox:dead|nodes|models|uploads|uploads:users|outcomes"
    r"|fence|apikeys|apikeys:hashes|apikeys:endpoints|celery:.*|login.*"
    r"|(lane|lanes|rising|vtime|waiting|running|leases|timings|wake|claim|operation"
    r"|idem|gone|node|drain|list|rate):.*)$"
)
OF_JOB = re.compile(r"reel:(?:job|body|events|deliveries|pending):(job_\w+)$|reel:delivery:msg_(\w+)_\d+$")


def nothing_is_left(case: Case) -> None:
    """Queues, leases and counters are empty; every key belongs to something or ends by itcase."""
    final = case.final
    for kind in ("leases", "lanes"):
        for name, members in final[kind].items():
            if members:
                case.wrong(11, f"{name} still holds {members[:3]}")
    for name, fields in final["counters"].items():
        if any(int(value) for value in fields.values()):
            case.wrong(11, f"{name} counts {fields}")
    if final["outbox"]:
        case.wrong(10, f"the outbox still holds {len(final['outbox'])} deliveries")
    ended = {job_id for job_id, job in case.jobs.items() if job["state"] in TERMINAL}
    if missing := ended - set(final["retention"]):
        case.wrong(11, f"{len(missing)} ended jobs have no retention: {sorted(missing)[:3]}")
    for key, seconds in final["ttl"].items():
        if seconds == -1:
            case.wrong(11, f"{key} never expires")
    for key in final["keys"]:
        if not known_key(key, case.jobs):
            case.wrong(11, f"nobody owns {key}")


def fault_counts(case: Case) -> None:
    """Faults that took effect, by kind; a run with too few of any proves too little."""
    counts: Counter[str] = Counter()
    for record in case.history:
        if record["k"] == "fault" and _took_effect(case, record):
            counts[record["fault"]] += 1
    for kind in case.rules.kinds:
        if counts[kind] < case.rules.floor:
            case.report.violations.append(
                f"the run: {kind!r} fired {counts[kind]} times of {case.rules.floor}"
            )
    for what, number, least in (
        ("jobs", case.report.figures["accepted"], case.rules.least_jobs),
        ("faults", counts.total(), case.rules.least_faults),
    ):
        if number < least:
            case.report.violations.append(f"the run: {number} {what} of {least}")
    case.report.faults = counts


def _took_effect(case: Case, fault: Record) -> bool:
    """Whether a fault that was asked for in a prompt has happened: the events say so."""
    if not fault.get("asked"):
        return True
    job = case.jobs.get(fault["job"], {"events": [], "request": {}})
    why = Counter(event["why"] for event in job["events"] if event.get("why"))
    starts: int = case.final["runs"].get(str(job["request"].get("seed")), []).count("start")
    if fault["fault"] == "out of memory":
        return why["out_of_memory"] >= 1
    if fault["fault"] == "poison":
        return starts >= 3 and any(event["type"] == "job.failed" for event in job["events"])
    return starts >= 2


def known_key(key: str, jobs: dict[str, Record]) -> bool:
    """Whether a Redis key belongs to a known job, or to the service as a whole (see jobs/scripts.py)."""
    match = OF_JOB.match(key)
    if match:
        return (match[1] or f"job_{match[2]}") in jobs
    return bool(GLOBAL.match(key)) or key.startswith("_kombu")
