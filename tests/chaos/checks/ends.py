"""Promises 1 and 2: every accepted job ends once, with one result, and a stale owner writes nothing."""

from collections import defaultdict

from tests.chaos.checks.case import TERMINAL, Case, Record

NEXT = {  # what may follow an event's state
    None: {"queued"},
    "queued": {"started", "canceled", "expired", "failed"},
    "started": {"queued", "succeeded", "failed", "canceled", "cancel_requested"},
    "cancel_requested": {"queued", "succeeded", "failed", "canceled"},
    "succeeded": set(),
    "failed": {"queued"},  # an operator's replay
    "canceled": set(),
    "expired": set(),
}
OWNED = ("heartbeat", "finish", "fail", "give_back", "cancel_running")


def accepted_jobs_end(case: Case) -> None:
    """Also: one job an Idempotency-Key, and no job that nobody was told of."""
    told: dict[str, set[str]] = defaultdict(set)
    for record in case.history:
        if record["k"] == "submit" and record.get("id"):
            told[record["idem"]].add(record["id"])
    for idem, ids in told.items():
        if len(ids) > 1:
            case.wrong(1, f"{idem} became {len(ids)} jobs: {sorted(ids)}")
    accepted = {job_id for ids in told.values() for job_id in ids}
    for job_id in sorted(accepted - case.jobs.keys()):
        case.wrong(1, f"{job_id} was accepted and is gone")
    for job_id in sorted(case.jobs.keys() - accepted):
        case.wrong(1, f"{job_id} is in the store, and no client was told of it")
    for job_id, job in case.jobs.items():
        if job["state"] not in TERMINAL:
            case.wrong(1, f"{job_id} has not ended: it is {job['state']}")
        _one_end(case, job_id, job)
    case.report.figures["accepted"] = len(accepted)


def _one_end(case: Case, job_id: str, job: Record) -> None:
    before, last = None, None
    for event in job["events"]:
        name = event["type"].removeprefix("job.")
        if name not in NEXT[before]:
            case.wrong(1, f"{job_id}: {name} after {before}")
        before = name
        last = name if name in TERMINAL else last if name == "cancel_requested" else None
    if last != job["state"] and (job["events"] or job["state"] in TERMINAL):
        case.wrong(1, f"{job_id}: its last event is {last}, its state {job['state']}")


def one_result(case: Case) -> None:
    """One success, by one token, and the record points at that attempt's own files."""
    for job_id, job in case.jobs.items():
        ends = [event for event in job["events"] if event["type"] == "job.succeeded"]
        if len(ends) > 1:
            case.wrong(2, f"{job_id} succeeded {len(ends)} times")
        winners = {c["token"] for c in case.calls[job_id] if c["s"] == "finish" and c["r"] == "ok"}
        if len(winners) > 1:
            case.wrong(2, f"{job_id}: tokens {sorted(winners)} were all told that they finished it")
        if winners and job["state"] != "succeeded":
            case.wrong(2, f"{job_id}: token {winners} was told that it finished; the job is {job['state']}")
        result = job["result"]
        if (job["state"] == "succeeded") != (result is not None):
            case.wrong(2, f"{job_id} is {job['state']}, result: {result is not None}")
        if result and winners:
            (token, *_) = winners
            if not result["video_key"].startswith(f"jobs/{job_id}/{token}/"):
                case.wrong(2, f"{job_id}: token {token} finished, the result is {result['video_key']}")


def stale_owners_lose(case: Case) -> None:
    """No write is accepted that began after a newer owner's claim had been answered."""
    refused = 0
    for job_id, calls in case.calls.items():
        newest: list[tuple[float, int]] = []  # (answered at, token) of each claim, as they came
        for call in calls:
            if call["s"] == "claim":
                newest.append((call["t"], call["token"]))
                continue
            if call["s"] not in OWNED:
                continue
            above = [token for at, token in newest if at < call["t0"] and token > call["token"]]
            if call["r"] == "lost":
                refused += 1
            elif above and call["r"] == "ok":
                case.wrong(
                    2, f"{job_id}: {call['s']} of token {call['token']} by {call['who']} was accepted "
                    f"though token {max(above)} owned the job"
                )  # fmt: skip
        tokens = [token for _, token in newest]
        owners = defaultdict(set)
        for call in calls:
            if call["s"] == "claim":
                owners[call["token"]].add(call["who"])
        for token, who in owners.items():
            if len(who) > 1:
                case.wrong(2, f"{job_id}: token {token} was given to {sorted(who)}")
        if tokens and job_id in case.jobs and max(tokens) > case.jobs[job_id]["token"]:
            case.wrong(2, f"{job_id}: token {max(tokens)} was given and is forgotten")
    case.report.figures["stale writes refused"] = refused
    if case.rules.floor and not refused:
        case.wrong(2, "no stale write was refused: the run proves nothing about fencing")
