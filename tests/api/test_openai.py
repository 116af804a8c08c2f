"""``/v1/videos`` with the unmodified `openai` package over a real socket."""

import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from jobs.client import RedisClient
from jobs.job import JobError, Phase
from jobs.keys import KeyStore, Scope
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import MODEL, Running, finish
from tests.support.jobs import card, new_job

# The package marks its `videos` resource deprecated because OpenAI ends its own service.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")
PROMPT = "a red ball rolls over a table"


@pytest.fixture
def make(running: Running, keys: KeyStore) -> Iterator[Callable[..., openai.OpenAI]]:
    opened: list[openai.OpenAI] = []

    def client(*scopes: Scope, plain: str | None = None) -> openai.OpenAI:
        plain = plain or keys.create("openai", scopes or (Scope.SUBMIT, Scope.READ))[1]
        opened.append(openai.OpenAI(base_url=f"{running.url}/v1", api_key=plain, max_retries=0))
        return opened[-1]

    yield client
    for item in opened:
        item.close()


@pytest.fixture
def videos(make: Callable[..., openai.OpenAI]) -> Any:
    return make().videos


def test_create_poll_download_list_delete(videos: Any, store: JobStore, settings: Settings) -> None:
    made = videos.create(prompt=PROMPT, model="tiny", size="64x48", seconds="0.25")
    assert (made.status, made.object, made.progress) == ("queued", "video", 0)
    assert (made.model, made.size, made.seconds, made.prompt) == ("tiny", "64x48", "0.25", PROMPT)
    assert store.get(made.id).request.frame_num == 5
    finish(store, settings)
    done = videos.poll(made.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at >= done.created_at
    assert done.expires_at == pytest.approx(done.completed_at + settings.retention_seconds, abs=1)
    assert videos.download_content(made.id).read() == b"not really a video"
    assert videos.download_content(made.id, variant="thumbnail").read() == b"not really a picture"
    assert [item.id for item in videos.list()] == [made.id]
    gone = videos.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        videos.retrieve(made.id)


def test_only_a_prompt(videos: Any, store: JobStore) -> None:
    made = videos.create(prompt=PROMPT)
    request = store.get(made.id).request
    assert (request.size, request.frame_num, made.seconds) == ("64*48", 5, "0.25")


@pytest.mark.parametrize(("seconds", "frames"), [("1", 17), ("5", 81), ("2.6", 41), ("0.01", 1)])
def test_seconds_become_frames(videos: Any, store: JobStore, seconds: str, frames: int) -> None:
    """frames = 4*round(s*fps/4)+1 at 16 fps."""
    assert store.get(videos.create(prompt=PROMPT, seconds=seconds).id).request.frame_num == frames


def test_our_fields_as_extra_body(videos: Any, store: JobStore) -> None:
    extra = {"seed": 7, "sampling_steps": 3, "guide_scale": 2.5, "shift": 4, "negative_prompt": "blur"}
    made = videos.create(prompt=PROMPT, extra_body={**extra, "sample_solver": "dpm++"})
    request = store.get(made.id).request
    assert (request.seed, request.sampling_steps, request.guide_scale) == (7, 3, (2.5, 2.5))
    assert (request.shift, request.negative_prompt, request.sample_solver) == (4.0, "blur", "dpm++")


def test_a_first_image(videos: Any, store: JobStore, redis: RedisClient) -> None:
    from PIL import Image

    NodeRegistry(redis).publish_model(card(name="tiny", task="i2v"))
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "PNG")
    file.name = "first.png"
    file.seek(0)
    made = videos.create(prompt=PROMPT, input_reference=file)
    image = store.get(made.id).request.image
    assert image is not None
    assert image.startswith("uploads/key_")
    with pytest.raises(openai.BadRequestError) as refused:
        videos.create(prompt=PROMPT, input_reference=("first.png", b"no image", "image/png"))
    assert refused.value.param == "input_reference"


