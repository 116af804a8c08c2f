"""API keys: shown once, stored as HMAC-SHA256; their webhook secrets encrypted with Fernet."""

import hashlib
import hmac
import secrets
import time
from enum import StrEnum

from pydantic import BaseModel, Field, SecretStr

from jobs.client import RedisClient, guard, redis_now, require_text
from jobs.job import new_id
from jobs.scripts import PREFIX, source
from jobs.vault import OVERLAP_SECONDS, Sealed, Vault, new_webhook_secret

RECORDS = f"{PREFIX}apikeys"  # hash: key id to record
HASHES = f"{PREFIX}apikeys:hashes"  # hash: HMAC of the plain key to "<key id> <valid until, 0: for ever>"


class Scope(StrEnum):
    """What a key may do."""

    SUBMIT = "submit"  # make, cancel and delete its own jobs
    READ = "read"  # see its own jobs
    ADMIN = "admin"  # everybody's jobs, nodes, keys
    PRIORITY_HIGH = "priority_high"  # may submit with priority high


class ApiKey(BaseModel):
    """A key as everybody but its holder sees it. Times are Unix seconds."""

    id: str
    name: str
    scopes: frozenset[Scope]
    created_at: float
    revoked_at: float | None = None
    max_outstanding: int | None = None  # None: the settings' max_outstanding_per_key
    requests_per_minute: int | None = Field(None, ge=1)  # None: no limit of its own


class _Record(ApiKey):
    """As stored: with the hash (to remove it) and the encrypted webhook secrets."""

    hash: str
    secrets: Sealed


class KeyStore:
    """Creates, checks, rotates and revokes API keys."""

    def __init__(self, redis: RedisClient, secret_key: str | SecretStr) -> None:
        """secret_key: the deployment's own secret, at least 16 characters; changing it ends every key."""
        require_text(redis)
        self.redis = redis
        self._vault = Vault(secret_key)

    def create(
        self,
        name: str,
        scopes: frozenset[Scope] | set[Scope] | tuple[Scope, ...] = (Scope.SUBMIT, Scope.READ),
        *,
        max_outstanding: int | None = None,
        requests_per_minute: int | None = None,
        plain: str | None = None,
        webhook_secret: str | None = None,
    ) -> tuple[ApiKey, str, str]:
        """A new key: (key, plain key ``rk_…``, webhook secret ``whsec_…``). Neither is ever readable again.

        plain, webhook_secret: given by the caller, for a stack whose first key comes from its settings.
        """
        plain = plain or _new_plain()
        secret = webhook_secret or new_webhook_secret()
        record = _Record(
            id=new_id("key"),
            name=name,
            scopes=frozenset(scopes),
            created_at=time.time(),
            max_outstanding=max_outstanding,
            requests_per_minute=requests_per_minute,
            hash=self._hash(plain),
            secrets=self._vault.seal(secret),
        )
        self._save(record, {record.hash: 0.0})
        return _public(record), plain, secret

    def authenticate(self, plain: str) -> ApiKey | None:
        """The key, or None when it is unknown, revoked or rotated out. One round trip."""
        with guard():
            text = self.redis.execute_command("EVAL", _AUTHENTICATE, 0, "{}", self._hash(plain))
        return _public(_Record.model_validate_json(text)) if text else None

    def get(self, key_id: str) -> ApiKey | None:
        """One key by id, also when revoked."""
        record = self._load(key_id)
        return _public(record) if record else None

    def list(self) -> "Keys":
        """All keys, newest first, revoked ones included."""
        with guard():
            texts = self.redis.execute_command("HVALS", RECORDS)
        return sorted(
            (_public(_Record.model_validate_json(text)) for text in texts), key=lambda k: k.id, reverse=True
        )

    def revoke(self, key_id: str) -> ApiKey:
        """End a key at once; its jobs go on. Raises KeyError when there is no such key."""
        record = self._must(key_id)
        with guard():
            for digest, entry in self.redis.execute_command("HGETALL", HASHES).items():
                if entry.split()[0] == key_id:
                    self.redis.execute_command("HDEL", HASHES, digest)
        record = record.model_copy(update={"revoked_at": time.time()})
        self._save(record, {})
        return _public(record)

    def rotate(self, key_id: str, overlap_seconds: float = OVERLAP_SECONDS) -> str:
        """A new plain key for the same key id; the old one works for `overlap_seconds` more.

        Raises KeyError when there is no such key, ValueError when it was revoked: that is for ever.
        """
        record = self._must(key_id)
        if record.revoked_at is not None:
            raise ValueError(f"key {key_id} was revoked; make a new one with `reel keys create`")
        plain = _new_plain()
        with guard():
            now = redis_now(self.redis)
        fresh = record.model_copy(update={"hash": self._hash(plain)})
        self._save(fresh, {fresh.hash: 0.0, record.hash: now + overlap_seconds})
        return plain

    def rotate_webhook_secret(self, key_id: str, overlap_seconds: float = OVERLAP_SECONDS) -> str:
        """A new webhook secret; deliveries are signed with both for `overlap_seconds`."""
        record = self._must(key_id)
        secret, sealed = self._vault.rotate(record.secrets, overlap_seconds)
        self._save(record.model_copy(update={"secrets": sealed}), {})
        return secret

    def webhook_secrets(self, key_id: str) -> "Secrets":
        """The secrets to sign with, newest first; empty when the key is unknown. For the webhook sender only.

        Raises ValueError when they were encrypted under another secret key.
        """
        record = self._load(key_id)
        return [] if record is None else self._vault.open(record.secrets, f"key {key_id}")

    def _hash(self, plain: str) -> str:
        text = plain.encode("utf-8", "surrogatepass")
        return hmac.new(self._vault.hash_key, text, hashlib.sha256).hexdigest()

    def _load(self, key_id: str) -> _Record | None:
        with guard():
            text = self.redis.execute_command("HGET", RECORDS, key_id)
        return _Record.model_validate_json(text) if text else None

    def _must(self, key_id: str) -> _Record:
        record = self._load(key_id)
        if record is None:
            raise KeyError(f"no API key {key_id}")
        return record

    def _save(self, record: _Record, hashes: dict[str, float]) -> None:
        with guard():
            pipe = self.redis.pipeline(transaction=True)
            pipe.execute_command("HSET", RECORDS, record.id, record.model_dump_json())
            for digest, until in hashes.items():
                pipe.execute_command("HSET", HASHES, digest, f"{record.id} {until:.6f}")
            pipe.execute()


Keys = list[ApiKey]
Secrets = list[str]
_AUTHENTICATE = source("authenticate")


def _new_plain() -> str:
    return "rk_" + secrets.token_urlsafe(32)


def _public(record: _Record) -> ApiKey:
    return ApiKey.model_validate(record.model_dump(exclude={"hash", "secrets"}))
