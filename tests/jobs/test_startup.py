"""Parts of a deployment start side by side: each waits a while for the others."""

import threading
import time
from collections.abc import Iterator

import pytest

from jobs.errors import StorageUnavailable
from jobs.settings import Settings
from jobs.startup import Missing, made_bucket_missing, redis_missing, storage_missing, wait_for
from jobs.storage import ObjectStore
from tests.support.redis import redis_server
from tests.support.s3 import S3Server, s3_server

NOWHERE = Settings(redis_url="redis://:secret@127.0.0.1:9/0", start_seconds=0)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def storage(s3: S3Server, bucket: str, **fields: float) -> Settings:
    return Settings(
        s3_endpoint=s3.endpoint, s3_access_key=s3.access_key, s3_secret_key=s3.secret_key, s3_bucket=bucket,
        **fields,
    )  # type: ignore[arg-type]  # fmt: skip


def test_a_role_waits_for_redis_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    with redis_server() as server:
        server.stop()
        settings = Settings(redis_url=server.url, start_seconds=20)
        late = threading.Timer(1.2, server.start)
        late.start()
        began = time.monotonic()
        wait_for(settings, "api", redis_missing)
        late.join()
        assert 1.0 < time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said.startswith("reel api: waiting up to 20 s: Redis at ")
    assert said.count("\n") == 1


def test_what_stays_away_is_named_after_that_time(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with pytest.raises(
        Missing, match=r"Redis at 127\.0\.0\.1:9/0 cannot be reached .*REEL_REDIS_URL"
    ) as seen:
        wait_for(NOWHERE.model_copy(update={"start_seconds": 1.0}), "node", redis_missing)
    assert "secret" not in str(seen.value) + capsys.readouterr().err
    assert 1.0 < time.monotonic() - began < 10
    with pytest.raises(Missing):
        wait_for(NOWHERE, "node", redis_missing)
    assert not capsys.readouterr().err  # nothing was waited for


def test_the_api_waits_for_the_bucket_that_celery_makes(s3: S3Server) -> None:
    settings = storage(s3, "of-the-start", start_seconds=20.0)
    assert storage_missing(settings) == "S3 has no bucket 'of-the-start'; make it, or check REEL_S3_BUCKET"
    late = threading.Timer(1.0, lambda: wait_for(settings, "celery", made_bucket_missing))
    late.start()
    wait_for(settings, "api", storage_missing)
    late.join()
    assert ObjectStore(settings).ready()


def test_a_bucket_whose_rules_are_not_ours_is_no_obstacle(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = storage(s3, "without-rules")
    ObjectStore(settings).ensure_bucket()

    def refused(store: ObjectStore, origins: tuple[str, ...] = ()) -> None:
        raise StorageUnavailable("could not open the bucket: it answered AccessDenied")

    monkeypatch.setattr(ObjectStore, "ensure_bucket", refused)
    assert made_bucket_missing(settings) is None
    assert "AccessDenied" in caplog.text
    absent = made_bucket_missing(storage(s3, "nobody-made-it"))
    assert absent is not None
    assert "AccessDenied" in absent


def test_a_wrong_endpoint_is_named_with_its_setting() -> None:
    away = Settings(s3_endpoint="http://127.0.0.1:9", s3_access_key="a", s3_secret_key="b")  # type: ignore[arg-type]
    for look in (storage_missing, made_bucket_missing):
        assert "REEL_S3_ENDPOINT" in (look(away) or "")
