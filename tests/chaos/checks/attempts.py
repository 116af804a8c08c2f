"""Promises 4, 5 and 6: attempts are counted rightly, and a cancel does what its answer said."""

from collections import Counter

from tests.chaos.checks.case import TERMINAL, Case, Record, spread


def attempts(case: Case) -> None:
    """Each charge raises the count by one, nothing else does; the dead letter holds what was given up."""
    dead, replayed = set(case.final["dead"]), 0
    for job_id, job in case.jobs.items():
        count, charges, given_back = 0, Counter[str](), 0
        before = None
        for event in job["events"]:
            name, why = event["type"].removeprefix("job."), event.get("why")
            if name == "queued" and before == "failed":
                count, charges, replayed = 0, Counter(), replayed + 1
            elif name in ("queued", "failed") and why:
                count += before != "queued"  # an operator's rejection of a waiting job charges nothing
                charges[why] += 1
            elif name == "queued" and before is not None:
                given_back += 1
            if name in ("queued", "failed") and event["attempts"] != count:
                case.wrong(4, f"{job_id}: {count} charges, {event['attempts']} attempts at {name}")
            before = name if name != "cancel_requested" else before
        if job["attempts"] > case.rules.max_attempts:
            case.wrong(4, f"{job_id}: {job['attempts']} attempts of {case.rules.max_attempts}")
        if job["state"] == "failed":
            _failed_rightly(case, job_id, job, charges, job_id in dead)
        elif job_id in dead:
            case.wrong(4, f"{job_id} is {job['state']} and in the dead letter")
        case.report.figures["given back"] = case.report.figures.get("given back", 0) + given_back
    case.report.figures["replayed"] = replayed


def _failed_rightly(case: Case, job_id: str, job: Record, charges: Counter[str], dead: bool) -> None:
    kind = (job["error"] or {}).get("failure_class")
    if kind == "user":
        if charges["user"] != 1 or dead:
            case.wrong(4, f"{job_id}: {charges['user']} attempts after a user's error, dead letter: {dead}")
    elif not dead:
        case.wrong(4, f"{job_id} failed ({kind}) and is not in the dead letter")
    elif kind != "out_of_memory" and job["attempts"] != case.rules.max_attempts:
        case.wrong(4, f"{job_id} was given up after {job['attempts']} attempts")
    elif kind == "out_of_memory" and charges[kind] < 2 and job["attempts"] < case.rules.max_attempts:
        case.wrong(4, f"{job_id} was given up after one out-of-memory")


def cancels(case: Case) -> None:
    """What a cancel's answer said stays true; one that came too late says so and changes nothing."""
    took: list[float] = []
    for record in case.history:
        if record["k"] != "cancel" or record.get("st") is None or record["id"] not in case.jobs:
            continue
        job, status = case.jobs[record["id"]], record["st"]
        ends = [e for e in job["events"] if e["type"].removeprefix("job.") in TERMINAL]
        end = ends[-1]["ms"] / 1000 if ends else None
        if status == 409 and end is not None and end > record["t"] + 0.01:
            case.wrong(5, f"{record['id']}: refused as too late {end - record['t']:.2f} s before its end")
        if status < 300 and record["state"] == "canceled" and job["state"] != "canceled":
            case.wrong(5, f"{record['id']}: canceled, the answer said; it is {job['state']}")
        if status < 300 and record["state"] == "running":
            if job["state"] not in ("canceled", "succeeded"):
                case.wrong(5, f"{record['id']}: a running job's cancel ended as {job['state']}")
            if end is not None and job["state"] == "canceled":
                took.append(end - record["t"])
    case.report.figures["running job canceled, s"] = spread(took)
