"""Limits that hold before any work: body, headers, URL, rate; and headers that every answer carries."""

import asyncio
import http.client
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from api.limits import SizeLimits
from api.rate import RateDecision, RateLimiter
from jobs.client import RedisClient
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import Running, serve, submit

JSON = {"Content-Type": "application/json"}
SCOPE: Scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": [], "query_string": b""}
LATER = "return redis.call('EXISTS', KEYS[1]) == 1 and redis.call('HINCRBYFLOAT', KEYS[1], 'at', -ARGV[1])"


@pytest.fixture(scope="module")
def small(settings: Settings) -> Iterator[Running]:
    """An API that takes 4 kB."""
    with serve(settings.model_copy(update={"max_body_bytes": 4096, "max_upload_bytes": 8192})) as found:
        yield found


def test_content_length_over_the_limit_is_refused_unread(
    small: Running, client_for: Callable[..., httpx.Client], store: JobStore
) -> None:
    """Only the headers are sent: the answer doesn't wait for a body."""
    key = client_for().headers["authorization"]
    parts = urlsplit(small.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    connection.putrequest("POST", "/v1/jobs")
    for name, value in {**JSON, "Authorization": key, "Content-Length": "1000000000"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status == 413
    assert answer.getheader("content-type") == "application/problem+json"
    assert '"got":"1000000000 bytes","expected":"at most 4096 bytes"' in text
    assert store.list("*")[0] == []


def test_chunked_body_over_the_limit_is_cut_off(
    small: Running, client_for: Callable[..., httpx.Client], store: JobStore
) -> None:
    """No Content-Length: counted as it arrives; the connection ends long before the client is done."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"prompt": "'
        for _ in range(100_000):
            sent += 1000
            yield b"x" * 1000

    client = client_for(url=small.url)
    try:
        answer = client.post("/v1/jobs", content=endless(), headers=JSON)
    except httpx.WriteError:
        answer = None  # the server hung up while we were still sending
    if answer is not None:
        assert answer.status_code == 413
        assert answer.json()["errors"] == [
            {"field": "body", "got": "more than 4096 bytes", "expected": "at most 4096 bytes"}
        ]
    assert sent < 50_000_000
    assert store.list("*")[0] == []


def test_chunked_body_just_over_the_limit(small: Running, client_for: Callable[..., httpx.Client]) -> None:
    def body(size: int) -> Iterator[bytes]:
        text = b'{"prompt": "' + b"x" * size + b'"}'
        yield text[:100]
        yield text[100:]

    client = client_for(url=small.url)
    assert client.post("/v1/jobs", content=body(4096), headers=JSON).status_code == 413
    assert client.post("/v1/jobs", content=body(1900), headers=JSON).status_code == 202


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/v1/jobs", 4096), ("/v1/uploads", 8192), ("/v1/videos", 8192)],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_exactly_as_much_as_is_accepted(
    small: Running, client_for: Callable[..., httpx.Client], path: str, limit: int, chunked: bool
) -> None:
    """A picture may be larger than other bodies, also where it comes with a form; one byte more is a 413."""
    client = client_for(url=small.url)
    for size, refused in ((limit, False), (limit + 1, True)):
        body = iter([b" " * size]) if chunked else b" " * size
        kind = {"Content-Type": "image/png" if path == "/v1/uploads" else "application/json"}
        assert (client.post(path, content=body, headers=kind).status_code == 413) is refused, size


def test_long_headers_and_urls(client: httpx.Client) -> None:
    answer = client.get("/v1/jobs", headers={"X-Long": "x" * 17_000})
    assert answer.status_code == 431
    assert answer.json()["errors"][0]["field"] == "headers"
    answer = client.get("/v1/jobs?model=" + "x" * 5000)
    assert answer.status_code == 431
    assert answer.json()["errors"][0]["field"] == "URL"
    assert client.get("/v1/jobs", headers={"Authorization": "Bearer " + "x" * 9000}).status_code == 401


def test_rate_limit(client_for: Callable[..., httpx.Client]) -> None:
    client = client_for(requests_per_minute=5)
    answers = [client.get("/v1/key") for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert answers[0].headers["ratelimit-policy"] == '"key";q=5;w=60'
    assert answers[0].headers["ratelimit"] == '"key";r=4;t=12'
    last = answers[5]
    assert last.json()["type"] == "/problems/rate-limited"
    assert 1 <= int(last.headers["retry-after"]) <= 12
    assert last.headers["ratelimit"].startswith('"key";r=0;')
    assert client_for().get("/v1/key").status_code == 200  # another key is not touched


def test_rate_limit_refills(client_for: Callable[..., httpx.Client]) -> None:
    client = client_for(requests_per_minute=60)
    while client.get("/v1/key").status_code == 200:
        pass
    time.sleep(1.1)
    assert client.get("/v1/key").status_code == 200


@pytest.fixture
def bucket(settings: Settings, redis: RedisClient) -> Callable[..., RateDecision]:
    """Takes from one key's bucket (40 a minute: one each 1.5 s) after so many seconds, without waiting."""

    def take(after: float = 0.0) -> RateDecision:
        redis.execute_command("EVAL", LATER, 1, "reel:rate:key_a", after)
        return RateLimiter(redis, settings).take("key_a", 40)

    return take


def test_retry_after_is_neither_too_short_nor_too_long(bucket: Callable[..., RateDecision]) -> None:
    while (refused := bucket()).allowed:
        pass
    assert refused.retry_after == 2, "1.5 s, in whole seconds"
    assert not bucket(after=1.2).allowed
    assert bucket(after=0.8).allowed


def test_a_silent_key_saves_up_no_more_than_its_quota(bucket: Callable[..., RateDecision]) -> None:
    bucket()
    assert bucket(after=3600).remaining == 39


def test_every_answer_carries_its_headers(client: httpx.Client) -> None:
    for method, path in (("GET", "/v1/key"), ("GET", "/none"), ("POST", "/v1/jobs"), ("GET", "/healthz")):
        headers = client.request(method, path).headers
        assert headers["x-request-id"].startswith("req_")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_request_ids_are_taken_or_made(client: httpx.Client) -> None:
    assert (
        client.get("/healthz", headers={"X-Request-Id": "trace-1234"}).headers["x-request-id"] == "trace-1234"
    )
    for bad in ("short", "x" * 65, "white space", "<script>alert(1)</script>"):
        assert (
            client.get("/healthz", headers={"X-Request-Id": bad}).headers["x-request-id"].startswith("req_")
        )


def test_a_slow_body_is_given_up() -> None:
    """A client that stops in the middle of its body doesn't hold a request open for ever."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass

    sent: list[Message] = []
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Message:
        if parts:
            return parts.pop()
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(SizeLimits(app, 100, 100, chunk_seconds=0.05)(SCOPE, receive, send))
    assert sent[0]["status"] == 408
    assert b"/problems/body-timeout" in sent[1]["body"]


def test_only_a_body_must_come_in_time() -> None:
    """Once it is complete, a stream may run for as long as it likes: what it waits for is the hang-up."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def receive() -> Message:
        if parts:
            return parts.pop()
        await asyncio.sleep(0.2)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    sent: list[Message] = []
    parts: list[Message] = [{"type": "http.request", "body": b"{}"}]
    asyncio.run(SizeLimits(app, 100, 100, chunk_seconds=0.05)(SCOPE, receive, send))
    assert [message["status"] for message in sent] == [204]


def test_submit_still_works_under_the_limits(small: Running, client_for: Callable[..., httpx.Client]) -> None:
    assert submit(client_for(url=small.url))["state"] == "queued"
