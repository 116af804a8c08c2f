"""`image` as a URL: fetched and decoded in a process of its own, from the address that was checked only."""

import asyncio
import http.server
import io
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from api import image_fetch
from api.image_fetch import Order, fetch
from api.image_process import MEMORY, RefusedError
from api.sanitize import ImageRefusedError, _child, _picture
from jobs import addresses
from jobs.client import RedisClient
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import Running, serve
from tests.support.jobs import card
from tests.support.serving import serving
from tests.support.tls import self_signed
from tests.worker.receiver import RawReceiver, Reply

PROMPT = "a red ball rolls over a table"
HOST = "pictures.example"


def png(size: tuple[int, int] = (64, 48)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "PNG")
    return out.getvalue()


class Pictures(http.server.ThreadingHTTPServer):
    """Answers by path; remembers the paths and headers."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.seen: list[tuple[str, str]] = []
        self.go = threading.Event()  # until then /slow.png is not answered
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: a refused handshake is what some tests want."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Pictures

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))
        name = self.path.split("?")[0]
        if name == "/slow.png":
            assert self.server.go.wait(20)
            name = "/red.png"
        if name == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/red.png")
            self.end_headers()
            return
        body = {"/red.png": png(), "/page.html": b"<html>", "/huge.png": b"x" * 9000, "/endless.png": b""}
        if name not in body:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")  # never believed
        if name != "/endless.png":
            self.send_header("Content-Length", str(len(body[name])))
        self.end_headers()
        self.wfile.write(body[name])
        for _ in range(64 if name == "/endless.png" else 0):
            self.wfile.write(png()[:8] + b"x" * 992)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def pictures() -> Iterator[Pictures]:
    with serving(Pictures()) as found:
        yield found


@pytest.fixture(scope="module")
def local(settings: Settings) -> Iterator[Running]:
    """An API that may fetch from `localhost`, up to 8 kB."""
    with serve(settings.model_copy(update={"allowed_hosts": "localhost", "max_upload_bytes": 8192})) as found:
        yield found


@pytest.fixture
def client(local: Running, client_for: Callable[..., httpx.Client], redis: RedisClient) -> httpx.Client:
    NodeRegistry(redis).publish_model(card(task="ti2v"))
    return client_for(url=local.url)


def test_a_picture_is_fetched_written_anew_and_stored(
    client: httpx.Client, pictures: Pictures, store: JobStore, local: Running
) -> None:
    url = f"http://localhost:{pictures.server_port}/red.png?token=t"
    body, headers = {"prompt": PROMPT, "image": url}, {"Idempotency-Key": "one"}
    made = client.post("/v1/jobs", json=body, headers=headers)
    assert made.status_code == 202, made.text
    assert made.json()["request"]["image"].startswith("img_")
    stored = store.get(made.json()["id"]).request.image
    assert stored is not None
    with Image.open(io.BytesIO(local.services.storage.get_bytes(stored))) as image:
        assert (image.format, image.size) == ("PNG", (64, 48))
    assert pictures.seen == [("/red.png?token=t", f"localhost:{pictures.server_port}")]
    again = client.post("/v1/jobs", json=body, headers=headers)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (made.json()["id"], "true")
    assert len(pictures.seen) == 1, "a repeat fetches nothing"
    other = client.post("/v1/jobs", json={**body, "seed": 1}, headers=headers)
    assert other.json()["type"] == "/problems/idempotency-key-reused"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("moved.png", "redirects are not followed"),
        ("none.png", "answered 404"),
        ("page.html", "first bytes"),
        ("huge.png", "it has 9000 bytes; at most 8192"),
        ("endless.png", "more than 8192 bytes"),
    ],
)
def test_what_is_no_picture_is_refused(
    client: httpx.Client, pictures: Pictures, store: JobStore, name: str, part: str
) -> None:
    url = f"http://localhost:{pictures.server_port}/{name}"
    answer = client.post("/v1/jobs", json={"prompt": PROMPT, "image": url})
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["field"] == "image"
    assert part in error["expected"]
    assert store.list("*")[0] == []


def test_a_key_has_two_pictures_on_their_way_at_once(
    client: httpx.Client, client_for: Callable[..., httpx.Client], pictures: Pictures, local: Running
) -> None:
    """A third is told to come back; others' keys go on; and one that arrived makes room for the next."""

    def post(who: httpx.Client, name: str = "slow.png") -> httpx.Response:
        url = f"http://localhost:{pictures.server_port}/{name}"
        return who.post("/v1/jobs", json={"prompt": PROMPT, "image": url})

    with ThreadPoolExecutor(2) as pool:
        under_way = [pool.submit(post, client) for _ in range(2)]
        try:
            end = time.monotonic() + 20
            while len(pictures.seen) < 2:
                assert time.monotonic() < end
                time.sleep(0.01)
            third = post(client)
            assert (third.status_code, third.json()["type"]) == (429, "/problems/rate-limited")
            assert int(third.headers["retry-after"]) > 0
            assert post(client_for(url=local.url), "red.png").status_code == 202
        finally:
            pictures.go.set()
        assert [one.result().status_code for one in under_way] == [202, 202]
    assert post(client).status_code == 202


