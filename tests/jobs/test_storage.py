"""The object store against a real S3 server."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.stub import Stubber

from jobs.errors import StorageRefused, StorageUnavailable
from jobs.settings import Settings
from jobs.storage import PART_BYTES, ObjectStore, artifact_key
from tests.support.s3 import S3Server, s3_server
from tests.worker.receiver import RawReceiver, Reply


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


def settings(server: S3Server, **changes: object) -> Settings:
    return Settings(
        **{
            "s3_endpoint": server.endpoint,
            "s3_access_key": server.access_key,
            "s3_secret_key": server.secret_key,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def objects(server: S3Server) -> ObjectStore:
    store = ObjectStore(settings(server))
    assert not store.ready()
    store.ensure_bucket(("https://app.example.com",))
    store.ensure_bucket(("https://app.example.com",))  # again, as every start does
    assert store.ready()
    return store


def fetch(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def test_a_file_goes_up_and_down(objects: ObjectStore, tmp_path: Path) -> None:
    key = artifact_key("job_1", 2, "video.mp4")
    assert key == "jobs/job_1/2/video.mp4"
    source = tmp_path / "video.mp4"
    source.write_bytes(b"mp4" * 1000)
    assert objects.put_file(key, source, "video/mp4") == 3000
    head = objects.head(key)
    assert head is not None
    assert (head.bytes, head.content_type) == (3000, "video/mp4")
    objects.get_file(key, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert objects.get_bytes(key) == source.read_bytes()


def test_a_large_file_goes_in_parts(objects: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(PART_BYTES + 4321))
    objects.put_file("jobs/job_large/1/video.mp4", source, "video/mp4")
    assert objects.get_bytes("jobs/job_large/1/video.mp4") == source.read_bytes()


def test_what_is_missing(objects: ObjectStore, tmp_path: Path) -> None:
    assert objects.head("jobs/none") is None
    with pytest.raises(FileNotFoundError, match="jobs/none"):
        objects.get_bytes("jobs/none")
    with pytest.raises(FileNotFoundError):
        objects.get_file("jobs/none", tmp_path / "x")
    objects.delete("jobs/none")


def test_presigned_urls_read_ranges_and_end(objects: ObjectStore) -> None:
    objects.put_bytes("jobs/job_2/1/video.mp4", b"0123456789", "video/mp4")
    url = objects.presign_get("jobs/job_2/1/video.mp4", 60, "my “video”.mp4")
    status, body, headers = fetch(url)
    assert (status, body) == (200, b"0123456789")
    assert headers["Content-Type"] == "video/mp4"
    assert "attachment" in headers["Content-Disposition"]
    status, body, _ = fetch(url, Range="bytes=2-4")
    assert (status, body) == (206, b"234")
    assert fetch(url.replace("X-Amz-Signature=", "X-Amz-Signature=0"))[0] == 403
    assert fetch(f"{objects.settings.s3_endpoint}/reelserve/jobs/job_2/1/video.mp4")[0] == 403


def test_urls_are_signed_for_the_public_endpoint(server: S3Server) -> None:
    store = ObjectStore(settings(server, s3_public_endpoint="https://media.example.com"))
    url = store.presign_get("jobs/a/1/v.mp4")
    assert url.startswith("https://media.example.com/reelserve/jobs/a/1/v.mp4?")
    assert "X-Amz-Expires=900" in url


def test_the_page_may_play_videos(objects: ObjectStore) -> None:
    objects.put_bytes("jobs/job_3/1/video.mp4", b"x", "video/mp4")
    url = objects.presign_get("jobs/job_3/1/video.mp4", 60)
    _, _, headers = fetch(url, Origin="https://app.example.com")
    assert headers.get("Access-Control-Allow-Origin") in ("*", "https://app.example.com")


def test_a_job_s_files_go_together(objects: ObjectStore) -> None:
    for name in ("jobs/job_4/1/a", "jobs/job_4/2/b", "jobs/job_44/1/c"):
        objects.put_bytes(name, b"x", "text/plain")
    assert objects.list_keys("jobs/job_4/") == ["jobs/job_4/1/a", "jobs/job_4/2/b"]
    assert objects.delete_prefix("jobs/job_4/") == 2
    assert objects.delete_prefix("jobs/job_4/") == 0
    assert objects.list_keys("jobs/job_44/") == ["jobs/job_44/1/c"]


@pytest.mark.parametrize("prefix", ["", "/", "jobs", "jobs/"])
def test_a_prefix_that_would_take_everything_is_refused(objects: ObjectStore, prefix: str) -> None:
    with pytest.raises(ValueError, match="expected something like"):
        objects.delete_prefix(prefix)


def test_an_unfinished_upload_goes_with_its_job(objects: ObjectStore) -> None:
    client = objects._client
    client.create_multipart_upload(Bucket="reelserve", Key="jobs/job_5/1/video.mp4")
    objects.delete_prefix("jobs/job_5/")
    assert not client.list_multipart_uploads(Bucket="reelserve", Prefix="jobs/job_5/").get("Uploads")


def test_wrong_credentials_say_so(server: S3Server) -> None:
    store = ObjectStore(settings(server, s3_secret_key="wrong"))
    with pytest.raises(StorageUnavailable, match=r"bucket reelserve at http://127.*check REEL_S3_ENDPOINT"):
        store.put_bytes("jobs/a/1/x", b"x", "text/plain")


def test_an_unreachable_server_is_one_clear_error(tmp_path: Path) -> None:
    nobody = S3Server("http://127.0.0.1:1")
    store = ObjectStore(settings(nobody))
    (tmp_path / "f").write_bytes(b"x")
    for call in (
        store.ensure_bucket,
        store.ready,
        lambda: store.put_file("jobs/a/1/x", tmp_path / "f", "text/plain"),
        lambda: store.head("jobs/a/1/x"),
    ):
        with pytest.raises(StorageUnavailable, match=r"could not .* at http://127.0.0.1:1"):
            call()


@pytest.mark.parametrize(("region", "where"), [("us-east-1", None), ("eu-central-1", "eu-central-1")])
def test_a_bucket_is_made_in_its_region(region: str, where: str | None) -> None:
    """AWS wants it named, but for the first of its regions, where it refuses that."""
    store = ObjectStore(Settings(s3_region=region, s3_access_key="a", s3_secret_key="b"))
    wanted: dict[str, object] = {"Bucket": store.bucket}
    if where:
        wanted["CreateBucketConfiguration"] = {"LocationConstraint": where}
    with Stubber(store._client) as aws:
        aws.add_client_error("list_objects_v2", "NoSuchBucket", http_status_code=404)
        aws.add_response("create_bucket", {}, wanted)
        aws.add_response("put_bucket_cors", {})
        store.ensure_bucket()
        aws.assert_no_pending_responses()


@pytest.mark.parametrize(
    ("code", "status", "refused"),
    [("AccessDenied", 403, True), ("Forbidden", 403, True), ("NotImplemented", 501, True),
     ("SlowDown", 503, False), ("InternalError", 500, False)],
)  # fmt: skip
def test_what_is_refused_is_told_from_what_may_pass(code: str, status: int, refused: bool) -> None:
    store = ObjectStore(Settings(s3_access_key="a", s3_secret_key="b"))
    with Stubber(store._client) as aws:
        aws.add_client_error("put_object", code, http_status_code=status)
        with pytest.raises(StorageUnavailable, match=code) as caught:
            store.put_bytes("jobs/a/1/x", b"x", "text/plain")
    assert isinstance(caught.value, StorageRefused) == refused


def test_who_looks_again_itself_asks_once() -> None:
    with RawReceiver(Reply(status=503)) as server:
        nowhere = S3Server(f"http://127.0.0.1:{server.port}")
        with pytest.raises(StorageUnavailable):
            ObjectStore(settings(nowhere), quick=True).ready()
        assert len(server.received) == 1