def test_a_repeat_with_a_picture(client: httpx.Client, running: Running, redis: RedisClient) -> None:
    """The same form is the same job, stored once, also when no model is there; another picture is refused."""
    from PIL import Image

    NodeRegistry(redis).publish_model(card(name="tiny", task="i2v"))

    def post(colour: str) -> httpx.Response:
        file = io.BytesIO()
        Image.new("RGB", (64, 48), colour).save(file, "PNG")
        sent = {"input_reference": ("first.png", file.getvalue(), "image/png")}
        headers = {"Idempotency-Key": "one"}
        return client.post("/v1/videos", data={"prompt": PROMPT}, files=sent, headers=headers)

    first = post("red")
    assert first.status_code == 200, first.text
    redis.execute_command("DEL", "reel:models")
    again = post("red")
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert post("blue").json()["error"]["code"] == "idempotency-key-reused"
    assert redis.execute_command("ZCARD", "reel:uploads") == 1


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"size": "1280x720"}, "size", "expected one of 64x48, 128x96"),
        ({"size": "big"}, "size", "one of 64x48"),
        ({"seconds": "12"}, "seconds", "at most 5"),
        ({"seconds": "soon"}, "seconds", "got soon"),
        ({"seconds": "nan"}, "seconds", "above 0"),
        ({"seconds": "-1"}, "seconds", "above 0"),
        ({"model": "sora-2"}, "model", "expected one of tiny"),
        ({"prompt": ""}, "prompt", "1 to 2000"),
        ({"prompt": "x" * 2001}, "prompt", "1 to 2000"),
        ({"extra_body": {"seed": "x"}}, "seed", "a number"),
        ({"extra_body": {"colour": "red"}}, "colour", "no such field"),
        ({"extra_body": {"sampling_steps": 0}}, "sampling_steps", "1 to 100"),
        (
            {"extra_body": {"input_reference": "https://1.1.1.1/x.png"}},
            "input_reference",
            "makes videos from text only",
        ),
    ],
)
def test_refusals_name_the_parameter(videos: Any, fields: dict[str, Any], param: str, part: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        videos.create(**{"prompt": PROMPT, **fields})
    error = refused.value
    assert error.param == param
    assert error.code == "invalid-request"
    assert error.type == "invalid_request_error"
    assert part in error.message


def test_other_refusals(make: Callable[..., openai.OpenAI], videos: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as no_key:
        make(plain="rk_wrong").videos.list()
    assert (no_key.value.code, no_key.value.type) == ("unauthenticated", "authentication_error")
    with pytest.raises(openai.PermissionDeniedError) as no_scope:
        make(Scope.READ).videos.create(prompt=PROMPT)
    assert no_scope.value.code == "forbidden"
    made = videos.create(prompt=PROMPT)
    with pytest.raises(openai.NotFoundError) as strange:
        make().videos.retrieve(made.id)
    assert strange.value.code == "not-found"
    with pytest.raises(openai.ConflictError) as live:
        videos.delete(made.id)
    assert live.value.code == "wrong-state"
    with pytest.raises(openai.ConflictError):
        videos.download_content(made.id)
    with pytest.raises(openai.BadRequestError) as sheet:
        videos.download_content(made.id, variant="spritesheet")
    assert sheet.value.param == "variant"
    with pytest.raises(openai.NotFoundError):
        videos.remix(made.id, prompt=PROMPT)


def test_ended_jobs_fail_with_a_code(videos: Any, store: JobStore) -> None:
    canceled = videos.create(prompt=PROMPT)
    store.cancel(canceled.id)
    seen = videos.retrieve(canceled.id)
    assert (seen.status, seen.error.code, seen.completed_at) == ("failed", "canceled", None)
    late = store.submit(new_job(key=store.get(canceled.id).key_id, deadline_seconds=0.001))[0]
    time.sleep(0.01)
    assert store.claim(MODEL, "node-a") is None
    seen = videos.retrieve(late.id)
    assert (seen.status, seen.error.code) == ("failed", "expired")
    failed = videos.create(prompt=PROMPT)
    job = store.claim(MODEL, "node-a")
    assert job is not None
    store.heartbeat(job.id, job.token, phase=Phase.PUBLISHING, step=4, progress=1.0)
    seen = videos.retrieve(failed.id)
    assert (seen.status, seen.progress, seen.expires_at) == ("in_progress", 99, None)
    error = JobError(type="out-of-memory", title="No memory left", detail="Smaller.", failure_class="user")
    store.fail(job.id, job.token, error)
    seen = videos.retrieve(failed.id)
    assert (seen.status, seen.error.code) == ("failed", "out-of-memory")
    assert seen.error.message == "No memory left: Smaller."
    assert seen.expires_at > seen.created_at


def test_pages(videos: Any) -> None:
    ids = [videos.create(prompt=PROMPT).id for _ in range(5)]
    assert [item.id for item in videos.list(limit=2)] == ids[::-1]  # the package follows `after` by itself
    first = videos.list(limit=2)
    assert (len(first.data), first.has_more, first.last_id) == (2, True, ids[3])
    with pytest.raises(openai.BadRequestError) as nope:
        videos.list(after="nope")
    assert nope.value.param == "after"
    with pytest.raises(openai.BadRequestError) as order:
        videos.list(order="asc")
    assert order.value.param == "order"


def test_the_key_does_not_follow_the_redirect(
    videos: Any, store: JobStore, settings: Settings, running: Running
) -> None:
    made = videos.create(prompt=PROMPT)
    finish(store, settings)
    content = videos.download_content(made.id)
    hops = [*content.response.history, content.response]
    assert [hop.status_code for hop in hops] == [302, 200]
    assert "authorization" in hops[0].request.headers
    assert "authorization" not in hops[1].request.headers


def test_json_and_wrong_bodies(client: httpx.Client) -> None:
    made = client.post("/v1/videos", json={"prompt": PROMPT, "size": "64x48", "seconds": "1"})
    assert made.status_code == 200
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b"x", "text/plain", 415),
        (b"--x\r\nbroken", "multipart/form-data; boundary=y", 400),
        (b"x", "multipart/form-data", 400),
    ):
        answer = client.post("/v1/videos", content=content, headers={"Content-Type": kind})
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    twice = client.post("/v1/videos", files=[("prompt", (None, "a")), ("prompt", (None, "b"))])
    assert twice.json()["error"]["param"] == "prompt"
    misplaced = client.post("/v1/videos", files={"prompt": ("a.txt", b"a red ball", "text/plain")})
    assert misplaced.json()["error"]["message"].endswith("prompt: got a file, expected a text")
