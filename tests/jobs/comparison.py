"""The real store and the Python model side by side: each call goes to both, and they must agree."""

from typing import Any

from jobs.errors import IllegalTransition, LeaseLost
from jobs.job import FailureClass, Job, JobError, JobState, Priority, WebhookEvent
from jobs.outbox import Outbox
from jobs.scripts import Scripts
from jobs.store import JobStore
from tests.jobs.model import LIVE, Model, ModelJob
from tests.support.jobs import new_job, result
from tests.support.redis import rewind

EVENTS = tuple(event for event in WebhookEvent if event != WebhookEvent.PROGRESS)
MAX_ATTEMPTS = 3
SETTINGS = {
    "lease_seconds": 9999,
    "aging_seconds": 1e9,
    "max_attempts": MAX_ATTEMPTS,
}  # time only passes by rewind


class Comparison:
    """Any difference is an AssertionError. `store` has SETTINGS; its Redis is emptied."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        store.redis.execute_command("FLUSHALL")
        store.scripts = Scripts(store.redis, store.settings)  # whatever is planted now
        self.outbox = Outbox(store.redis, store.settings)
        self.model = Model(MAX_ATTEMPTS)
        self.tokens: dict[str, list[int]] = {}  # by job: what each claim gave, where the model counts
        self.versions: dict[str, tuple[int, Job | None]] = {}
        self.sent: dict[str, list[str]] = {}

    def submit(self, key: str = "a", priority: Priority = Priority.NORMAL, hooked: bool = False) -> ModelJob:
        url = "https://example.com/hook" if hooked else None
        new = new_job(
            key, priority=priority, callback_url=url, webhook_events=EVENTS, deadline_seconds=9999.0
        )
        for created in (
            self.store.submit(new),
            self.store.submit(new),
        ):  # the second as if the reply was lost
            assert created[1]
        self.model.submit(new.id, key, priority.value, hooked)
        self.tokens[new.id] = [0]
        return self.model.jobs[new.id]

    def claim(self, node: str = "n1") -> ModelJob:
        """A claim that must give what the model says (which must be something)."""
        job_id = self.try_claim(node)
        assert job_id is not None
        return self.model.jobs[job_id]

    def try_claim(self, node: str = "n1") -> str | None:
        job = self.store.claim("tiny", node)
        expected = self.model.claim(node)
        assert (job.id if job else None) == expected
        if job is not None:
            assert job.token > self.tokens[job.id][-1]
            self.tokens[job.id].append(job.token)
        return expected

    def node_side(
        self, job: ModelJob, call: str, *, kind: FailureClass = FailureClass.INFRASTRUCTURE, stale: int = 0
    ) -> None:
        """One call with the current token, or one that is `stale` claims old."""
        token = job.token - stale
        before = self.store.get(job.id)
        owns = job.state == "running" and not stale
        again = job.ended == (token, call)
        legal = owns and (call != "cancel_running" or job.cancel_requested)
        try:
            answer = self._call(call, job.id, self.tokens[job.id][token], kind)
        except LeaseLost:
            assert not owns
            assert not again
        except IllegalTransition:
            assert owns
            assert not legal
        else:
            assert legal or again
            if again:
                assert answer == before
            elif call == "heartbeat":
                assert answer == job.cancel_requested
                job.lease_over = False
            elif call == "fail":
                self.model.fail(job, kind.value)
            else:
                getattr(self.model, call)(job)
        if not legal:
            assert self.store.get(job.id) == before

    def _call(self, call: str, job_id: str, token: int, kind: FailureClass) -> object:
        if call == "heartbeat":
            return self.store.heartbeat(job_id, token, phase="denoising", step=1, progress=0.5)
        if call == "finish":
            return self.store.finish(job_id, token, result(job_id, token))
        if call == "fail":
            error = JobError(type="boom", title="Boom", detail="it broke", failure_class=kind)
            return self.store.fail(job_id, token, error)
        return getattr(self.store, call)(job_id, token)

    def client_side(self, job: ModelJob, call: str) -> None:
        """cancel, delete, reject or replay."""
        legal = {
            "cancel": job.state in LIVE,
            "delete": job.state not in LIVE,
            "reject": job.state == "queued",
            "replay": job.dead,
        }[call]
        error = JobError(type="rejected", title="Rejected", detail="by the operator")
        extra: tuple[Any, ...] = (error,) if call == "reject" else ()
        try:
            getattr(self.store, call)(job.id, *extra)
        except IllegalTransition:
            assert not legal
            return
        assert legal
        if call == "delete":
            del self.model.jobs[job.id]
            self.sent.pop(job.id, None)
        else:
            getattr(self.model, call)(job)

    def pass_time(self, job: ModelJob) -> None:
        """A running job's lease, or a waiting one's deadline, is over."""
        running = job.state == "running"
        has_deadline = self.store.get(job.id).deadline_at is not None
        rewind(self.store.redis, job.id, lease=running, deadline=not running)
        if running:
            job.lease_over = True
        elif not job.started and has_deadline:
            job.deadline_over = True

    def sweep(self) -> None:
        self.store.sweep()
        self.model.sweep()

    def send_webhooks(self, outcome: str = "delivered") -> None:
        """One round over what is due: delivered, retry, dead, or crash (taken and never reported)."""
        taken = [self.outbox.take(due, 0.0001 if outcome == "crash" else 60) for due in self.outbox.due()]
        jobs = [delivery.job_id for delivery in taken if delivery]
        assert len(jobs) == len(set(jobs)) == len(taken), "two deliveries of one job at once"
        for delivery in taken:
            assert delivery is not None
            if outcome == "retry":
                assert self.outbox.retry(delivery.id, 0, attempt=delivery.attempt, status=500)
            elif outcome == "dead":
                assert self.outbox.dead(delivery.id, attempt=delivery.attempt, status=500)
            elif outcome == "delivered":
                assert self.outbox.delivered(delivery.id, 200, attempt=delivery.attempt)
            if outcome in ("dead", "delivered"):
                self.sent.setdefault(delivery.job_id, []).append(delivery.event)

    def check(self) -> None:
        """Records and queues agree."""
        self._check_records()
        self._check_queues()

    def _check_records(self) -> None:
        jobs = {job.id: job for job in self.store.list("*", limit=400)[0]}
        assert jobs.keys() == self.model.jobs.keys()
        for job_id, job in jobs.items():
            expected = self.model.jobs[job_id]
            assert len(self.tokens[job_id]) == expected.token + 1
            seen = (job.state.value, job.attempts, job.token, job.cancel_requested)
            token = self.tokens[job_id][-1]
            assert seen == (expected.state, expected.attempts, token, expected.cancel_requested)
            if expected.state in LIVE:
                assert job.owner == expected.owner
            assert (job.lease_until is not None) == (job.state == "running")
            assert (job.result is not None) == (job.state == "succeeded")
            if job.result:
                assert job.result.video_key.startswith(f"jobs/{job_id}/{job.token}/")
            shown = job.model_copy(update={"version": 0, "lease_until": None, "deadline_at": None})
            version, before = self.versions.get(job_id, (0, None))
            assert job.version > version or (job.version == version and shown == before)
            self.versions[job_id] = (job.version, shown)

    def _check_queues(self) -> None:
        jobs = self.model.jobs.values()
        expected = {
            "leases:tiny": {job.id for job in jobs if job.state == "running"},
            "dead": {job.id for job in jobs if job.dead},
        }
        for state in JobState:
            for key in {"*", *(job.key for job in jobs)}:
                mine = {job.id for job in jobs if job.state == state and key in ("*", job.key)}
                expected[f"list:{key}:s:{state}"] = mine
        pipe = self.store.redis.pipeline(transaction=False)
        for name in expected:
            pipe.execute_command("ZRANGE", f"reel:{name}", 0, -1)
        for name, members in zip(expected, pipe.execute(), strict=True):
            assert set(members) == expected[name], name
        for row in self.store.queue_stats():
            mine_now = [job.state for job in jobs if job.priority == row.priority]
            assert (row.waiting, row.running) == (mine_now.count("queued"), mine_now.count("running"))

    def check_webhooks(self) -> None:
        """Send what is left: every delivery was made, and they went out in order."""
        for _ in range(200):
            if not self.outbox.pending():
                break
            self.send_webhooks()
        for job in self.model.jobs.values():
            assert [delivery.event for delivery in self.outbox.for_job(job.id)] == job.deliveries
            assert self.sent.get(job.id, []) == job.deliveries
