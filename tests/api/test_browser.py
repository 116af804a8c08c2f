"""The page in a real Chromium. The tests touch the page alone; a worker plays the node through the store."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs.client import RedisClient
from jobs.job import Lora, Phase
from jobs.keys import KeyStore, Scope
from jobs.nodes import NodeRegistry
from jobs.quality import PresetCard
from jobs.settings import Settings
from jobs.store import JobStore
from jobs.timings import Timings
from tests.api.browser import browser, chromium_or_skip
from tests.api.conftest import MODEL, Running, finish
from tests.support.jobs import card, new_job, video_request

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
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


def test_from_key_to_video(desk: Desk) -> None:
    page = desk.page()
    page.fill("#key", "rk_wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-error:not(:empty)")
    desk.enter(page)
    page.press("#prompt", "Control+Enter")  # empty: the error stands at the field
    page.wait_for_selector("#prompt-error:not(:empty)")
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    page.click("#idea")
    assert page.input_value("#prompt")
    prompt = "<img src=x onerror=alert(1)> a red ball"
    page.fill("#prompt", prompt)
    assert "onerror" in page.text_content("#curl")
    with desk.running():
        page.click("#submit")
        page.wait_for_selector("#bar[aria-valuenow='50']")
        assert "step 2 of 4 · about 9 s left" in page.text_content("#work-fine")
        assert page.text_content("#said") == prompt, "shown as text"
        assert page.title().startswith("50 %")
        page.wait_for_selector(".node button")
        page.reload()
        page.wait_for_selector("#bar[aria-valuenow='50']")  # found again in the middle of its run
    plays(page)
    assert page.get_attribute("#download", "href").startswith(desk.settings.s3_endpoint or "x")
    page.wait_for_selector(".card img")
    page.hover(".card")
    page.wait_for_selector(".card video")
    page.click("#again")
    page.wait_for_selector("#cancel:visible")
    seeds = {job.request.seed for job in desk.store.list("*")[0]}
    assert len(seeds) == 2
    page.click("#cancel")
    page.wait_for_selector("#ended:visible")
    assert page.text_content("#ended-title") == "Canceled"


def test_by_keyboard_alone(desk: Desk) -> None:
    page = desk.page()
    page.keyboard.type(desk.plain)  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#form")
    page.wait_for_selector("#size option", state="attached")

    def tab_to(target: str) -> None:
        for _ in range(40):
            if page.evaluate("id => document.activeElement?.id === id", target):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"no way to {target}")

    tab_to("prompt")
    page.keyboard.type(PROMPT)
    with desk.running():
        tab_to("submit")
        page.keyboard.press("Enter")
        page.wait_for_selector("#bar[aria-valuenow='50']")
        assert page.text_content("#announce") == "Denoising, 50 percent"
        tab_to("cancel")
        page.keyboard.press("Space")
        page.wait_for_selector("#cancel:disabled")
    page.wait_for_selector("#ended:visible")
    assert page.text_content("#announce") == "Canceled"


def test_two_tabs_show_the_same(desk: Desk) -> None:
    first = desk.enter(desk.page(), keep=True)
    first.fill("#prompt", PROMPT)
    with desk.running():
        first.click("#submit")
        first.wait_for_selector("#bar[aria-valuenow='50']")
        second = desk.page("/" + first.url.split("/")[-1])  # the address names the job; the key is kept
        second.wait_for_selector("#bar[aria-valuenow='50']")
        assert second.text_content("#said") == PROMPT
    for page in (first, second):
        plays(page)
    second.once("dialog", lambda dialog: dialog.accept())
    second.click("#delete")
    second.wait_for_selector("#idle:visible")
    first.reload()
    first.wait_for_selector("#idle:visible")
    assert first.locator(".card").count() == 0


def test_quality_and_loras(desk: Desk) -> None:
    """What the model's card offers is asked for; what it refuses says why; errors stand at the field."""
    presets = [
        PresetCard(name="lossless", summary="as published"),
        PresetCard(name="8bit", refused="needs a GPU of compute capability 9.0"),
        PresetCard(name="draft", summary="few steps", sampling_steps=2, guide_scale=(1.0, 1.0)),
    ]
    NodeRegistry(desk.store.redis).publish_model(card(presets=presets, loras=["ink", "oil"]))
    draft = video_request(quality="draft", sampling_steps=2, guide_scale=(1.0, 1.0))
    Timings(desk.store.redis).learn(draft, {"denoising": 61.0})
    page = desk.enter(desk.page(width=390, height=844))
    page.wait_for_selector("#quality:visible")
    options = page.locator("#quality option")
    assert options.all_text_contents() == ["lossless", "8bit (not offered)", "draft, about 1 min 1 s"]
    assert options.nth(1).is_disabled()
    assert options.nth(1).get_attribute("title") == "needs a GPU of compute capability 9.0"
    assert "quality" not in page.text_content("#curl")
    page.select_option("#quality", "draft")
    assert page.text_content("#quality-help") == "few steps; about 1 min 1 s of computing"
    assert (page.input_value("#sampling_steps"), page.input_value("#guide_high")) == ("2", "1")
    page.fill("#prompt", PROMPT)
    page.click("#details summary")
    page.focus("#lora-add")
    for name in ("oil", "ink"):
        page.keyboard.press("Enter")
        page.keyboard.type(name)  # the new row has the focus
        page.focus("#lora-add")
    page.select_option(".lora:first-child [name=expert]", "high")
    page.fill(".lora:first-child [name=strength]", "99")
    assert page.evaluate(WIDTH) <= 0
    page.click("#submit")
    page.wait_for_selector("#loras-error:not(:empty)")
    assert "-10 to 10" in page.text_content("#loras-error")
    marked = page.eval_on_selector_all(".lora [aria-invalid=true]", "found => found.map((one) => one.name)")
    assert marked == ["strength"]  # of the first row alone
    page.fill(".lora:first-child [name=strength]", "0.5")
    NodeRegistry(desk.store.redis).publish_model(card(presets=presets, loras=["oil"]))  # ink is gone
    page.click("#submit")
    page.wait_for_selector("[aria-invalid=true]")
    wrong = page.locator("[aria-invalid=true]")
    assert (wrong.count(), wrong.input_value()) == (1, "ink")
    assert page.evaluate("document.activeElement.value") == "ink"
    page.click(".lora:last-child [data-remove]")
    page.click("#submit")
    page.wait_for_selector("#working:visible")
    request = desk.store.list("*")[0][0].request
    assert (request.quality, request.sampling_steps, request.guide_scale) == ("draft", 2, (1.0, 1.0))
    assert request.loras == (Lora(name="oil", strength=0.5, expert="high"),)
    page.select_option("#quality", "lossless")
    assert (page.input_value("#sampling_steps"), page.input_value("#guide_high")) == ("4", "4")


