"""SSRF at submission, uploads apart from this process, silent logs, health, and starting without services."""

import io
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from api.app import create_app
from jobs.client import RedisClient
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import Running, finish, serve, submit
from tests.support.jobs import card
from tests.support.redis import redis_server

PROMPT = "a red ball rolls over a table"
REFUSED = [
    "http://1.1.1.1/", "ftp://1.1.1.1/", "https://1.1.1.1:22/", "https://user:pass@1.1.1.1/", "https://localhost/",
    "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/",
    "https://10.0.0.1/", "https://172.16.0.1/", "https://192.168.0.1/", "https://169.254.169.254/latest",
    "https://100.64.0.1/", "https://0.0.0.0/", "https://224.0.0.1/", "https://255.255.255.255/", "https://[::1]/",
    "https://[::]/", "https://[fe80::1]/", "https://[fd00::1]/", "https://[::ffff:127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/", "https://168.63.129.16/", "https://1.1.1.1\\@x/",
    "https://no-such-host.invalid/", "//1.1.1.1/", "1.1.1.1", "",
]  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
def test_callbacks_to_inside_are_refused(client: httpx.Client, store: JobStore, url: str) -> None:
    answer = client.post("/v1/jobs", json={"prompt": PROMPT, "callback_url": url})
    assert answer.status_code == 422, url
    assert [item["field"] for item in answer.json()["errors"]] == ["callback_url"]
    assert store.list("*")[0] == []


def test_public_and_allowed_loopback_callbacks(
    client: httpx.Client, client_for: Callable[..., httpx.Client], settings: Settings
) -> None:
    assert submit(client, callback_url="https://1.1.1.1/hook")["callback_url"] == "https://1.1.1.1/hook"
    with serve(settings.model_copy(update={"allow_loopback_callbacks": True})) as local:
        inside = client_for(url=local.url)
        assert (
            submit(inside, callback_url="http://127.0.0.1:9000/x")["callback_url"]
            == "http://127.0.0.1:9000/x"
        )
        bad = inside.post("/v1/jobs", json={"prompt": PROMPT, "callback_url": "http://10.0.0.1/x"})
        assert bad.status_code == 422


