"""Webhook endpoints: addresses that hear of all of a key's jobs, each with a secret of its own.

What the transition scripts need (address, events) is apart from the secrets, which only the webhook sender
and the API can read: nodes reach neither the hash of the secrets nor the key that encrypts them.
"""

import json
import time
from typing import Any

from pydantic import BaseModel, SecretStr

from jobs.client import RedisClient, guard, require_text
from jobs.ids import new_id
from jobs.job import DEFAULT_WEBHOOK_EVENTS, WebhookEvent
from jobs.scripts import PREFIX, Scripts
from jobs.settings import Settings
from jobs.stored import with_fields
from jobs.vault import OVERLAP_SECONDS, Sealed, Vault, new_webhook_secret

SECRETS = f"{PREFIX}apikeys:endpoints"  # hash: endpoint id to its sealed secrets
LIMIT = 10  # endpoints a key


class Endpoint(BaseModel):
    """One address, without its secret."""

    id: str
    key_id: str
    url: str
    events: tuple[WebhookEvent, ...] = DEFAULT_WEBHOOK_EVENTS
    description: str = ""
    enabled: bool = True  # False: it hears nothing, and keeps its secret
    created_at: float  # Unix seconds


class EndpointStore:
    """Every call names the key: one key never sees another's endpoints."""

    def __init__(self, redis: RedisClient, settings: Settings, secret_key: str | SecretStr) -> None:
        require_text(redis)
        self.redis = redis
        self._vault = Vault(secret_key)
        self._scripts = Scripts(redis, settings)

    def add(
        self, key_id: str, url: str, events: tuple[WebhookEvent, ...], description: str = ""
    ) -> tuple[Endpoint, str] | None:
        """A new endpoint and its secret, never readable again; None when the key has LIMIT of them."""
        endpoint = Endpoint(
            id=new_id("we"), key_id=key_id, url=url, events=events, description=description,
            created_at=time.time(),
        )  # fmt: skip
        secret = new_webhook_secret()
        with guard():  # first, so that no delivery ever lacks it
            sealed = json.dumps(self._vault.seal(secret))
            self.redis.execute_command("HSET", SECRETS, endpoint.id, sealed)
        text = endpoint.model_dump_json()
        if not self._scripts.run("endpoint_add", key_id, endpoint.id, text, LIMIT, durable=True):
            with guard():
                self.redis.execute_command("HDEL", SECRETS, endpoint.id)
            return None
        return endpoint, secret

    def change(self, key_id: str, endpoint_id: str, **fields: Any) -> Endpoint | None:
        """Change these of an endpoint's fields, whatever else changes at once; None when it is gone."""
        while (old := self.text(key_id, endpoint_id)) is not None:
            changed, new = with_fields(Endpoint.model_validate_json(old), old, fields)
            said = self._scripts.run("endpoint_change", key_id, endpoint_id, old, new, durable=True)
            if said != "differs":
                return changed if said == "done" else None
        return None

    def get(self, key_id: str, endpoint_id: str) -> Endpoint | None:
        """One endpoint of this key, or None."""
        text = self.text(key_id, endpoint_id)
        return Endpoint.model_validate_json(text) if text else None

    def text(self, key_id: str, endpoint_id: str) -> str | None:
        """An endpoint's record as it is stored, or None."""
        with guard():
            text: str | None = self.redis.execute_command("HGET", _all(key_id), endpoint_id)
        return text

    def list(self, key_id: str) -> "Endpoints":
        """A key's endpoints, oldest first."""
        with guard():
            texts = self.redis.execute_command("HVALS", _all(key_id))
        return sorted((Endpoint.model_validate_json(text) for text in texts), key=lambda one: one.id)

    def remove(self, key_id: str, endpoint_id: str) -> bool:
        """Forget an endpoint and its secret; what still waits for it is dropped. False: none such."""
        with guard():
            known = bool(self.redis.execute_command("HDEL", _all(key_id), endpoint_id))
            if known:
                self.redis.execute_command("HDEL", SECRETS, endpoint_id)
        return known

    def rotate(self, endpoint: Endpoint, overlap_seconds: float = OVERLAP_SECONDS) -> str | None:
        """A new secret; deliveries are signed with both for `overlap_seconds`. None: the endpoint is gone."""
        said = "differs"
        while said == "differs":
            old = self._sealed_text(endpoint.id)
            secret, sealed = self._vault.rotate(_sealed(old), overlap_seconds)
            new = json.dumps(sealed)
            said = self._scripts.run("endpoint_rotate", endpoint.key_id, endpoint.id, old, new, durable=True)
        return secret if said == "done" else None

    def secrets(self, endpoint_id: str) -> "Secrets":
        """The secrets to sign with, newest first; empty when the endpoint is gone. For the sender only.

        Raises ValueError when they were encrypted under another secret key.
        """
        return self._vault.open(_sealed(self._sealed_text(endpoint_id)), f"endpoint {endpoint_id}")

    def _sealed_text(self, endpoint_id: str) -> str:
        """An endpoint's secrets as they are stored; empty when there are none."""
        with guard():
            return self.redis.execute_command("HGET", SECRETS, endpoint_id) or ""


Endpoints = list[Endpoint]
Secrets = list[str]


def _sealed(text: str) -> Sealed:
    return [(str(sealed), float(until)) for sealed, until in json.loads(text)] if text else []


def _all(key_id: str) -> str:
    return f"{PREFIX}endpoints:{key_id}"
