"""API keys: shown once, stored as HMAC-SHA256; their webhook secrets encrypted with Fernet."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field, SecretStr

from jobs.client import RedisClient, guard, require_text
from jobs.ids import new_id
from jobs.scripts import PREFIX, source
from jobs.stored import with_fields
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
        with guard():
            pipe = self.redis.pipeline(transaction=True)
            pipe.execute_command("HSET", RECORDS, record.id, record.model_dump_json())
            pipe.execute_command("HSET", HASHES, record.hash, f"{record.id} 0")
            pipe.execute()
        return _public(record), plain, secret

    def authenticate(self, plain: str) -> ApiKey | None:
        """The key, or None when it is unknown, revoked or rotated out. One round trip."""
        with guard():
            text = self.redis.execute_command("EVAL", _AUTHENTICATE, 0, "{}", self._hash(plain))
        key = _public(_Record.model_validate_json(text)) if text else None
        return None if key is None or key.revoked_at else key

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
        return _public(self._change(key_id, lambda record: {"revoked_at": record.revoked_at or time.time()}))

    def rotate(self, key_id: str, overlap_seconds: float = OVERLAP_SECONDS) -> str:
        """A new plain key for the same key id; those before work for `overlap_seconds` more at the most.

        Raises KeyError when there is no such key, ValueError when it is revoked.
        """
        plain = _new_plain()

        def fresh(record: _Record) -> dict[str, Any]:
            if record.revoked_at:
                raise ValueError(f"API key {key_id} is revoked and stays so; create a new one")
            return {"hash": self._hash(plain)}

        self._change(key_id, fresh, overlap_seconds)
        return plain

    def rotate_webhook_secret(self, key_id: str, overlap_seconds: float = OVERLAP_SECONDS) -> str:
        """A new webhook secret; deliveries are signed with both for `overlap_seconds`.

        Also of a revoked key, whose jobs go on. Raises KeyError when there is no such key.
        """
        secret = ""

        def resealed(record: _Record) -> dict[str, Any]:
            nonlocal secret
            secret, sealed = self._vault.rotate(record.secrets, overlap_seconds)
            return {"secrets": sealed}

        self._change(key_id, resealed)
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

    def _text(self, key_id: str) -> str | None:
        with guard():
            text: str | None = self.redis.execute_command("HGET", RECORDS, key_id)
        return text

    def _load(self, key_id: str) -> _Record | None:
        text = self._text(key_id)
        return _Record.model_validate_json(text) if text else None

    def _change(
        self, key_id: str, change: Callable[[_Record], dict[str, Any]], overlap_seconds: float | None = None
    ) -> _Record:
        """Change fields of a record, whatever else changes at once; `change` may be asked more than once.

        overlap_seconds: how long the plain keys before go on at the most; None leaves them as they are.
        Raises KeyError when there is no such key.
        """
        overlap = "" if overlap_seconds is None else overlap_seconds
        while (old := self._text(key_id)) is not None:
            record = _Record.model_validate_json(old)
            changed, new = with_fields(record, old, change(record))
            with guard():
                said = self.redis.execute_command("EVAL", _CHANGE, 0, "{}", key_id, old, new, overlap)
            if said == "done":
                return changed
        raise KeyError(f"no API key {key_id}")


Keys = list[ApiKey]
Secrets = list[str]
_AUTHENTICATE, _CHANGE = source("authenticate"), source("key_change")


def _new_plain() -> str:
    return "rk_" + secrets.token_urlsafe(32)


def _public(record: _Record) -> ApiKey:
    return ApiKey.model_validate(record.model_dump(exclude={"hash", "secrets"}))
