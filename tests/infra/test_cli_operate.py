"""`reel jobs`, `nodes`, `drain`, `dead` and `keys`: what an operator sees and changes, over a real Redis."""

import json
from collections.abc import Callable, Iterator

import pytest

from infra.cli import invoke
from jobs.client import RedisClient, connect
from jobs.job import FailureClass, JobError, JobState
from jobs.keys import KeyStore, Scope
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings, get_settings
from jobs.store import JobStore
from tests.support.jobs import new_job
from tests.support.redis import RedisServer, redis_server

SECRET = "a secret key for tests"
Reel = Callable[..., str]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def redis(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisClient]:
    """An empty Redis that `reel` finds by its environment."""
    monkeypatch.setenv("REEL_REDIS_URL", server.url)
    monkeypatch.setenv("REEL_SECRET_KEY", SECRET)
    get_settings.cache_clear()
    client = connect(Settings(redis_url=server.url))
    client.execute_command("FLUSHALL")
    yield client
    client.close()
    get_settings.cache_clear()


@pytest.fixture
def store(redis: RedisClient, server: RedisServer) -> JobStore:
    return JobStore(redis, Settings(redis_url=server.url))


@pytest.fixture
def reel(redis: RedisClient, capsys: pytest.CaptureFixture[str]) -> Reel:
    """Runs `reel ...`, expecting the exit status `code`, and gives what it printed."""

    def run(*args: str, code: int = 0) -> str:
        capsys.readouterr()
        assert invoke(list(args)) == code
        seen = capsys.readouterr()
        return seen.out + seen.err

    return run


def ids(lines: str) -> list[str]:
    return [json.loads(line)["id"] for line in lines.splitlines()]


def failed(store: JobStore) -> str:
    """A job that used up its attempts."""
    made, _ = store.submit(new_job())
    error = JobError(type="x", title="x", detail="no GPU", failure_class=FailureClass.INFRASTRUCTURE)
    for _ in range(store.settings.max_attempts):
        job = store.claim("tiny", "n1")
        assert job is not None
        store.fail(job.id, job.token, error)
    return made.id


def test_a_drain_is_asked_of_a_node_that_is_there(reel: Reel, redis: RedisClient) -> None:
    nodes = NodeRegistry(redis)
    assert reel("drain", "n1", code=1) == "reel: no node 'n1'; there are: none\n"
    for name in ("n1", "n2"):
        nodes.register(NodeInfo(id=name, model="tiny", state="idle"))
    assert reel("drain", "n3", code=1) == "reel: no node 'n3'; there are: n1, n2\n"
    assert "n1 will take no more jobs" in reel("drain", "n1")
    assert [nodes.drain_requested(name) for name in ("n1", "n2")] == [True, False]
    rows = [line.split() for line in reel("nodes").splitlines()]
    assert [(row[0], row[-1]) for row in rows] == [("id", "drain"), ("n1", "asked"), ("n2", "ago")]
    assert ids(reel("nodes", "--json")) == ["n1", "n2"]


def test_jobs_are_found_by_state_and_model(reel: Reel, store: JobStore) -> None:
    dead = failed(store)
    first, other, last = (
        store.submit(new_job(key, model=m))[0].id for key, m in zip("abc", "xyx", strict=True)
    )
    assert ids(reel("jobs", "--json")) == [last, other, first, dead], "of all keys, newest first"
    assert ids(reel("jobs", "--json", "--limit", "2")) == [last, other]
    assert ids(reel("jobs", "--json", "--model", "x")) == [last, first]
    assert ids(reel("jobs", "--json", "--state", "failed")) == [dead]
    shown = reel("jobs", "--state", "failed").splitlines()
    assert len(shown) == 2
    assert shown[1].startswith(dead)
    assert shown[1].endswith("no GPU")
    assert "--state: got 'done', expected one of queued" in reel("jobs", "--state", "done", code=1)
    assert "--watch draws a table" in reel("jobs", "--json", "--watch", code=1)


def test_a_dead_job_is_listed_and_queued_again(reel: Reel, store: JobStore) -> None:
    dead = failed(store)
    waiting, _ = store.submit(new_job())
    assert ids(reel("dead", "list", "--json")) == [dead]
    assert reel("dead", "replay", dead) == f"{dead} is queued again\n"
    again = store.get(dead)
    assert (again.state, again.attempts) == (JobState.QUEUED, 0)
    assert ids(reel("dead", "list", "--json")) == []
    assert waiting.id in reel("dead", "replay", waiting.id, code=1)


def test_a_keys_life(reel: Reel, redis: RedisClient) -> None:
    """What is shown opens the service, and a list shows nothing that does."""
    keys = KeyStore(redis, SECRET)
    made = dict(
        line.rsplit(maxsplit=1)
        for line in reel(
            "keys",
            "create",
            "shop",
            "--scope",
            "read",
            "--max-outstanding",
            "3",
            "--requests-per-minute",
            "1000",
        ).splitlines()
    )
    key = keys.authenticate(made["key"])
    assert key is not None
    assert (key.id, key.scopes) == (made["id"], frozenset({Scope.READ}))
    assert (key.max_outstanding, key.requests_per_minute) == (3, 1000)
    assert keys.webhook_secrets(key.id) == [made["webhook secret"]]
    shown = reel("keys", "list") + reel("keys", "list", "--json")
    assert key.id in shown
    assert made["key"] not in shown
    assert made["webhook secret"] not in shown

    new = reel("keys", "rotate", key.id, "--overlap-hours", "0").split()[1]
    assert keys.authenticate(made["key"]) is None
    renewed = keys.authenticate(new)
    assert renewed is not None
    assert renewed.id == key.id
    secret = reel("keys", "rotate-secret", key.id, "--overlap-hours", "1").split()[2]
    assert keys.webhook_secrets(key.id) == [secret, made["webhook secret"]]
    reel("keys", "revoke", key.id)
    assert keys.authenticate(new) is None
    for command in ("revoke", "rotate", "rotate-secret"):
        assert "no key 'key_none'" in reel("keys", command, "key_none", code=1)
    assert "--scope: got 'root'" in reel("keys", "create", "x", "--scope", "root", code=1)


def test_a_key_may_submit_and_read_unless_told_otherwise(reel: Reel, redis: RedisClient) -> None:
    key = KeyStore(redis, SECRET).authenticate(reel("keys", "create", "x").splitlines()[1].split()[-1])
    assert key is not None
    assert set(key.scopes) == {Scope.SUBMIT, Scope.READ}
