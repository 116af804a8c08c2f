"""Order: fair between keys, strict between priorities, ageing, wake-ups, figures."""

import threading
import time

from jobs.job import Job, Priority
from jobs.store import JobStore
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job, result, video_request
from tests.support.redis import rewind

P = Priority


def submit(store: JobStore, key: str, priority: Priority = P.NORMAL, **more: object) -> Job:
    return store.submit(new_job(key, priority=priority, **more))[0]


def drain(store: JobStore, count: int = 1000) -> list[Job]:
    jobs = []
    while len(jobs) < count and (job := store.claim("tiny", "node")):
        jobs.append(job)
    return jobs


def test_a_key_s_jobs_start_in_order(store: JobStore) -> None:
    ids = [submit(store, "a").id for _ in range(10)]
    assert [job.id for job in drain(store)] == ids


def test_a_key_with_many_jobs_does_not_starve_one_with_few(store: JobStore) -> None:
    for _ in range(50):
        submit(store, "many")
    drain(store, 10)
    for _ in range(3):
        submit(store, "few")
    order = [job.key_id for job in drain(store)]
    assert [i for i, key in enumerate(order) if key == "few"][-1] <= 6


def test_keys_share_evenly(store: JobStore) -> None:
    for _ in range(30):
        for key in ("a", "b", "c"):
            submit(store, key)
    order = [job.key_id for job in drain(store)]
    for start in range(0, 90, 3):
        assert sorted(order[start : start + 3]) == ["a", "b", "c"]


def test_coming_and_going_gains_nothing(store: JobStore) -> None:
    """A key that always has one job waiting gets no more than one with a long queue."""
    for _ in range(40):
        submit(store, "steady")
    submit(store, "pulse")
    order = []
    for _ in range(40):
        job = store.claim("tiny", "node")
        assert job is not None
        order.append(job.key_id)
        if job.key_id == "pulse":
            submit(store, "pulse")
    assert abs(order.count("pulse") - 20) <= 1


def test_an_idle_key_saves_up_no_turns(store: JobStore) -> None:
    submit(store, "idle")
    for _ in range(40):
        submit(store, "busy")
    drain(store, 31)
    for _ in range(10):
        submit(store, "idle")
    assert abs([job.key_id for job in drain(store, 10)].count("idle") - 5) <= 1


def test_priorities_are_strict(store: JobStore) -> None:
    for priority in (P.LOW, P.NORMAL, P.HIGH, P.LOW, P.HIGH, P.NORMAL):
        submit(store, "a", priority)
        submit(store, "b", priority)
    assert [job.priority for job in drain(store)] == [P.HIGH] * 4 + [P.NORMAL] * 4 + [P.LOW] * 4


def test_a_waiting_job_rises_one_level_at_a_time(make_store: MakeStore) -> None:
    store = make_store(aging_seconds=0.6)
    old = submit(store, "old", P.LOW)
    time.sleep(0.65)  # as good as normal now
    high = submit(store, "x", P.HIGH)
    normal = [submit(store, "y", P.NORMAL) for _ in range(2)]
    order = [job.id for job in drain(store)]
    # not before the high one, and taking turns with the other key of its new level
    assert order == [high.id, normal[0].id, old.id, normal[1].id]


def test_a_low_job_is_not_starved_by_a_stream_of_high_ones(make_store: MakeStore) -> None:
    store = make_store(aging_seconds=0.1)
    low = submit(store, "low", P.LOW)
    started = time.monotonic()
    while True:
        submit(store, "high", P.HIGH)
        submit(store, "high", P.HIGH)
        job = store.claim("tiny", "node")
        assert job is not None
        if job.id == low.id:
            break
        assert time.monotonic() - started < 5, "the low job starved"
        time.sleep(0.005)
    assert time.monotonic() - started >= 0.2


def test_a_sweep_also_lifts_lanes(make_store: MakeStore) -> None:
    store = make_store(aging_seconds=0.3)
    low, normal = submit(store, "a", P.LOW), submit(store, "b", P.NORMAL)
    assert store.position(low.id) == 1
    time.sleep(0.65)
    high = [submit(store, "z", P.HIGH) for _ in range(2)]
    store.sweep()
    assert store.position(low.id) == 2
    assert [job.id for job in drain(store)] == [high[0].id, normal.id, low.id, high[1].id]


def test_a_late_job_s_age_is_not_its_successor_s(make_store: MakeStore) -> None:
    """A lane's head rose to the top and expired there: the fresh job behind it waits at its own level."""
    store = make_store(aging_seconds=9999)
    late, fresh = submit(store, "a", P.LOW, deadline_seconds=100), submit(store, "a", P.LOW)
    store.redis.execute_command("ZADD", "reel:lane:tiny:2:a", 1, late.id)  # has waited since 1970
    store.redis.execute_command("ZADD", "reel:rising:tiny", 1, "2:a")
    assert store.scripts.run("rise", "tiny") == 1
    normal = submit(store, "b")
    rewind(store.redis, late.id, deadline=True)
    assert [job.id for job in drain(store)] == [normal.id, fresh.id]


def test_a_returned_turn_is_refunded(store: JobStore) -> None:
    for _ in range(4):
        submit(store, "a")
        submit(store, "b")
    for _ in range(3):
        first = store.claim("tiny", "node")
        assert first is not None
        assert first.key_id == "a"
        store.give_back(first.id, first.token)
    assert [job.key_id for job in drain(store, 4)] == ["a", "b", "a", "b"]


