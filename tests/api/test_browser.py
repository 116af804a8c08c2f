"""The page in a real Chromium: key, errors at the field, submit, progress, reload, play, cancel."""

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.job import Phase
from jobs.keys import KeyStore, Scope
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.browser import browser, chromium_path
from tests.api.conftest import MODEL, Running, finish

pytest.importorskip("playwright", reason="the page's test needs the playwright package")
pytestmark = [
    pytest.mark.skipif(chromium_path() is None, reason="the page's test needs chromium on the PATH"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SHOT = Path("/tmp/reel-shots")
CANVAS = """async () => {
  const video = document.getElementById('video');
  const hash = () => { const c = document.createElement('canvas'); c.width = 64; c.height = 48;
    const g = c.getContext('2d'); g.drawImage(video, 0, 0, 64, 48);
    return Array.from(g.getImageData(0, 0, 64, 48).data).join(); };
  const at = (t) => new Promise((ok) => { video.addEventListener('seeked', () => ok(hash()), {once: true});
    video.currentTime = t; });
  video.pause();
  return (await at(0.1)) !== (await at(0.8));
}"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A moving test picture as MP4, and its poster."""
    from imageio_ffmpeg import get_ffmpeg_exe

    folder = tmp_path_factory.mktemp("video")
    video, poster = folder / "v.mp4", folder / "p.jpg"
    source = ["-f", "lavfi", "-i", "testsrc=size=320x240:rate=16:duration=1.5"]
    common = [get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    subprocess.run([*common, *source, "-pix_fmt", "yuv420p", "-movflags", "+faststart", video], check=True)
    subprocess.run([*common, "-i", video, "-frames:v", "1", poster], check=True)
    return video, poster


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


def work(store: JobStore, settings: Settings, files: tuple[Path, Path], go: threading.Event) -> None:
    """What a node does, through the store alone."""
    job = None
    while job is None:
        job = store.claim(MODEL, "node-a")
        time.sleep(0.05)
    store.heartbeat(job.id, job.token, phase=Phase.DENOISING, step=2, progress=0.5, eta_seconds=9)
    assert go.wait(30)
    store.give_back(job.id, job.token)
    finish(store, settings, *files)


def test_the_page(
    chromium: Any,
    running: Running,
    keys: KeyStore,
    store: JobStore,
    settings: Settings,
    node: Any,
    files: Any,
) -> None:
    plain = keys.create("browser", (Scope.SUBMIT, Scope.READ, Scope.ADMIN))[1]
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
    SHOT.mkdir(exist_ok=True)
    page.goto(running.url)
    page.fill("#key", "rk_wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-error:not(:empty)")
    page.screenshot(path=SHOT / "gate.png")
    page.fill("#key", plain)
    page.press("#key", "Enter")
    page.wait_for_selector("#form")
    page.press("#prompt", "Control+Enter")  # empty: the error stands at the field
    page.wait_for_selector("#prompt-error:not(:empty)")
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    prompt = "<img src=x onerror=alert(1)> a red ball"
    page.fill("#prompt", prompt)
    assert "onerror" in page.text_content("#curl")
    go = threading.Event()
    worker = threading.Thread(target=work, args=(store, settings, files, go))
    worker.start()
    page.click("#submit")
    page.wait_for_selector("#bar[aria-valuenow='50']")
    assert "step 2 of 4" in page.text_content("#work-fine")
    assert page.text_content("#said") == prompt
    page.screenshot(path=SHOT / "working.png")
    page.reload()
    page.wait_for_selector("#bar[aria-valuenow='50']")  # found again in the middle of its run
    go.set()
    worker.join()
    end = time.monotonic() + 20  # not wait_for_function: the page's policy forbids its eval, rightly
    while page.evaluate("() => document.getElementById('video').readyState") != 4:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert page.evaluate(CANVAS)
    assert page.get_attribute("#download", "href").startswith(settings.s3_endpoint or "x")
    page.wait_for_selector(".card img")
    page.wait_for_selector(".node")
    page.screenshot(path=SHOT / "finished.png", full_page=True)
    page.click("#again")
    page.wait_for_selector("#cancel:visible")
    page.click("#cancel")
    page.wait_for_selector("#ended:visible")
    assert page.text_content("#ended-title") == "Canceled"
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=SHOT / "phone.png", full_page=True)
    page.goto(f"{running.url}/docs")
    page.wait_for_selector("text=POST /v1/jobs")
    page.close()
    assert problems == []
