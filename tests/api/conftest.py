"""A real Redis, a real S3 and the API on a real socket, once for all; each test gets an empty Redis."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.problem import TYPES
from api.serve import Server
from api.services import Services
from jobs.client import RedisClient, connect
from jobs.job import Job, VideoResult
from jobs.keys import ApiKey, KeyStore, Scope
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings
from jobs.storage import ObjectStore, artifact_key
from jobs.store import JobStore
from tests.support.jobs import card
from tests.support.redis import RedisServer, redis_server
from tests.support.s3 import S3Server, s3_server

SECRET = "a secret of the tests, 40 characters long"
MODEL = "tiny"


@dataclass(frozen=True)
class Running:
    """An API that answers on a socket."""

    url: str
    app: FastAPI
    settings: Settings

    @property
    def services(self) -> Services:
        found = self.app.state.services
        assert isinstance(found, Services)
        return found


@contextmanager
def serve(settings: Settings) -> Iterator[Running]:
    """The API with these settings, in a thread of this process."""
    app = create_app(settings)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=3)
    server = Server(config, app.state.services)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", app, settings)
    finally:
        server.handle_exit(15, None)
        thread.join()


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def settings(redis_process: RedisServer, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    found = Settings(
        redis_url=redis_process.url,
        s3_endpoint=s3.endpoint,
        s3_access_key=s3.access_key,
        s3_secret_key=s3.secret_key,
        secret_key=SECRET,
        heartbeat_seconds=0.3,
        redis_timeout=5,
        data_dir=tmp_path_factory.mktemp("data"),
    )
    ObjectStore(found).ensure_bucket()
    return found


@pytest.fixture(scope="session")
def running(settings: Settings) -> Iterator[Running]:
    with serve(settings) as found:
        yield found


@pytest.fixture
def redis(settings: Settings) -> Iterator[RedisClient]:
    """An empty Redis with one model."""
    client = connect(settings)
    client.execute_command("FLUSHALL")
    NodeRegistry(client).publish_model(card())
    yield client
    client.close()


@pytest.fixture
def keys(redis: RedisClient) -> KeyStore:
    return KeyStore(redis, SECRET)


@pytest.fixture
def store(redis: RedisClient, settings: Settings) -> JobStore:
    return JobStore(redis, settings)


@pytest.fixture
def key(keys: KeyStore) -> tuple[ApiKey, str]:
    """A key that submits and reads: (key, plain)."""
    made, plain, _ = keys.create("test")
    return made, plain


@pytest.fixture
def client_for(running: Running, keys: KeyStore) -> Iterator[Callable[..., httpx.Client]]:
    """Makes clients with a fresh key of the given scopes."""
    clients: list[httpx.Client] = []

    def make(*scopes: Scope, url: str = running.url, **limits: int) -> httpx.Client:
        _, plain, _ = keys.create("test", scopes or (Scope.SUBMIT, Scope.READ), **limits)
        client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {plain}"}, timeout=30)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(client_for: Callable[..., httpx.Client]) -> httpx.Client:
    """A client whose key submits and reads."""
    return client_for()


@pytest.fixture
def node(redis: RedisClient) -> NodeInfo:
    """A live, idle node in the registry."""
    return NodeRegistry(redis).register(NodeInfo(id="node-a", model=MODEL, state="idle", device="cpu"))


def one_error(answer: httpx.Response, slug: str, status: int) -> dict[str, str]:
    """The only entry of a problem's `errors`, after checking its frame."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["type"] == f"/problems/{slug}"
    assert body["status"] == status
    assert body["title"] == TYPES[slug].title
    assert body["instance"] == answer.request.url.path
    assert body["request_id"] == answer.headers["x-request-id"]
    assert len(body["errors"]) == 1, body["errors"]
    found: dict[str, str] = body["errors"][0]
    assert set(found) == {"field", "got", "expected"}
    return found


def submit(client: httpx.Client, **fields: object) -> dict[str, object]:
    """Submit a job and return it."""
    answer = client.post("/v1/jobs", json={"prompt": "a red ball rolls over a table", **fields})
    assert answer.status_code == 202, answer.text
    found: dict[str, object] = answer.json()
    return found


def finish(store: JobStore, settings: Settings, video: Path | None = None, poster: Path | None = None) -> Job:
    """What a node does, by the store alone: claim the next job, put files into S3, commit."""
    job = store.claim(MODEL, "node-a")
    assert job is not None
    storage = ObjectStore(settings)
    names = {name: artifact_key(job.id, job.token, name) for name in ("video.mp4", "poster.jpg", "job.json")}
    if video and poster:
        storage.put_file(names["video.mp4"], video, "video/mp4")
        storage.put_file(names["poster.jpg"], poster, "image/jpeg")
    else:
        storage.put_bytes(names["video.mp4"], b"not really a video", "video/mp4")
        storage.put_bytes(names["poster.jpg"], b"not really a picture", "image/jpeg")
    width, height = (int(part) for part in job.request.size.split("*"))
    return store.finish(
        job.id,
        job.token,
        VideoResult(
            video_key=names["video.mp4"],
            poster_key=names["poster.jpg"],
            manifest_key=names["job.json"],
            width=width,
            height=height,
            frames=job.request.frame_num,
            fps=16.0,
            bytes=18,
            sha256="0" * 64,
            seconds={"denoising": 1.5},
        ),
    )
