"""Input images stay while a job may need them, and go afterwards."""

from jobs.store import JobStore
from jobs.uploads import UPLOADS, UploadIndex, owned_upload, upload_key
from tests.support.jobs import new_job, result, video_request


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
        store.finish(job.id, job.token, result())
    assert index.due() == []  # the retention time starts anew
    age(store, key)
    assert index.due() == [key]


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
