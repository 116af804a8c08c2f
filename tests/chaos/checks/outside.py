"""Promises 8, 9 and 10: what clients hear, what S3 holds, what receivers get."""

import json
from collections import Counter, defaultdict

from tests.chaos.checks.case import Case

# A sender that dies, or can't reach Redis, between the post and its report posts again: at least once.
UNHEARD = ("kill redis", "redis unreachable", "kill celery worker", "dropped reply")


def answers(case: Case) -> None:
    """Success, a conflict that is true, or 503 with Retry-After: nothing else."""
    allowed = {"submit": {200, 202, 429, 503}, "cancel": {200, 202, 409, 503}, "view": {200, 503}}
    heard: Counter[str] = Counter()
    for record in case.history:
        if record["k"] not in allowed:
            continue
        status = record.get("st")
        heard[str(status or record["err"])] += 1
        if status is not None and status not in allowed[record["k"]]:
            case.wrong(8, f"a {record['k']} was answered {status}")
        if status in (429, 503) and not record.get("retry_after"):
            case.wrong(8, f"a {record['k']} was answered {status} without Retry-After")
    case.report.figures["answers"] = dict(heard)


def videos(case: Case) -> None:
    """Each result is in S3, whole; an attempt that nobody took away was computed once."""
    if not case.rules.s3:
        return
    objects, runs = case.final["objects"], case.final["runs"]
    for job_id, job in case.jobs.items():
        if job["result"]:
            for name in ("video_key", "poster_key", "manifest_key"):
                key = job["result"][name]
                if key not in objects:
                    case.wrong(9, f"{job_id}: {key} is not in S3")
                elif name == "video_key" and objects[key]["bytes"] != job["result"]["bytes"]:
                    case.wrong(9, f"{job_id}: {key} has {objects[key]['bytes']} bytes")
        chaotic = job["request"].get("model") == "chaos"
        starts = runs.get(str(job["request"].get("seed")), []).count("start") if chaotic else 0
        attempts = sum(event["type"] == "job.started" for event in job["events"])
        if starts > attempts:
            case.wrong(9, f"{job_id}: computed {starts} times in {attempts} attempts")
    _same_request_same_video(case)
    for key in objects:
        if key.split("/")[1] not in case.jobs:
            case.wrong(11, f"{key} belongs to no job")
    for record in case.history:
        if record["k"] == "note" and record["what"] == "video" and not record["right"]:
            case.wrong(2, f"{record['job']}: its video shows another job's frames")
    if case.final["uploads"]:
        case.wrong(9, f"unfinished uploads: {case.final['uploads']}")


def _same_request_same_video(case: Case) -> None:
    """Whatever happened on the way: jobs of the same request have the same bytes."""
    sums: dict[str, set[str]] = defaultdict(set)
    real = 0
    for job in case.jobs.values():
        if job["result"]:
            sums[json.dumps(job["request"], sort_keys=True)].add(job["result"]["sha256"])
            real += job["request"].get("model") != "chaos"
    for request, found in sums.items():
        if len(found) > 1:
            case.wrong(9, f"{len(found)} different videos of one request: {request}")
    case.report.figures["videos by the real engine"] = real


def webhooks(case: Case) -> None:
    """Each event once in the outbox, all ended, received in order with one id and one body."""
    for job_id, job in case.jobs.items():
        wanted = set(filter(None, job["hooks"].split(",")))
        expected = [e["type"] for e in job["events"] if e["type"].removeprefix("job.") in wanted]
        made = [d["event"] for d in job["deliveries"] if d["event"] != "job.progress"]
        if made != expected:
            case.wrong(10, f"{job_id}: events {expected}, webhooks {made}")
        received = case.hooks[job_id]
        first: list[float] = []
        for delivery in job["deliveries"]:
            mine = [hook for hook in received if hook["id"] == delivery["id"]]
            good = [hook["t"] for hook in mine if hook["st"] == 204]
            if delivery["state"] == "pending":
                case.wrong(10, f"{delivery['id']} is still pending")
            elif delivery["state"] == "dead" and "/gone/" not in delivery["url"]:
                case.wrong(10, f"{delivery['id']} was given up: {delivery['error']}")
            elif delivery["state"] == "delivered" and not good:
                case.wrong(10, f"{delivery['id']} counts as delivered; the receiver has not got it")
            if len({hook["sha"] for hook in mine}) > 1:
                case.wrong(10, f"{delivery['id']} came with different bodies")
            if not all(hook["ok"] for hook in mine):
                case.wrong(10, f"{delivery['id']} was not signed rightly")
            first += good[:1]
        if first != sorted(first):
            case.wrong(10, f"{job_id}: webhooks out of order")
    _gone_is_gone(case)
    case.report.figures["webhooks received"] = sum(map(len, case.hooks.values()))


def _gone_is_gone(case: Case) -> None:
    """An address that answered 410 gets no more, unless the answer could not be noted at that moment."""
    away = [
        (r["t"] - 1.0, r["t"] + r.get("seconds", 0.0) + 3.0)
        for r in case.history
        if r["k"] == "fault" and r["fault"] in UNHEARD
    ]
    first: dict[str, float] = {}
    for hook in (h for hooks in case.hooks.values() for h in hooks if h["path"].startswith("/gone/")):
        at = first.setdefault(hook["path"], hook["t"])
        if hook["t"] > at + 5.0 and not any(begin <= at <= end for begin, end in away):
            case.wrong(10, f"{hook['path']} answered 410 and was posted to again")
