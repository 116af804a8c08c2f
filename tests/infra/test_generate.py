"""`reel generate`: what its flags become, and how it follows a job to its end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra import client
from infra.cli import invoke
from infra.client import ReelClient
from infra.commands.fields import parse_loras
from infra.errors import CliError
from tests.support.clock import set_clock

FILE = "https://files.example/video.mp4"


def job(state: str, **more: Any) -> dict[str, Any]:
    return {"id": "job_x", "state": state, "progress": 0.5, "request": {"sampling_steps": 4}, **more}


class Api:
    """Answers as the API and the object store do; remembers what was asked."""

    def __init__(self, *states: Any) -> None:
        self.states, self.asked, self.body = list(states), list[str](), dict[str, Any]()
        self.stored = httpx.Response(200, content=b"mp4")

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(f"{request.method} {request.url.path}")
        match self.asked[-1]:
            case "POST /v1/jobs":
                self.body = json.loads(request.content)
                return httpx.Response(202, json=job("queued"))
            case "POST /v1/uploads":
                assert b"a picture" in request.read()
                return httpx.Response(201, json={"id": "img_1"})
            case "POST /v1/jobs/job_x/cancel":
                return httpx.Response(202, json=job("canceled"))
            case "GET /v1/jobs/job_x/video":
                return httpx.Response(200, json={"url": FILE})
            case "GET /video.mp4":
                return self.stored
        state = self.states.pop(0)
        if isinstance(state, BaseException):
            raise state
        return state if isinstance(state, httpx.Response) else httpx.Response(200, json=state)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Api]:
    found = Api()
    transport = httpx.MockTransport(found.answer)
    with httpx.Client(base_url="http://api.example", transport=transport) as http:
        monkeypatch.setattr(client.httpx, "Client", lambda **_: http)
        monkeypatch.setattr(client.httpx, "stream", lambda method, url, **_: http.stream(method, url))
        set_clock(monkeypatch, client, sleep=lambda seconds: None)
        monkeypatch.setenv("REEL_API_KEY", "rk_x")
        monkeypatch.setenv("REEL_API_URL", "http://api.example")
        monkeypatch.chdir(tmp_path)
        yield found


def test_flags_become_the_request(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what was given is sent: the rest is the model's."""
    api.states = [job("running", phase="denoising", step=2, eta_seconds=3.0), job("succeeded")]
    (tmp_path / "ball.png").write_bytes(b"a picture")
    flags = [
        "--image", "ball.png", "--seed", "0", "--guide-scale", "3,4", "--loras", "style:0.7:low",
        "--priority", "low", "--webhook-event", "job.started", "--metadata", "a=b=c", "--metadata", "d=",
    ]  # fmt: skip
    assert invoke(["generate", "a ball", *flags, "--out", "here/ball.mp4"]) == 0
    assert api.body == {
        "prompt": "a ball",
        "image": "img_1",
        "seed": 0,
        "guide_scale": [3.0, 4.0],
        "loras": [{"name": "style", "strength": 0.7, "expert": "low"}],
        "priority": "low",
        "webhook_events": ["job.started"],
        "metadata": {"a": "b=c", "d": ""},
    }
    assert (tmp_path / "here" / "ball.mp4").read_bytes() == b"mp4"
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["ball.mp4"]
    seen = capsys.readouterr()
    assert seen.out == "here/ball.mp4\n"
    assert "job job_x" in seen.err
    assert "step 2/4, about 3 s left" in seen.err


def test_a_short_outage_of_the_api_is_sat_out(api: Api, tmp_path: Path) -> None:
    api.states = [
        httpx.Response(503, json={}),
        httpx.ConnectError("refused"),
        job("queued"),
        job("succeeded"),
    ]
    assert invoke(["generate", "a ball"]) == 0
    assert (tmp_path / "job_x.mp4").exists()


def test_each_outage_has_its_own_half_minute(api: Api) -> None:
    away = [httpx.Response(503, json={})] * 40
    api.states = [*away, job("queued"), *away, job("running"), *away, job("succeeded")]
    assert invoke(["generate", "a ball"]) == 0


def test_an_api_that_stays_away_ends_it(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.states = [httpx.ConnectError("refused")] * 200
    assert invoke(["generate", "a ball"]) == 1
    assert "did not answer: refused" in capsys.readouterr().err
    assert len(api.asked) == 1 + 61, "30 s of looks at every half second"


@pytest.mark.parametrize("state", ["failed", "canceled", "expired"])
def test_a_job_without_a_video_is_an_error_with_its_reason(
    state: str, api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.states = [job(state, error={"title": "Out of memory", "detail": "96 GB were asked for"})]
    assert invoke(["generate", "a ball"]) == 1
    err = capsys.readouterr().err
    assert err.endswith(f"reel: job job_x {state}: Out of memory: 96 GB were asked for\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_cancels_the_job(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.states = [job("running"), KeyboardInterrupt()]
    assert invoke(["generate", "a ball"]) == 1
    assert api.asked[-1] == "POST /v1/jobs/job_x/cancel"
    assert "canceled job job_x" in capsys.readouterr().err


def test_a_file_that_is_not_there_leaves_nothing_under_its_name(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.states, api.stored = [job("succeeded")], httpx.Response(403, content=b"<Error/>")
    (tmp_path / "job_x.mp4").write_bytes(b"an earlier one")
    assert invoke(["generate", "a ball"]) == 1
    assert "the object store answered 403" in capsys.readouterr().err
    assert (tmp_path / "job_x.mp4").read_bytes() == b"an earlier one"


@pytest.mark.parametrize("flags", [["--shift", "nan"], ["--guide-scale", "inf"], ["--loras", "style:nan"]])
def test_a_number_that_is_none_is_one_clear_line(
    flags: list[str], api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["generate", "a ball", *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith("reel: ")
    assert "finite" in err
    assert err.count("\n") == 1
    assert api.asked == []


def test_loras() -> None:
    assert parse_loras(None) is parse_loras([]) is None
    assert parse_loras(["a", "b:0.5", "c::high"]) == [
        {"name": "a", "strength": 1.0, "expert": "both"},
        {"name": "b", "strength": 0.5, "expert": "both"},
        {"name": "c", "strength": 1.0, "expert": "high"},
    ]


@pytest.mark.parametrize("text", ["", ":0.5", "a:strong", "a:1:middle", "a:1:low:more"])
def test_wrong_loras_are_refused(text: str) -> None:
    with pytest.raises(CliError, match="--loras"):
        parse_loras([text])


@pytest.mark.parametrize("text", ["novalue", "=b"])
def test_wrong_metadata_is_refused(text: str, api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["generate", "a ball", "--metadata", text]) == 1
    assert "--metadata" in capsys.readouterr().err
    assert api.asked == []


def test_a_proxy_is_not_asked_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(client.httpx, "Client", lambda **options: made.append(options))
    for url in ("http://127.0.0.1:8080/", "http://localhost:1", "http://[::1]:1", "https://reel.example"):
        ReelClient(url, "rk_x")
    assert [options["trust_env"] for options in made] == [False, False, False, True]
    assert made[0]["headers"] == {"Authorization": "Bearer rk_x"}
