"""The page in a real Chromium. The tests touch the page alone; a worker plays the node through the store."""

from typing import Any

import pytest

from jobs.client import RedisClient
from jobs.keys import KeyStore
from tests.api.conftest import finish
from tests.api.desk import PROMPT, WIDTH, Desk, eventually, plays
from tests.api.desk import chromium as chromium  # the fixtures, as these tests find them
from tests.api.desk import desk as desk
from tests.api.desk import files as files
from tests.support.jobs import new_job

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


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
    assert second.evaluate("document.getElementById('screen').style.aspectRatio") == "", "no video, no shape"
    first.reload()
    first.wait_for_selector("#idle:visible")
    assert first.locator(".card").count() == 0


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
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    desk.enter(page)
    page.emulate_media(color_scheme="dark")
    page.fill("#prompt", "\N{WATERMELON}" * 1999)  # two of JavaScript's units each
    assert page.text_content("#prompt-count") == "1999 / 2000", "counted before the models are known"
    assert "\N{WATERMELON}" in (page.text_content("#curl") or "")
    eventually(lambda: page.evaluate("true") and bool(held))
    held[0].continue_()
    page.wait_for_selector("#submit:enabled")
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
