"""Which input images are stored, and until when: the sweeper removes what nobody needs any more."""

from jobs.client import RedisClient, guard, redis_now
from jobs.ids import new_id
from jobs.scripts import PREFIX, Scripts
from jobs.settings import Settings

UPLOADS = f"{PREFIX}uploads"
LATER_SECONDS = 600  # until an image that could not be removed is tried again


def upload_key(key_id: str, suffix: str) -> str:
    """A fresh storage key for an API key's image, such as ``uploads/key_…/img_….png``."""
    return f"uploads/{key_id}/{new_id('img')}{suffix}"


def owned_upload(key: str, key_id: str) -> bool:
    """Whether a client's `image` names an upload of its own API key (and nothing else in the bucket)."""
    parts = key.split("/")
    return len(parts) == 3 and parts[:2] == ["uploads", key_id] and parts[2].startswith("img_")


class UploadIndex:
    """An image stays for `retention_seconds` after its upload or the end of the last job that uses it."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._scripts = Scripts(redis, settings)
        self._redis = redis
        self._seconds = settings.retention_seconds

    def add(self, key: str) -> None:
        """Remember an image; do so before uploading it, so that none can be forgotten."""
        with guard():
            now = int(redis_now(self._redis))
            self._redis.execute_command("ZADD", UPLOADS, now + self._seconds, key)

    def known(self, key: str) -> bool:
        """Whether the image was uploaded and is still kept."""
        with guard():
            return self._redis.execute_command("ZSCORE", UPLOADS, key) is not None

    def due(self, limit: int = 100) -> list[str]:
        """Keys of images to delete from storage now; then call `done` for each."""
        return list(self._scripts.run("uploads_due", limit))

    def later(self, key: str) -> None:
        """An image that storage doesn't give up now is due again after LATER_SECONDS."""
        with guard():
            now = int(redis_now(self._redis))
            self._redis.execute_command("ZADD", UPLOADS, "XX", now + LATER_SECONDS, key)

    def done(self, key: str) -> None:
        """Forget an image that storage no longer has."""
        with guard():
            self._redis.execute_command("ZREM", UPLOADS, key)