def test_seeds_of_any_length(desk: Desk) -> None:
    """Most random seeds have 16 digits; what JavaScript would round is refused at the field."""
    page = desk.enter(desk.page())
    page.fill("#prompt", PROMPT)
    page.click("#details summary")
    page.fill("#seed", "9007199254740993")  # 2^53 + 1
    page.click("#submit")
    page.wait_for_selector("#seed-error:not(:empty)")
    assert "9007199254740991" in page.text_content("#seed-error")
    page.fill("#seed", "9007199254740991")
    page.click("#submit")
    page.wait_for_selector("#working:visible")
    page.fill("#seed", "")
    page.click("#reuse")
    assert page.input_value("#seed") == "9007199254740991"
    page.click("#submit")
    eventually(lambda: len(desk.store.list("*")[0]) == 2)
    assert {job.request.seed for job in desk.store.list("*")[0]} == {2**53 - 1}


def test_a_first_image(desk: Desk) -> None:
    """A picture's errors stand at its field, and it goes when the settings of a job without one are used."""
    NodeRegistry(desk.store.redis).publish_model(card(task="ti2v"))
    page = desk.enter(desk.page())
    page.fill("#prompt", PROMPT)
    page.click("#submit")
    page.wait_for_selector("#working:visible")
    file = {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.set_input_files("#image", file)
    page.click("#submit")
    page.wait_for_selector("#image-error:not(:empty)")
    assert page.get_attribute("#image", "aria-invalid") == "true"
    assert page.text_content("#form-error") == ""
    assert "UPLOAD_ID" in page.text_content("#curl")
    page.click("#reuse")
    assert "image" not in page.text_content("#curl")
    page.click("#submit")
    eventually(lambda: len(desk.store.list("*")[0]) == 2)
    refusal = {"detail": "No scope.", "errors": [{"field": "scope", "expected": "submit"}]}
    page.route("**/v1/uploads", lambda route: route.fulfill(status=403, json=refusal))
    page.set_input_files("#image", file)
    page.click("#submit")
    page.wait_for_selector("#form-error:not(:empty)")
    assert page.text_content("#form-error") == "No scope."


def test_another_key_sees_nothing_of_the_last(desk: Desk, keys: KeyStore) -> None:
    """Neither videos nor what was typed; and a refresh drops what was deleted elsewhere."""
    for _ in range(14):
        desk.store.submit(new_job(desk.key_id))
        finish(desk.store, desk.settings)
    page = desk.enter(desk.page())
    page.click("#more")
    eventually(lambda: page.locator(".card").count() == 14)
    listed, _ = desk.store.list("*")
    held: list[Any] = []  # a late answer to the first click must not replace the second's
    page.route(f"**/v1/jobs/{listed[0].id}", lambda route: held.append(route))
    page.locator(".card").nth(0).click()
    page.locator(".card").nth(1).click()
    page.wait_for_selector("#video:visible")
    with page.expect_response(f"**/v1/jobs/{listed[0].id}") as late:
        held[0].continue_()
    late.value.finished()
    page.wait_for_timeout(50)
    assert page.url.endswith(listed[1].id)
    focused = page.locator(".card").nth(6)
    focused.focus()
    for place in (3, 13):
        desk.store.delete(listed[place].id)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # as a tab that is seen again
    eventually(lambda: page.locator(".card").count() == 12)
    assert page.evaluate("document.activeElement.parentElement.dataset.job") == listed[6].id, (
        "keeps the focus"
    )
    page.fill("#prompt", "a secret of the first key")
    page.click("#key-open")
    page.wait_for_selector("#gate:visible")
    assert page.locator(".card").count() == 0
    other, plain, _ = keys.create("other")
    page.fill("#key", plain)
    page.press("#key", "Enter")
    page.wait_for_selector("#gallery-empty:visible")
    assert page.input_value("#prompt") == ""
    keys.revoke(other.id)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("#key-error:not(:empty)")
    assert page.text_content("#key-error") == "The key is no longer valid."


def test_a_telephone(desk: Desk, redis: RedisClient) -> None:
    """Nothing is wider than the screen, whatever is open and however long a word is."""
    page = desk.page(width=390, height=844)
    desk.enter(page)
    page.emulate_media(color_scheme="dark")
    page.fill("#prompt", "\N{WATERMELON}" * 1999)  # two of JavaScript's units each
    assert page.text_content("#prompt-count") == "1999 / 2000"
    assert page.evaluate("document.querySelectorAll('#form output, #form [aria-live]').length") == 0
    page.keyboard.press("End")
    page.keyboard.type("ab")
    assert page.text_content("#prompt-count") == "2001 / 2000"
    page.fill("#prompt", "x" * 300)
    page.click("#details summary")
    page.click(".command summary")
    page.click("#submit")
    page.wait_for_selector("#working:visible")
    page.wait_for_selector(".queue-item")
    assert page.evaluate(WIDTH) <= 0
    unnamed = [
        line
        for line in page.locator("body").aria_snapshot().splitlines()
        if line.strip() in ("- button", "- textbox", "- combobox", "- slider", "- link", "- img")
    ]
    assert unnamed == [], "a screen reader has a name for everything that can be used"
    page.goto(f"{desk.url}/docs")
    page.wait_for_selector("summary:has-text('Submit a job')")
    assert page.evaluate(WIDTH) <= 0
