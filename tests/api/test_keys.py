"""`reel keys` against the running API: made, limited, rotated and revoked from the command line."""

import base64
import re
from collections.abc import Iterator

import httpx
import pytest

from jobs.client import RedisClient
from jobs.settings import Settings, get_settings
from tests.api.conftest import SECRET, Running, submit
from tests.support.cli import Reel, reel_group


@pytest.fixture
def reel(
    settings: Settings,
    redis: RedisClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Reel]:
    """Runs `reel keys ...` on this Redis and gives what it printed."""
    monkeypatch.setenv("REEL_REDIS_URL", settings.redis_url)
    monkeypatch.setenv("REEL_SECRET_KEY", SECRET)
    get_settings.cache_clear()
    yield reel_group("keys", capsys)
    get_settings.cache_clear()


def told(text: str, name: str) -> str:
    found = re.search(rf"^{name} +(\S+)", text, re.MULTILINE)
    assert found, text
    return found[1]


def test_a_keys_life(reel: Reel, running: Running, redis: RedisClient) -> None:
    made = reel("create", "shop", "--max-outstanding", "1", "--requests-per-minute", "20")
    plain, key_id = told(made, "key"), told(made, "id")
    assert len(base64.urlsafe_b64decode(plain.removeprefix("rk_") + "=")) == 32, "256 bits"
    client = httpx.Client(base_url=running.url, timeout=30)

    def status(key: str) -> int:
        return client.get("/v1/key", headers={"Authorization": f"Bearer {key}"}).status_code

    client.headers["Authorization"] = f"Bearer {plain}"
    job = submit(client)["id"]
    refused = client.post("/v1/jobs", json={"prompt": "one too many"})
    assert refused.json()["type"] == "/problems/queue-full"
    assert refused.headers["ratelimit-policy"] == '"key";q=20;w=60'
    listed = reel("list")
    assert key_id in listed
    assert plain not in listed

    fresh = told(reel("rotate", key_id), "key")
    assert [status(plain), status(fresh)] == [200, 200], "both for a day"
    newest = told(reel("rotate", key_id, "--overlap-hours", "0"), "key")
    assert [status(fresh), status(newest)] == [401, 200]
    client.headers["Authorization"] = f"Bearer {newest}"
    assert client.get(f"/v1/jobs/{job}").status_code == 200, "jobs stay with the key"
    secret = told(reel("rotate-secret", key_id), "webhook secret")
    assert secret.startswith("whsec_")
    assert secret != told(made, "webhook secret")

    hashes = ("reel:apikeys", "reel:apikeys:hashes")
    everything = str([redis.execute_command("HGETALL", name) for name in hashes])
    for hidden in (plain, fresh, newest, secret):
        assert hidden.split("_", 1)[1] not in everything
    reel("revoke", key_id)
    assert [status(plain), status(newest)] == [401, 401]
    client.close()


def test_mistakes_are_one_line(reel: Reel) -> None:
    for command in ("revoke", "rotate", "rotate-secret"):
        assert "no key 'key_none'" in reel(command, "key_none", code=1)
    assert "--scope: got 'root'" in reel("create", "x", "--scope", "root", code=1)
