"""Pages of jobs: newest first, filtered, stable while jobs come and go."""

import pytest

from jobs.errors import JobNotFound
from jobs.job import Job, JobState
from jobs.queries import SCAN
from jobs.store import JobStore
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job, result


def pages(store: JobStore, key_id: str, limit: int = 3, **filters: object) -> list[Job]:
    jobs, cursor = store.list(key_id, limit=limit, **filters)
    found = list(jobs)
    while cursor:
        assert len(jobs) <= limit
        jobs, cursor = store.list(key_id, limit=limit, cursor=cursor, **filters)
        found += jobs
    return found


def test_all_pages_hold_each_job_once_newest_first(store: JobStore) -> None:
    ids = [store.submit(new_job("key_a"))[0].id for _ in range(10)]
    store.submit(new_job("key_b"))
    assert [job.id for job in pages(store, "key_a")] == sorted(ids, reverse=True)
    assert len(pages(store, "*")) == 11
    assert pages(store, "key_c") == []


@pytest.mark.parametrize("limit", [1, 2, 5, 10, 11])
def test_the_last_page_says_so(store: JobStore, limit: int) -> None:
    for _ in range(10):
        store.submit(new_job())
    jobs, cursor = store.list("key_a", limit=limit)
    assert len(jobs) == min(limit, 10)
    assert (cursor is None) == (limit >= 10)


def test_new_jobs_do_not_shift_pages(store: JobStore) -> None:
    ids = sorted((store.submit(new_job())[0].id for _ in range(6)), reverse=True)
    first, cursor = store.list("key_a", limit=3)
    store.submit(new_job())
    store.cancel(ids[2])
    store.delete(ids[2])  # the very job that the cursor names
    second, end = store.list("key_a", limit=3, cursor=cursor)
    assert [job.id for job in first + second] == ids
    assert end is None


def test_every_filter_and_combination(store: JobStore) -> None:
    for i in range(24):
        key, model, ref = f"key_{i % 2}", ("tiny", "big")[i // 2 % 2], f"r{i // 4 % 2}"
        job, _ = store.submit(new_job(key, model=model, metadata={"ref": ref}))
        if i % 3 == 0:
            store.cancel(job.id)
    everything = pages(store, "*", limit=50)
    assert len(everything) == 24
    for key in ("key_0", "key_1", "*"):
        for state in (None, JobState.QUEUED, JobState.CANCELED, JobState.FAILED):
            for model in (None, "tiny", "none"):
                for ref in (None, "r0", "r9"):
                    expected = [
                        job.id
                        for job in everything
                        if key in (job.key_id, "*")
                        and state in (job.state, None)
                        and model in (job.request.model, None)
                        and ref in (job.metadata["ref"], None)
                    ]
                    found = pages(store, key, state=state, model=model, ref=ref)
                    assert [job.id for job in found] == expected, (key, state, model, ref)


def test_a_rare_match_is_found_behind_many_others(make_store: MakeStore) -> None:
    store = make_store(max_outstanding_per_key=2000)
    rare, _ = store.submit(new_job(model="rare"))
    for _ in range(SCAN + 20):
        store.submit(new_job())
    jobs, cursor = store.list("*", model="rare")
    assert jobs == []
    assert cursor is not None  # a page looks at a bounded number of jobs
    assert [job.id for job in pages(store, "*", model="rare")] == [rare.id]


def test_states_follow_the_job(store: JobStore) -> None:
    store.submit(new_job())
    for state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
        for wanted in JobState:
            assert len(store.list("key_a", state=wanted)[0]) == (wanted == state)
            assert len(store.list("*", state=wanted)[0]) == (wanted == state)
        if state == JobState.QUEUED:
            store.claim("tiny", "node")
        elif state == JobState.RUNNING:
            job = store.list("key_a")[0][0]
            store.finish(job.id, job.token, result())


def test_no_such_job(store: JobStore) -> None:
    with pytest.raises(JobNotFound):
        store.get("job_nowhere")
    with pytest.raises(JobNotFound):
        store.position("job_nowhere")
    with pytest.raises(JobNotFound):
        store.cancel("job_nowhere")
