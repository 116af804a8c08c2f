"""Random histories for the comparison of store and model, by hypothesis."""

from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jobs.job import FailureClass, Priority
from jobs.store import JobStore
from tests.jobs.comparison import Comparison
from tests.jobs.model import ModelJob


class StoreMachine(RuleBasedStateMachine):
    """Set `store` before running."""

    store: ClassVar[JobStore]

    def __init__(self) -> None:
        super().__init__()
        self.both = Comparison(self.store)

    def pick(self, number: int, *states: str) -> ModelJob | None:
        """One of the jobs in the states (of all jobs when there is none)."""
        every = list(self.both.model.jobs.values())
        jobs = [job for job in every if job.state in states] or every
        return jobs[number % len(jobs)] if jobs else None

    @rule(
        key=st.sampled_from("abc"),
        priority=st.sampled_from(Priority),
        hooked=st.booleans(),
        copies=st.integers(1, 3),
    )
    def submit(self, key: str, priority: Priority, hooked: bool, copies: int) -> None:
        for _ in range(copies):
            self.both.submit(key, priority, hooked)

    @rule(node=st.sampled_from(["n1", "n2"]))
    def claim(self, node: str) -> None:
        self.both.try_claim(node)

    @precondition(lambda self: self.both.model.jobs)
    @rule(
        number=st.integers(0, 9),
        call=st.sampled_from(["heartbeat", "finish", "fail", "fail", "give_back", "cancel_running"]),
        kind=st.sampled_from(FailureClass),
        stale=st.sampled_from([0, 0, 0, 1]),
        state=st.sampled_from(["running", "running", "any"]),
    )
    def node_side(self, number: int, call: str, kind: FailureClass, stale: int, state: str) -> None:
        job = self.pick(number, state)
        assert job is not None
        self.both.node_side(job, call, kind=kind, stale=stale)

    @precondition(lambda self: self.both.model.jobs)
    @rule(number=st.integers(0, 9), call=st.sampled_from(["cancel", "cancel", "delete", "reject", "replay"]))
    def client_side(self, number: int, call: str) -> None:
        job = self.pick(number)
        assert job is not None
        self.both.client_side(job, call)

    @precondition(lambda self: self.both.model.jobs)
    @rule(number=st.integers(0, 9), state=st.sampled_from(["queued", "running"]))
    def time_passes(self, number: int, state: str) -> None:
        job = self.pick(number, state)
        assert job is not None
        self.both.pass_time(job)

    @rule()
    def sweep(self) -> None:
        self.both.sweep()

    @rule(outcome=st.sampled_from(["delivered", "delivered", "retry", "dead", "crash"]))
    def send_webhooks(self, outcome: str) -> None:
        self.both.send_webhooks(outcome)

    @rule()
    def redis_forgets_scripts(self) -> None:
        self.store.redis.execute_command("SCRIPT FLUSH")

    @invariant()
    def agree(self) -> None:
        self.both.check()

    def teardown(self) -> None:
        self.both.check_webhooks()
