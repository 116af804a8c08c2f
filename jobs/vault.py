"""Secrets at rest: what the deployment's own secret key encrypts, and how one secret follows another."""

import base64
import hashlib
import secrets
import time

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr

Sealed = list[tuple[str, float]]  # (Fernet text, valid until in Unix seconds or 0: for ever), newest first
OVERLAP_SECONDS = 86_400.0  # how long the old one of two goes on, unless told otherwise


class Vault:
    """Seals webhook secrets under the deployment's secret key, which nodes don't have."""

    def __init__(self, secret_key: str | SecretStr) -> None:
        """secret_key: at least 16 characters. Raises ValueError for a shorter one."""
        text = secret_key.get_secret_value() if isinstance(secret_key, SecretStr) else secret_key
        if len(text) < 16:
            raise ValueError(
                f"got a secret key of {len(text)} characters, expected at least 16; set REEL_SECRET_KEY"
            )
        self.hash_key = hashlib.sha256(b"reel api keys" + text.encode()).digest()
        self._fernet = Fernet(
            base64.urlsafe_b64encode(hashlib.sha256(b"reel secrets" + text.encode()).digest())
        )

    def seal(self, secret: str) -> Sealed:
        """One secret without an end."""
        return [(self._fernet.encrypt(secret.encode()).decode(), 0.0)]

    def rotate(self, sealed: Sealed, overlap_seconds: float = OVERLAP_SECONDS) -> tuple[str, Sealed]:
        """A new secret, and what to store: the newest old one goes on for `overlap_seconds`.

        Two at most sign a webhook at any time, however often somebody rotates.
        """
        secret, now = new_webhook_secret(), time.time()
        until = now + overlap_seconds
        kept = [(text, min(end or until, until)) for text, end in sealed[:1] if not end or end > now]
        return secret, [*self.seal(secret), *kept]

    def open(self, sealed: Sealed, whose: str) -> list[str]:
        """The secrets that hold now, newest first.

        Raises ValueError when they were encrypted under another secret key.
        """
        now = time.time()
        try:
            return [
                self._fernet.decrypt(text.encode()).decode()
                for text, until in sealed
                if not until or until > now
            ]
        except InvalidToken as error:
            raise ValueError(
                f"{whose}: its webhook secret is from another REEL_SECRET_KEY; rotate the secret"
            ) from error


def new_webhook_secret() -> str:
    """Standard Webhooks' form: ``whsec_`` and base64 of 24 to 64 random bytes."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
