"""API keys: shown once, never stored readable, revocable, replaceable without a gap."""

import base64
import json
import time

import pytest
from pydantic import SecretStr

from jobs.client import RedisClient
from jobs.keys import HASHES, RECORDS, KeyStore, Scope
from jobs.vault import Sealed

SECRET = "a deployment's own secret"


@pytest.fixture
def keys(redis: RedisClient) -> KeyStore:
    return KeyStore(redis, SecretStr(SECRET))


def test_a_new_key_works_and_shows_its_rights(keys: KeyStore) -> None:
    key, plain, _ = keys.create("shop", {Scope.SUBMIT, Scope.PRIORITY_HIGH}, max_outstanding=5)
    assert plain.startswith("rk_")
    assert keys.authenticate(plain) == key
    assert key.scopes == {Scope.SUBMIT, Scope.PRIORITY_HIGH}
    assert (key.name, key.max_outstanding, key.requests_per_minute) == ("shop", 5, None)
    assert keys.get(key.id) == key


@pytest.mark.parametrize("wrong", ["", "rk_", "rk_" + "x" * 43, "\ud800", "ключ", "x" * 100_000])
def test_a_wrong_key_is_nobody(keys: KeyStore, wrong: str) -> None:
    keys.create("shop")
    assert keys.authenticate(wrong) is None


def test_nothing_readable_is_stored(keys: KeyStore, redis: RedisClient) -> None:
    _, plain, secret = keys.create("shop")
    for name in redis.execute_command("KEYS", "*"):
        stored = str(redis.execute_command("HGETALL", name))
        assert plain not in stored
        assert secret not in stored
        assert secret.removeprefix("whsec_") not in stored


def test_another_deployment_s_secret_key_opens_nothing(keys: KeyStore, redis: RedisClient) -> None:
    key, plain, _ = keys.create("shop")
    other = KeyStore(redis, "another secret of enough length")
    assert other.authenticate(plain) is None
    with pytest.raises(ValueError, match=f"{key.id}.*another REEL_SECRET_KEY"):
        other.webhook_secrets(key.id)
    with pytest.raises(ValueError, match="at least 16"):
        KeyStore(redis, "short")


def test_revoking_is_at_once_and_stays_listed(keys: KeyStore) -> None:
    key, plain, _ = keys.create("shop")
    other, other_plain, _ = keys.create("other")
    assert keys.revoke(key.id).revoked_at is not None
    assert keys.authenticate(plain) is None
    assert keys.authenticate(other_plain) == other
    assert {k.id: k.revoked_at is None for k in keys.list()} == {key.id: False, other.id: True}
    with pytest.raises(KeyError):
        keys.revoke("key_nobody")


def test_a_revoked_key_never_opens_again(keys: KeyStore) -> None:
    """A rotation would bring back the value that leaked, too."""
    key, leaked, _ = keys.create("shop")
    revoked = keys.revoke(key.id)
    with pytest.raises(ValueError, match=f"{key.id} is revoked"):
        keys.rotate(key.id)
    assert keys.authenticate(leaked) is None
    assert keys.get(key.id) == keys.revoke(key.id) == revoked


@pytest.mark.parametrize("meanwhile", ["revoke", "rotate"])
def test_no_change_undoes_another_s(
    keys: KeyStore, redis: RedisClient, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """Somebody revokes or rotates the key between a rotation's read and its write."""
    key, plain, first = keys.create("shop")
    other, values = KeyStore(redis, SECRET), list[str]()

    def late(sealed: Sealed, overlap_seconds: float) -> tuple[str, Sealed]:
        if not values:
            values.append(str(getattr(other, meanwhile)(key.id)))
        return rotate(sealed, overlap_seconds)

    rotate = keys._vault.rotate
    monkeypatch.setattr(keys._vault, "rotate", late)
    second = keys.rotate_webhook_secret(key.id)
    assert keys.webhook_secrets(key.id) == [second, first]
    assert (keys.authenticate(plain) is None) == (meanwhile == "revoke")
    found = keys.get(key.id)
    assert found is not None
    assert (found.revoked_at is None) == (meanwhile == "rotate")
    if meanwhile == "rotate":
        assert keys.authenticate(values[0]) == key
        keys.rotate(key.id, overlap_seconds=0)
        assert keys.authenticate(values[0]) is None


def test_a_change_whose_reply_was_lost_may_be_made_again(
    keys: KeyStore, redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, old, _ = keys.create("shop")
    once = redis.execute_command

    def twice(*command: str) -> object:
        reply = once(*command)
        return once(*command) if command[0] == "EVAL" else reply

    monkeypatch.setattr(redis, "execute_command", twice)
    new = keys.rotate(key.id)
    assert keys.authenticate(old) == keys.authenticate(new) == key


def test_what_another_release_stored_of_a_key_stays(keys: KeyStore, redis: RedisClient) -> None:
    key, _, _ = keys.create("shop")
    stored = json.loads(redis.execute_command("HGET", RECORDS, key.id))
    redis.execute_command("HSET", RECORDS, key.id, json.dumps({**stored, "team": "films"}))
    keys.rotate(key.id)
    assert json.loads(redis.execute_command("HGET", RECORDS, key.id))["team"] == "films"


def test_rotation_overlaps(keys: KeyStore, redis: RedisClient) -> None:
    """A shorter overlap holds for every value before, and what no longer opens anything is forgotten."""
    key, old, _ = keys.create("shop")
    other, others, _ = keys.create("other")
    new = keys.rotate(key.id, overlap_seconds=2)
    for plain in (old, new):
        found = keys.authenticate(plain)
        assert found is not None
        assert found.id == key.id
    newest = keys.rotate(key.id, overlap_seconds=0)
    assert [keys.authenticate(plain) for plain in (old, new)] == [None] * 2
    assert keys.authenticate(newest) == key
    assert keys.authenticate(others) == other
    assert redis.execute_command("HLEN", HASHES) == 2
    keys.revoke(key.id)
    assert [keys.authenticate(plain) for plain in (old, new, newest)] == [None] * 3


def test_the_old_key_ends_with_the_overlap(keys: KeyStore) -> None:
    key, old, _ = keys.create("shop")
    keys.rotate(key.id, overlap_seconds=0.5)
    assert keys.authenticate(old) is not None
    time.sleep(0.55)
    assert keys.authenticate(old) is None


def test_webhook_secrets_rotate_with_both_signing_meanwhile(keys: KeyStore) -> None:
    key, _, first = keys.create("shop")
    assert first.startswith("whsec_")
    assert len(base64.b64decode(first.removeprefix("whsec_"))) == 32
    assert keys.webhook_secrets(key.id) == [first]
    second = keys.rotate_webhook_secret(key.id, overlap_seconds=0.5)
    assert keys.webhook_secrets(key.id) == [second, first]
    time.sleep(0.55)
    assert keys.webhook_secrets(key.id) == [second]
    assert keys.webhook_secrets("key_nobody") == []


def test_a_given_first_key_is_taken_over(keys: KeyStore) -> None:
    key, plain, secret = keys.create("first", plain="rk_given", webhook_secret="whsec_" + "A" * 44)
    assert (plain, secret) == ("rk_given", "whsec_" + "A" * 44)
    assert keys.authenticate("rk_given") == key