def picture(kind: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_upload_and_use(
    client: httpx.Client, client_for: Callable[..., httpx.Client], redis: RedisClient, store: JobStore,
    running: Running, kind: str,
) -> None:  # fmt: skip
    NodeRegistry(redis).publish_model(card(task="ti2v"))
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    data = picture(kind, exif=exif)
    made = client.post("/v1/uploads", content=data, headers={"Content-Type": f"image/{kind.lower()}"})
    assert made.status_code == 201, made.text
    assert (made.json()["width"], made.json()["height"]) == (64, 48)
    job = submit(client, image=made.json()["id"])
    assert job["request"]["image"] == made.json()["id"]  # type: ignore[index]
    stored = store.get(str(job["id"])).request.image
    assert stored is not None
    assert b"secret place" not in running.services.storage.get_bytes(stored)
    stolen = client_for().post("/v1/jobs", json={"prompt": PROMPT, "image": made.json()["id"]})
    assert stolen.status_code == 422
    form = client.post("/v1/uploads", files={"file": ("x", data, "image/png")})
    assert form.status_code == 201


def test_refused_uploads(client: httpx.Client) -> None:
    png = picture("PNG")
    for data, part in (
        (b"", "empty"),
        (b"GIF89a" + png, "first bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "first bytes"),
        (png[:60], "cannot be decoded"),
        (picture("PNG", (8, 8)), "each side needs"),
        (picture("PNG", (1000, 20)), "8 times"),
        (picture("PNG", (7000, 6000)), "at most 33554432"),
    ):
        answer = client.post("/v1/uploads", content=data, headers={"Content-Type": "image/png"})
        assert answer.status_code == 422, part
        assert part in answer.json()["errors"][0]["expected"]
    assert client.post("/v1/uploads", content=png, headers={"Content-Type": "text/html"}).status_code == 415
    assert client.post("/v1/uploads", data={"file": "text"}, files={"x": b"y"}).status_code == 422


def test_canaries_stay_out_of_logs_and_metrics(
    client: httpx.Client, store: JobStore, settings: Settings, caplog: Any, capfd: Any
) -> None:
    caplog.set_level(logging.DEBUG, logger="api")
    canary = "canary-93f1"
    job = submit(client, prompt=canary, negative_prompt=canary, metadata={"ref": canary})
    client.post("/v1/jobs", json={"prompt": canary * 999, canary: canary})
    client.post("/v1/jobs", content=canary, headers={"Content-Type": "application/json"})
    client.get("/v1/jobs", params={"metadata.ref": canary})
    client.get("/v1/key", headers={"Authorization": f"Bearer {canary}"})
    client.get(f"/{canary}", headers={"Cookie": canary})
    finish(store, settings)
    signed = client.get(f"/v1/jobs/{job['id']}/video").headers["location"]
    text = caplog.text + "".join(capfd.readouterr()) + client.get("/metrics").text
    assert 'route="/v1/jobs"' in text
    for secret in (canary, client.headers["authorization"].split()[1], signed.rsplit("=", 1)[1]):
        assert secret not in text


def test_an_unexpected_error_tells_the_client_nothing(
    client: httpx.Client, running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has where it happened; the error's text, which may quote a prompt, is nowhere."""

    def broken(job_id: str) -> None:
        raise RuntimeError("canary-93f1")

    monkeypatch.setattr(running.services.jobs, "get", broken)
    caplog.set_level(logging.DEBUG, logger="api")
    answer = client.get("/v1/jobs/job_x")
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/internal")
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    facade = client.get("/v1/videos/job_x").json()["error"]
    assert (facade["code"], facade["type"]) == ("internal", "server_error")
    assert "RuntimeError" in caplog.text
    assert "test_security.py" in caplog.text
    assert "canary" not in answer.text + str(facade) + caplog.text


def test_page_policy(client: httpx.Client, settings: Settings) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert {"frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} <= {*policy.split("; ")}
    assert f"media-src {settings.s3_endpoint}" in policy
    assert "<style" not in page.text
    assert "style=" not in page.text
    assert page.text.count("<script") == 1
    for name in ("app.js", "client.js", "dom.js", "form.js", "lists.js", "stage.js", "docs.js", "style.css"):
        text = client.get(f"/web/{name}").text
        assert "innerHTML" not in text
        assert "http://" not in text
        assert "https://" not in text
    assert client.get("/web/..%2fapp.py").status_code == 404
    assert client.get("/docs").status_code == 200


def test_the_page_plays_from_the_storages_public_address(settings: Settings) -> None:
    """Which clients reach where the API's own does not lead; on AWS, from the bucket's two spellings."""
    for changes, media in (
        ({"s3_public_endpoint": "https://media.example:9000/path"}, "https://media.example:9000"),
        (
            {"s3_endpoint": None, "s3_public_endpoint": None, "s3_bucket": "clips", "s3_region": "eu-west-1"},
            "https://clips.s3.amazonaws.com https://*.eu-west-1.amazonaws.com",
        ),
    ):
        answer = TestClient(create_app(settings.model_copy(update=changes))).get("/")
        assert f"media-src {media}" in answer.headers["content-security-policy"].split("; ")


def test_an_unchanged_file_of_the_page_is_not_sent_again(client: httpx.Client) -> None:
    for path in ("/", "/docs", "/web/app.js"):
        first = client.get(path)
        again = client.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b""), path
        assert again.headers["content-security-policy"] == first.headers["content-security-policy"]


def test_readyz_says_what_is_missing(client: httpx.Client, redis: RedisClient, node: Any) -> None:
    assert client.get("/readyz").json()["missing"] == []
    NodeRegistry(redis).remove("node-a")
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["missing"]) == (503, ["node"])
    assert int(answer.headers["retry-after"]) > 0


def test_redis_away_is_503_and_comes_back(settings: Settings) -> None:
    from jobs.client import connect
    from jobs.keys import KeyStore

    with redis_server() as own:
        changed = settings.model_copy(update={"redis_url": own.url, "redis_timeout": 1.0})
        plain = KeyStore(connect(changed), "a secret of the tests, 40 characters long").create("x")[1]
        with serve(changed) as found:
            headers = {"Authorization": f"Bearer {plain}"}
            assert httpx.get(f"{found.url}/v1/key", headers=headers).status_code == 200
            own.stop()
            answer = httpx.get(f"{found.url}/v1/jobs", headers=headers, timeout=30)
            assert answer.status_code == 503
            assert answer.json()["type"] == "/problems/unavailable"
            assert int(answer.headers["retry-after"]) > 0
            assert "redis" in httpx.get(f"{found.url}/readyz", timeout=30).json()["missing"]
            assert httpx.get(f"{found.url}/healthz").status_code == 200
            assert "reel_store_up 0.0" in httpx.get(f"{found.url}/metrics", timeout=30).text
            own.start()
            assert httpx.get(f"{found.url}/v1/jobs", headers=headers).status_code == 401  # an empty Redis


def test_start_without_a_service_is_one_line(settings: Settings) -> None:
    """Three ways, side by side: most of each is Python's start."""
    ways = [
        ({"REEL_REDIS_URL": "redis://127.0.0.1:1/0"}, "127.0.0.1:1/0 cannot be reached"),
        ({"REEL_S3_ENDPOINT": "http://127.0.0.1:1"}, "S3 cannot be used"),
        ({"REEL_S3_BUCKET": "no-such-bucket"}, "S3 has no bucket 'no-such-bucket'"),
    ]
    secret = settings.s3_secret_key
    env = {
        "REEL_REDIS_URL": settings.redis_url,
        "REEL_S3_ENDPOINT": settings.s3_endpoint or "",
        "REEL_S3_ACCESS_KEY": settings.s3_access_key or "",
        "REEL_S3_SECRET_KEY": secret.get_secret_value() if secret else "",
        "REEL_SECRET_KEY": "x" * 40,
        "REEL_API_PORT": "0",
        "REEL_REDIS_TIMEOUT": "1",
        "REEL_START_SECONDS": "0",
    }
    command = [sys.executable, "-m", "api.serve"]
    started = [
        subprocess.Popen(command, env=env | changes, stderr=subprocess.PIPE, text=True) for changes, _ in ways
    ]
    for process, (_, part) in zip(started, ways, strict=True):
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert part in said
        assert said.count("\n") == 1
        assert "Traceback" not in said
