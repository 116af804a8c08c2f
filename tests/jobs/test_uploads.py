"""Input images stay while a job may need them, and go afterwards."""

from jobs.job import JobError
from jobs.store import JobStore
from jobs.uploads import UPLOADS, UploadIndex, owned_upload, upload_key
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job, result, video_request

USERS = f"{UPLOADS}:users"


def age(store: JobStore, key: str) -> None:
    store.redis.execute_command("ZADD", UPLOADS, "XX", 1, key)


def test_an_unused_image_goes_after_its_time(store: JobStore) -> None:
    index = UploadIndex(store.redis, store.settings)
    key = upload_key("key_a", ".png")
    index.add(key)
    assert index.known(key)
    assert index.due() == []
    age(store, key)
    assert index.due() == [key]
    index.done(key)
    assert not index.known(key)


def test_an_image_that_a_live_job_uses_stays(store: JobStore) -> None:
    index = UploadIndex(store.redis, store.settings)
    key = upload_key("key_a", ".png")
    index.add(key)
    for _ in range(2):
        store.submit(new_job(request=video_request(image=key)))
    age(store, key)
    assert index.due() == []
    for _ in range(2):
        job = store.claim("tiny", "node")
        assert job is not None
        assert job.request.image == key
        age(store, key)
        assert index.due() == []
        age(store, key)
        store.finish(job.id, job.token, result())
    assert index.due() == []  # the retention time starts anew
    assert store.redis.execute_command("HLEN", USERS) == 0
    age(store, key)
    assert index.due() == [key]


def test_an_image_in_use_is_looked_at_once_an_hour(store: JobStore) -> None:
    """Else a hundred of them would be all that the sweeper ever sees."""
    index = UploadIndex(store.redis, store.settings)
    store.submit(new_job(request=video_request(image="a, used")))
    for key in ("a, used", "b, unused"):
        index.add(key)
        age(store, key)
    assert index.due(1) == []
    assert index.due(1) == ["b, unused"]


def test_a_replayed_job_keeps_its_image(make_store: MakeStore) -> None:
    store = make_store(max_attempts=1)
    index = UploadIndex(store.redis, store.settings)
    index.add("used")
    store.submit(new_job(request=video_request(image="used")))
    job = store.claim("tiny", "node")
    assert job is not None
    store.fail(job.id, job.token, JobError(type="x", title="x", detail="x"))
    store.replay(job.id)
    age(store, "used")
    assert index.due() == []
    store.cancel(job.id)
    assert store.redis.execute_command("HLEN", USERS) == 0


def test_an_image_that_is_gone_does_not_come_back(store: JobStore) -> None:
    """Neither by the end of a job that used it nor by being put off."""
    index = UploadIndex(store.redis, store.settings)
    index.add("used")
    job, _ = store.submit(new_job(request=video_request(image="used")))
    index.done("used")
    store.cancel(job.id)
    index.later("used")
    assert not index.known("used")


def test_whose_image(store: JobStore) -> None:
    key = upload_key("key_a", ".png")
    assert owned_upload(key, "key_a")
    for wrong in (
        key.replace("key_a", "key_b"),
        "jobs/job_1/1/video.mp4",
        f"uploads/key_a/../{key}",
        "uploads/key_a/",
        f"/{key}",
        "",
    ):
        assert not owned_upload(wrong, "key_a")
