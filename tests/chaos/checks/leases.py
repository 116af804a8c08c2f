"""Promise 3: a lost lease is noticed in time, and never too early."""

from tests.chaos.checks.case import TERMINAL, Case, spread

CLOCK = 0.002  # seconds: events' times are whole milliseconds


def lost_leases_are_noticed(case: Case) -> None:
    """From the last accepted renewal to the requeue; and never before the lease is over."""
    rules, found = case.rules, []
    away = [
        (r["t"], r["t"] + r.get("seconds", 3.0) + rules.lease)
        for r in case.history
        if r["k"] == "fault" and r["fault"] in ("redis unreachable", "kill redis")
    ]
    for job_id, job in case.jobs.items():
        renewals = [c for c in case.calls[job_id] if c["s"] in ("claim", "heartbeat") and c["r"] == "ok"]
        claims = [c for c in renewals if c["s"] == "claim"]
        began = 0.0
        for event in job["events"]:
            at = event["ms"] / 1000
            began = at if event["type"] == "job.started" else began
            if event.get("why") != "lost":
                continue
            # The claim behind this start names the token; its own reply may have been lost.
            token = next((c["token"] for c in claims if c["t0"] - CLOCK <= began <= c["t"] + CLOCK), None)
            own = [c["t0"] for c in renewals if c["t0"] <= at and c["token"] == token]
            last = max(own, default=None)
            if last is None:
                continue  # the claim's own reply was lost
            took = at - last
            if took < rules.lease - 0.1:
                case.wrong(3, f"{job_id} was taken {took:.2f} s after a renewal (lease {rules.lease} s)")
            if any(begin < at and end > last for begin, end in away):
                continue
            found.append(took)
            if took > rules.lease + rules.sweep + rules.slack:
                case.wrong(3, f"{job_id}: its lost lease was noticed after {took:.1f} s")
    case.report.figures["lost lease noticed, s"] = spread(found)
    case.report.figures["next attempt after a kill, s"] = spread(_recoveries(case))


def _recoveries(case: Case) -> list[float]:
    """From each kill or freeze that took a job from its owner to the job's next start."""
    took = []
    for record in case.history:
        if record["k"] != "fault" or not record.get("token") or record["fault"] == "drain":
            continue
        later = [
            c["t"]
            for c in case.calls.get(record["job"], [])
            if c["s"] == "claim" and c["token"] > record["token"] and c["t"] > record["t"]
        ]
        events = case.jobs.get(record["job"], {"events": []})["events"]
        ends = [e["ms"] / 1000 for e in events if e["type"].removeprefix("job.") in TERMINAL]
        # An end in between: what started later is an operator's replay.
        if later and not any(record["t"] < end < min(later) for end in ends):
            took.append(min(later) - record["t"])
    return took
