"""A desk for the page's tests: Chromium with one key, and a worker that plays the node through the store."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs.job import Phase
from jobs.keys import KeyStore, Scope
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.browser import browser, chromium_or_skip
from tests.api.conftest import MODEL, Running, finish

PROMPT = "a red ball rolls over a table"
# Two moments of the playing video, drawn and compared.
FRAMES_DIFFER = """async () => {
  const video = document.getElementById('video');
  const hash = () => { const c = document.createElement('canvas'); c.width = 64; c.height = 48;
    const g = c.getContext('2d'); g.drawImage(video, 0, 0, 64, 48);
    return Array.from(g.getImageData(0, 0, 64, 48).data).join(); };
  const at = (t) => new Promise((ok) => { video.addEventListener('seeked', () => ok(hash()), {once: true});
    video.currentTime = t; });
  video.pause();
  return (await at(0.1)) !== (await at(0.8));
}"""
WIDTH = "document.documentElement.scrollWidth - innerWidth"


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
    chromium_or_skip()
    with browser() as found:
        yield found


@dataclass
class Desk:
    """A browser with one key, the store behind it, and what went wrong on any of its pages."""

    context: Any
    url: str
    plain: str
    key_id: str
    store: JobStore
    settings: Settings
    files: tuple[Path, Path]
    problems: list[str] = field(default_factory=list)

    def page(self, path: str = "/", **size: int) -> Any:
        """A new tab."""
        page = self.context.new_page()
        page.set_viewport_size({"width": 1280, "height": 900, **size})
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda line: "Content Security" in line.text and self.problems.append(line.text))
        page.goto(self.url + path)
        return page

    def enter(self, page: Any, keep: bool = False) -> Any:
        """Give the key."""
        page.fill("#key", self.plain)
        if keep:
            page.check("#key-keep")
        page.press("#key", "Enter")
        page.wait_for_selector("#form")
        return page

    @contextmanager
    def running(self) -> Iterator[None]:
        """A node that takes the next job, gets half-way, and finishes it at the end of the block."""
        half, go = threading.Event(), threading.Event()

        def work() -> None:
            job = None
            while job is None:
                job = self.store.claim(MODEL, "node-a")
                time.sleep(0.05)
            self.store.heartbeat(
                job.id, job.token, phase=Phase.DENOISING, step=2, progress=0.5, eta_seconds=9
            )
            NodeRegistry(self.store.redis).beat("node-a", "busy", job.id)
            half.set()
            assert go.wait(60)
            if self.store.heartbeat(job.id, job.token, phase=Phase.DENOISING, step=3, progress=0.7):
                self.store.cancel_running(job.id, job.token)
                return
            self.store.give_back(job.id, job.token)
            finish(self.store, self.settings, *self.files)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            yield
            assert half.wait(20), "nothing was submitted"
        finally:
            go.set()
            worker.join()


@pytest.fixture
def desk(
    chromium: Any,
    running: Running,
    keys: KeyStore,
    store: JobStore,
    settings: Settings,
    node: Any,
    files: Any,
) -> Iterator[Desk]:
    key, plain, _ = keys.create("browser", (Scope.SUBMIT, Scope.READ, Scope.ADMIN))
    context = chromium.new_context()
    found = Desk(context, running.url, plain, key.id, store, settings, files)
    yield found
    context.close()
    assert found.problems == []


def eventually(probe: Callable[[], bool]) -> None:
    """Not wait_for_function: the page's policy forbids its eval, rightly."""
    end = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < end
        time.sleep(0.05)


def plays(page: Any) -> None:
    """The video is loaded far enough to play through, and its pictures differ."""
    eventually(lambda: page.evaluate("document.getElementById('video').readyState") == 4)
    assert page.evaluate(FRAMES_DIFFER)