def test_a_key_s_lanes_share_its_turns_at_the_level_that_they_rose_to(store: JobStore) -> None:
    for _ in range(2):
        submit(store, "a", P.HIGH)
        old = submit(store, "a")
        store.redis.execute_command("ZADD", "reel:lane:tiny:1:a", 1, old.id)  # has waited since 1970
    store.redis.execute_command("ZADD", "reel:rising:tiny", 1, "1:a")
    for _ in range(4):
        submit(store, "b", P.HIGH)
    order = [job.key_id for job in drain(store)]
    assert [sorted(order[place : place + 2]) for place in range(0, 8, 2)] == [["a", "b"]] * 4


def test_models_have_queues_of_their_own(store: JobStore) -> None:
    job = submit(store, "a", model="other")
    assert store.claim("tiny", "node") is None
    taken = store.claim("other", "node")
    assert taken is not None
    assert taken.id == job.id


def test_many_newer_jobs_keep_no_older_node_busy(store: JobStore) -> None:
    """More of them than one call removes of dead entries: it says "none", not "ask again" for ever."""
    draft = video_request(quality="draft")
    for key in range(11):
        for priority in Priority:
            for _ in range(8):
                store.submit(new_job(key=f"key_{key}", priority=priority, request=draft))
    assert store.scripts.run("claim", "tiny", "old node", 1, "nonce") == ["none"]
    plain, _ = store.submit(new_job(key="key_z", priority=Priority.LOW))
    taken = store.claim("tiny", "old node", schema=1)
    assert taken is not None
    assert taken.id == plain.id


def test_a_newer_job_is_left_to_newer_nodes(store: JobStore) -> None:
    newer, plain = submit(store, "a"), submit(store, "a")
    store.redis.execute_command("HSET", f"reel:job:{newer.id}", "schema", "2")
    taken = store.claim("tiny", "old node", schema=1)
    assert taken is not None
    assert taken.id == plain.id
    assert store.claim("tiny", "old node", schema=1) is None
    taken = store.claim("tiny", "new node", schema=2)
    assert taken is not None
    assert taken.id == newer.id


def test_dead_entries_never_hide_a_live_one(store: JobStore) -> None:
    gone = [submit(store, "a").id for _ in range(600)]
    live = submit(store, "a")
    for job_id in gone:
        store.redis.execute_command("DEL", f"reel:job:{job_id}", f"reel:body:{job_id}")
    assert [job.id for job in drain(store)] == [live.id]
    assert sum(row.waiting for row in store.queue_stats()) == 0


def test_position_counts_down(store: JobStore) -> None:
    ids = [submit(store, "a").id for _ in range(5)]
    assert [store.position(i) for i in ids] == [0, 1, 2, 3, 4]
    drain(store, 2)
    assert [store.position(i) for i in ids] == [None, None, 0, 1, 2]


def test_position_is_where_the_job_starts(store: JobStore) -> None:
    for count, key in ((5, "a"), (5, "b"), (5, "c")):
        for _ in range(count):
            submit(store, key)
    urgent = submit(store, "a", P.HIGH)
    jobs = store.list("*", limit=100)[0]
    places = {job.id: store.position(job.id) for job in jobs}
    assert places[urgent.id] == 0
    for place, job in enumerate(drain(store)):
        guess = places[job.id]
        assert guess is not None
        assert abs(guess - place) <= 1, f"said {guess}, was {place}"


def test_stats(store: JobStore) -> None:
    submit(store, "a", P.LOW)
    submit(store, "b", P.LOW)
    submit(store, "a", P.HIGH)
    running = store.claim("tiny", "node")
    assert running is not None
    rows = {(row.model, row.priority): row for row in store.queue_stats()}
    assert (rows["tiny", P.LOW].waiting, rows["tiny", P.LOW].running) == (2, 0)
    assert (rows["tiny", P.HIGH].waiting, rows["tiny", P.HIGH].running) == (0, 1)
    assert rows["tiny", P.HIGH].oldest_seconds is None
    oldest = rows["tiny", P.LOW].oldest_seconds
    assert oldest is not None
    assert 0 <= oldest < 60
    store.finish(running.id, running.token, result())
    assert sum(row.running for row in store.queue_stats()) == 0


def test_a_sleeping_node_is_woken(store: JobStore) -> None:
    woken: list[tuple[bool, float]] = []

    def sleep() -> None:
        start = time.monotonic()
        woken.append((store.wait_wake("tiny", 3), time.monotonic() - start))

    thread = threading.Thread(target=sleep)
    thread.start()
    time.sleep(0.1)
    submit(store, "a")
    thread.join()
    assert woken[0][0]
    assert woken[0][1] < 2


def test_nobody_is_woken_for_nothing_and_a_sleep_ends_before_the_connection(make_store: MakeStore) -> None:
    began = time.monotonic()
    assert not make_store().wait_wake("tiny", 0.05)
    assert not make_store(redis_timeout=0.1).wait_wake("tiny", 60)
    assert time.monotonic() - began < 2


def test_claims_from_many_threads_give_each_job_once(store: JobStore) -> None:
    ids = {submit(store, f"k{i % 3}").id for i in range(60)}
    taken: list[str] = []

    def work(name: str) -> None:
        while job := store.claim("tiny", name):
            taken.append(job.id)

    threads = [threading.Thread(target=work, args=(f"node-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)