def test_nothing_is_fetched_for_a_request_that_is_wrong_anyway(
    client: httpx.Client, pictures: Pictures
) -> None:
    url = f"http://localhost:{pictures.server_port}/red.png"
    answer = client.post("/v1/jobs", json={"prompt": PROMPT, "image": url, "frame_num": 80})
    assert [item["field"] for item in answer.json()["errors"]] == ["frame_num"]
    assert pictures.seen == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/red.png", "https://127.0.0.1:{port}/red.png", "http://[::1]:{port}/",
        "https://169.254.169.254/latest/meta-data", "https://2130706433/", "https://0x7f.1/", "https://10.0.0.1/",
        "https://[::ffff:10.0.0.1]/", "https://[fd00::1]/", "https://100.64.0.1/", "file:///etc/passwd",
        "ftp://1.1.1.1/x.png", "https://u:p@localhost/", "http://1.1.1.1/x.png", "https://1.1.1.1:22/",
    ],
)  # fmt: skip
def test_inner_addresses_are_refused(client: httpx.Client, pictures: Pictures, url: str) -> None:
    body = {"prompt": PROMPT, "image": url.format(port=pictures.server_port)}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 422
    assert [item["field"] for item in answer.json()["errors"]] == ["image"]
    assert pictures.seen == []


def test_the_process_checks_again_so_a_name_that_turns_inward_is_not_connected_to(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_getaddrinfo", lambda host, port: ["127.0.0.1"])
    with pytest.raises(RefusedError, match="loopback"):
        fetch(Order("https://rebound.example/red.png", 8192, 10_000))
    assert pictures.seen == []


def test_the_name_is_verified_though_the_address_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(HOST, tmp_path / "cert.pem")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    monkeypatch.setattr(addresses, "_getaddrinfo", lambda host, port: ["127.0.0.1"])
    trusting = ssl.create_default_context(cafile=str(certificate))
    with serving(Pictures(server)) as pictures:
        order = Order(f"https://{HOST}:{pictures.server_port}/red.png", 8192, 10_000, allow_loopback=True)
        with pytest.raises(RefusedError, match="SSLCertVerificationError"):
            fetch(order)  # nobody vouches for the certificate
        monkeypatch.setattr(image_fetch, "tls_context", lambda: trusting)
        assert fetch(order) == png()
        with pytest.raises(RefusedError, match="SSLCertVerificationError"):
            fetch(Order(order.url.replace(HOST, "other.example"), 8192, 10_000, allow_loopback=True))
        assert pictures.seen == [("/red.png", f"{HOST}:{pictures.server_port}")]


def test_when_one_address_refuses_the_names_next_one_is_tried(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_getaddrinfo", lambda host, port: ["127.0.0.2", "127.0.0.1"])
    order = Order(f"http://two.example:{pictures.server_port}/red.png", 8192, 10_000, allow_loopback=True)
    assert fetch(order) == png()


@pytest.mark.parametrize(("name", "size"), [("huge.png", 9000), ("endless.png", 64_000)])
def test_a_picture_may_be_as_large_as_the_limit(name: str, size: int, pictures: Pictures) -> None:
    """Whether its size is announced or not."""
    url = f"http://127.0.0.1:{pictures.server_port}/{name}"
    assert len(fetch(Order(url, size, 10_000, allow_loopback=True))) == size
    with pytest.raises(RefusedError, match=f"{size - 1}"):
        fetch(Order(url, size - 1, 10_000, allow_loopback=True))


def test_a_fetched_picture_may_wait_for_its_turn_and_is_decoded_within_limits(pictures: Pictures) -> None:
    """The exchange's time ends with its last byte: others' pictures may be decoded before this one."""
    code = """if True:
        import resource, sys, api.image_fetch as m
        m.SECONDS = 0.4
        m.write_image = lambda data, most: print(len(data), most, resource.getrlimit(resource.RLIMIT_AS)[0])
        sys.exit(m.main())"""
    url = f"http://127.0.0.1:{pictures.server_port}/red.png"
    order = {"url": url, "max_bytes": 8192, "max_pixels": 10_000, "allow_loopback": True}
    with subprocess.Popen(
        [sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "fetched\n"
        time.sleep(0.6)
        out, _ = process.communicate("\n", timeout=30)
    assert (process.returncode, out.split()) == (0, [str(len(png())), "10000", str(MEMORY)])


def test_a_decoder_that_dies_is_the_pictures_fault_and_none_outlives_its_request() -> None:
    async def dies() -> None:
        async with _child("-c", "import os; os.kill(os.getpid(), 9)") as process:
            await _picture(process, b"")

    async def left() -> int | None:
        async with _child("-c", "import time; time.sleep(600)") as process:
            pass  # as when the client goes away
        try:
            return process.returncode
        finally:
            if process.returncode is None:
                process.kill()

    with pytest.raises(ImageRefusedError, match="more memory or time"):
        asyncio.run(dies())
    assert asyncio.run(left()) == -9


def test_the_process_knows_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REEL_SECRET_KEY", "canary")

    async def look() -> bytes:
        code = "import os; print(dict(os.environ), os.getcwd())"
        async with _child("-c", code) as process:
            return (await process.communicate())[0]

    seen = asyncio.run(look()).decode()
    assert "canary" not in seen
    assert "LANG" in seen


@pytest.mark.parametrize("reply", [Reply(delay=30.0), Reply(drip=0.05)], ids=["silent", "dripping"])
def test_a_server_that_takes_for_ever_is_given_up(reply: Reply) -> None:
    code = "import sys, api.image_fetch as m; m.SECONDS = 0.5; sys.exit(m.main())"
    with RawReceiver(reply) as slow:
        order = {"url": f"http://127.0.0.1:{slow.port}/x.png", "max_bytes": 9, "max_pixels": 9}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], input=json.dumps(order | {"allow_loopback": True}),
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert time.monotonic() - began < 15
    assert (done.returncode, done.stdout) == (2, "")
    assert "did not arrive within 0.5 s" in done.stderr or "cannot be fetched (TimeoutError)" in done.stderr
