"""The invariant checker: reads a history and the final store, nothing else, and says which promise broke.

The promises are those of docs/operations.md, by number.
"""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

TERMINAL = ("succeeded", "failed", "canceled", "expired")
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


class Checker:
    """One run's check. `run` gives the report."""

    def __init__(self, history: list[Record], final: Record, rules: Rules) -> None:
        self.history, self.final, self.rules = history, final, rules
        self.report = Report()
        self.jobs: dict[str, Record] = final["jobs"]
        self.calls: dict[str, list[Record]] = defaultdict(list)
        for record in history:
            if record["k"] == "call" and record.get("job"):
                self.calls[record["job"]].append(record)
        self.hooks: dict[str, list[Record]] = defaultdict(list)
        for record in history:
            if record["k"] == "hook":
                self.hooks[record["job"]].append(record)

    def run(self) -> Report:
        """All checks."""
        self.accepted_jobs_end()
        self.one_result()
        self.stale_owners_lose()
        self.lost_leases_are_noticed()
        self.attempts()
        self.cancels()
        self.answers()
        self.videos()
        self.webhooks()
        self.nothing_is_left()
        self.fault_counts()
        self.report.states = Counter(job["state"] for job in self.jobs.values())
        return self.report

    def wrong(self, promise: int, what: str) -> None:
        """One violation."""
        self.report.violations.append(f"promise {promise}: {what}")

    # 1. Every accepted job reaches exactly one terminal state

    def accepted_jobs_end(self) -> None:
        """Also: one job an Idempotency-Key, and no job that nobody was told of."""
        told: dict[str, set[str]] = defaultdict(set)
        for record in self.history:
            if record["k"] == "submit" and record.get("id"):
                told[record["idem"]].add(record["id"])
        for idem, ids in told.items():
            if len(ids) > 1:
                self.wrong(1, f"{idem} became {len(ids)} jobs: {sorted(ids)}")
        accepted = {job_id for ids in told.values() for job_id in ids}
        for job_id in sorted(accepted - self.jobs.keys()):
            self.wrong(1, f"{job_id} was accepted and is gone")
        for job_id in sorted(self.jobs.keys() - accepted):
            self.wrong(1, f"{job_id} is in the store, and no client was told of it")
        for job_id, job in self.jobs.items():
            if job["state"] not in TERMINAL:
                self.wrong(1, f"{job_id} has not ended: it is {job['state']}")
            self._one_end(job_id, job)
        self.report.figures["accepted"] = len(accepted)

    def _one_end(self, job_id: str, job: Record) -> None:
        before, last = None, None
        for event in job["events"]:
            name = event["type"].removeprefix("job.")
            if name not in NEXT[before]:
                self.wrong(1, f"{job_id}: {name} after {before}")
            before = name
            last = name if name in TERMINAL else last if name == "cancel_requested" else None
        if last != job["state"] and (job["events"] or job["state"] in TERMINAL):
            self.wrong(1, f"{job_id}: its last event is {last}, its state {job['state']}")

    # 2. At most one result; a stale owner can't write

    def one_result(self) -> None:
        """One success, by one token, and the record points at that attempt's own files."""
        for job_id, job in self.jobs.items():
            ends = [event for event in job["events"] if event["type"] == "job.succeeded"]
            if len(ends) > 1:
                self.wrong(2, f"{job_id} succeeded {len(ends)} times")
            winners = {c["token"] for c in self.calls[job_id] if c["s"] == "finish" and c["r"] == "ok"}
            if len(winners) > 1:
                self.wrong(2, f"{job_id}: tokens {sorted(winners)} were all told that they finished it")
            if winners and job["state"] != "succeeded":
                self.wrong(
                    2, f"{job_id}: token {winners} was told that it finished; the job is {job['state']}"
                )
            result = job["result"]
            if (job["state"] == "succeeded") != (result is not None):
                self.wrong(2, f"{job_id} is {job['state']}, result: {result is not None}")
            if result and winners:
                (token, *_) = winners
                if not result["video_key"].startswith(f"jobs/{job_id}/{token}/"):
                    self.wrong(2, f"{job_id}: token {token} finished, the result is {result['video_key']}")

    def stale_owners_lose(self) -> None:
        """No write is accepted that began after a newer owner's claim had been answered."""
        refused = 0
        for job_id, calls in self.calls.items():
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
                    self.wrong(
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
                    self.wrong(2, f"{job_id}: token {token} was given to {sorted(who)}")
            if tokens and job_id in self.jobs and max(tokens) > self.jobs[job_id]["token"]:
                self.wrong(2, f"{job_id}: token {max(tokens)} was given and is forgotten")
        self.report.figures["stale writes refused"] = refused
        if self.rules.floor and not refused:
            self.wrong(2, "no stale write was refused: the run proves nothing about fencing")

    # 3. A dead node's job runs again within lease + sweep

    def lost_leases_are_noticed(self) -> None:
        """From the last accepted renewal to the requeue; and never before the lease is over."""
        rules, found = self.rules, []
        away = [
            (r["t"], r["t"] + r.get("seconds", 3.0) + rules.lease)
            for r in self.history
            if r["k"] == "fault" and r["fault"] in ("redis unreachable", "kill redis")
        ]
        for job_id, job in self.jobs.items():
            renewals = [c for c in self.calls[job_id] if c["s"] in ("claim", "heartbeat") and c["r"] == "ok"]
            starts = 0
            for event in job["events"]:
                starts += event["type"] == "job.started"
                if event.get("why") != "lost":
                    continue
                at = event["ms"] / 1000
                own = [c["t0"] for c in renewals if c["t0"] <= at and c["token"] == starts]
                last = max(own, default=None)
                if last is None:
                    continue  # the claim's own reply was lost
                took = at - last
                if took < rules.lease - 0.1:
                    self.wrong(3, f"{job_id} was taken {took:.2f} s after a renewal (lease {rules.lease} s)")
                if any(begin < at and end > last for begin, end in away):
                    continue
                found.append(took)
                if took > rules.lease + rules.sweep + rules.slack:
                    self.wrong(3, f"{job_id}: its lost lease was noticed after {took:.1f} s")
        self.report.figures["lost lease noticed, s"] = spread(found)
        self.report.figures["next attempt after a kill, s"] = spread(self._recoveries())

    def _recoveries(self) -> list[float]:
        """From each kill or freeze that took a job from its owner to the job's next start."""
        took = []
        for record in self.history:
            if record["k"] != "fault" or not record.get("token") or record["fault"] == "drain":
                continue
            later = [
                c["t"]
                for c in self.calls.get(record["job"], [])
                if c["s"] == "claim" and c["token"] > record["token"] and c["t"] > record["t"]
            ]
            events = self.jobs.get(record["job"], {"events": []})["events"]
            ends = [e["ms"] / 1000 for e in events if e["type"].removeprefix("job.") in TERMINAL]
            # An end in between: what started later is an operator's replay.
            if later and not any(record["t"] < end < min(later) for end in ends):
                took.append(min(later) - record["t"])
        return took

    # 4. and 6. Attempts are capped, and a job given back keeps its count

    def attempts(self) -> None:
        """Each charge raises the count by one, nothing else does; the dead letter holds what was given up."""
        dead, replayed = set(self.final["dead"]), 0
        for job_id, job in self.jobs.items():
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
                    self.wrong(4, f"{job_id}: {count} charges, {event['attempts']} attempts at {name}")
                before = name if name != "cancel_requested" else before
            if job["attempts"] > self.rules.max_attempts:
                self.wrong(4, f"{job_id}: {job['attempts']} attempts of {self.rules.max_attempts}")
            if job["state"] == "failed":
                self._failed_rightly(job_id, job, charges, job_id in dead)
            elif job_id in dead:
                self.wrong(4, f"{job_id} is {job['state']} and in the dead letter")
            self.report.figures["given back"] = self.report.figures.get("given back", 0) + given_back
        self.report.figures["replayed"] = replayed

    def _failed_rightly(self, job_id: str, job: Record, charges: Counter[str], dead: bool) -> None:
        kind = (job["error"] or {}).get("failure_class")
        if kind == "user":
            if job["attempts"] != 1 or dead:
                self.wrong(
                    4, f"{job_id}: a user's error after {job['attempts']} attempts, dead letter: {dead}"
                )
        elif not dead:
            self.wrong(4, f"{job_id} failed ({kind}) and is not in the dead letter")
        elif kind != "out_of_memory" and job["attempts"] != self.rules.max_attempts:
            self.wrong(4, f"{job_id} was given up after {job['attempts']} attempts")
        elif kind == "out_of_memory" and charges[kind] < 2 and job["attempts"] < self.rules.max_attempts:
            self.wrong(4, f"{job_id} was given up after one out-of-memory")

    # 5. Cancel

    def cancels(self) -> None:
        """What a cancel's answer said stays true; one that came too late says so and changes nothing."""
        took: list[float] = []
        for record in self.history:
            if record["k"] != "cancel" or record.get("st") is None or record["id"] not in self.jobs:
                continue
            job, status = self.jobs[record["id"]], record["st"]
            ends = [e for e in job["events"] if e["type"].removeprefix("job.") in TERMINAL]
            end = ends[-1]["ms"] / 1000 if ends else None
            if status == 409 and end is not None and end > record["t"] + 0.01:
                self.wrong(5, f"{record['id']}: refused as too late {end - record['t']:.2f} s before its end")
            if status < 300 and record["state"] == "canceled" and job["state"] != "canceled":
                self.wrong(5, f"{record['id']}: canceled, the answer said; it is {job['state']}")
            if status < 300 and record["state"] == "running":
                if job["state"] not in ("canceled", "succeeded"):
                    self.wrong(5, f"{record['id']}: a running job's cancel ended as {job['state']}")
                if end is not None and job["state"] == "canceled":
                    took.append(end - record["t"])
        self.report.figures["running job canceled, s"] = spread(took)

    # 8. What clients hear while things are broken

    def answers(self) -> None:
        """Success, a conflict that is true, or 503 with Retry-After: nothing else."""
        allowed = {"submit": {200, 202, 429, 503}, "cancel": {200, 202, 409, 503}, "view": {200, 503}}
        heard: Counter[str] = Counter()
        for record in self.history:
            if record["k"] not in allowed:
                continue
            status = record.get("st")
            heard[str(status or record["err"])] += 1
            if status is not None and status not in allowed[record["k"]]:
                self.wrong(8, f"a {record['k']} was answered {status}")
            if status in (429, 503) and not record.get("retry_after"):
                self.wrong(8, f"a {record['k']} was answered {status} without Retry-After")
        self.report.figures["answers"] = dict(heard)

    # 9. Finished videos

    def videos(self) -> None:
        """Each result is in S3, whole; an attempt that nobody took away was computed once."""
        if not self.rules.s3:
            return
        objects, runs = self.final["objects"], self.final["runs"]
        for job_id, job in self.jobs.items():
            if job["result"]:
                for name in ("video_key", "poster_key", "manifest_key"):
                    key = job["result"][name]
                    if key not in objects:
                        self.wrong(9, f"{job_id}: {key} is not in S3")
                    elif name == "video_key" and objects[key]["bytes"] != job["result"]["bytes"]:
                        self.wrong(9, f"{job_id}: {key} has {objects[key]['bytes']} bytes")
            chaotic = job["request"].get("model") == "chaos"
            starts = runs.get(str(job["request"].get("seed")), []).count("start") if chaotic else 0
            if starts > job["token"]:
                self.wrong(9, f"{job_id}: computed {starts} times in {job['token']} attempts")
        self._same_request_same_video()
        for key in objects:
            if key.split("/")[1] not in self.jobs:
                self.wrong(11, f"{key} belongs to no job")
        for record in self.history:
            if record["k"] == "note" and record["what"] == "video" and not record["right"]:
                self.wrong(2, f"{record['job']}: its video shows another job's frames")
        if self.final["uploads"]:
            self.wrong(9, f"unfinished uploads: {self.final['uploads']}")

    def _same_request_same_video(self) -> None:
        """Whatever happened on the way: jobs of the same request have the same bytes."""
        sums: dict[str, set[str]] = defaultdict(set)
        real = 0
        for job in self.jobs.values():
            if job["result"]:
                sums[json.dumps(job["request"], sort_keys=True)].add(job["result"]["sha256"])
                real += job["request"].get("model") != "chaos"
        for request, found in sums.items():
            if len(found) > 1:
                self.wrong(9, f"{len(found)} different videos of one request: {request}")
        self.report.figures["videos by the real engine"] = real

    # 10. Webhooks

    def webhooks(self) -> None:
        """Each event once in the outbox, all ended, received in order with one id and one body."""
        for job_id, job in self.jobs.items():
            wanted = set(filter(None, job["hooks"].split(",")))
            expected = [e["type"] for e in job["events"] if e["type"].removeprefix("job.") in wanted]
            made = [d["event"] for d in job["deliveries"] if d["event"] != "job.progress"]
            if made != expected:
                self.wrong(10, f"{job_id}: events {expected}, webhooks {made}")
            received = self.hooks[job_id]
            first: list[float] = []
            for delivery in job["deliveries"]:
                mine = [hook for hook in received if hook["id"] == delivery["id"]]
                good = [hook["t"] for hook in mine if hook["st"] == 204]
                if delivery["state"] == "pending":
                    self.wrong(10, f"{delivery['id']} is still pending")
                elif delivery["state"] == "dead" and "/gone/" not in delivery["url"]:
                    self.wrong(10, f"{delivery['id']} was given up: {delivery['error']}")
                elif delivery["state"] == "delivered" and not good:
                    self.wrong(10, f"{delivery['id']} counts as delivered; the receiver has not got it")
                if len({hook["sha"] for hook in mine}) > 1:
                    self.wrong(10, f"{delivery['id']} came with different bodies")
                if not all(hook["ok"] for hook in mine):
                    self.wrong(10, f"{delivery['id']} was not signed rightly")
                first += good[:1]
            if first != sorted(first):
                self.wrong(10, f"{job_id}: webhooks out of order")
        gone: dict[str, float] = {}
        for hook in (h for hooks in self.hooks.values() for h in hooks if h["path"].startswith("/gone/")):
            first_at = gone.setdefault(hook["path"], hook["t"])
            if hook["t"] > first_at + 5.0:
                self.wrong(10, f"{hook['path']} answered 410 and was posted to again")
        self.report.figures["webhooks received"] = sum(map(len, self.hooks.values()))

    # 11. Nothing without an owner

    def nothing_is_left(self) -> None:
        """Queues, leases and counters are empty; every key belongs to something or ends by itself."""
        final = self.final
        for kind in ("leases", "lanes"):
            for name, members in final[kind].items():
                if members:
                    self.wrong(11, f"{name} still holds {members[:3]}")
        for name, fields in final["counters"].items():
            if any(int(value) for value in fields.values()):
                self.wrong(11, f"{name} counts {fields}")
        if final["outbox"]:
            self.wrong(10, f"the outbox still holds {len(final['outbox'])} deliveries")
        ended = {job_id for job_id, job in self.jobs.items() if job["state"] in TERMINAL}
        if missing := ended - set(final["retention"]):
            self.wrong(11, f"{len(missing)} ended jobs have no retention: {sorted(missing)[:3]}")
        for key, seconds in final["ttl"].items():
            if seconds == -1:
                self.wrong(11, f"{key} never expires")
        for key in final["keys"]:
            if not known_key(key, self.jobs):
                self.wrong(11, f"nobody owns {key}")

    # The run itself

    def fault_counts(self) -> None:
        """Faults that took effect, by kind; a run with too few of any proves too little."""
        counts: Counter[str] = Counter()
        for record in self.history:
            if record["k"] == "fault" and self._took_effect(record):
                counts[record["fault"]] += 1
        for kind in self.rules.kinds:
            if counts[kind] < self.rules.floor:
                self.report.violations.append(
                    f"the run: {kind!r} fired {counts[kind]} times of {self.rules.floor}"
                )
        for what, number, least in (
            ("jobs", self.report.figures["accepted"], self.rules.least_jobs),
            ("faults", counts.total(), self.rules.least_faults),
        ):
            if number < least:
                self.report.violations.append(f"the run: {number} {what} of {least}")
        self.report.faults = counts

    def _took_effect(self, fault: Record) -> bool:
        """Whether a fault that was asked for in a prompt has happened: the events say so."""
        if not fault.get("asked"):
            return True
        job = self.jobs.get(fault["job"], {"events": [], "request": {}})
        why = Counter(event["why"] for event in job["events"] if event.get("why"))
        starts = self.final["runs"].get(str(job["request"].get("seed")), []).count("start")
        if fault["fault"] == "out of memory":
            return why["out_of_memory"] >= 1
        if fault["fault"] == "poison":
            return starts >= 3 and any(event["type"] == "job.failed" for event in job["events"])
        return starts >= 2


GLOBAL = re.compile(
    r"reel:(queues|deadlines|retention|dead|garbage|outbox|outbox:dead|nodes|models|uploads|uploads:users"
    r"|apikeys|apikeys:hashes|apikeys:endpoints|celery:.*|login.*"
    r"|(lane|lanes|rising|vtime|waiting|running|leases|timings|wake|claim|idem|gone|node|drain|list|rate):.*)$"
)
OF_JOB = re.compile(r"reel:(?:job|body|events|deliveries|pending):(job_\w+)$|reel:delivery:msg_(\w+)_\d+$")


def known_key(key: str, jobs: dict[str, Record]) -> bool:
    """Whether a Redis key belongs to a known job, or to the service as a whole (see jobs/scripts.py)."""
    match = OF_JOB.match(key)
    if match:
        return (match[1] or f"job_{match[2]}") in jobs
    return bool(GLOBAL.match(key)) or key.startswith("_kombu")


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
