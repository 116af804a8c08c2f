"""The page's form in a real Chromium: presets and LoRAs, seeds, the first image, and errors at fields."""

import pytest

from jobs.job import Lora
from jobs.nodes import NodeRegistry
from jobs.quality import PresetCard
from jobs.timings import Timings
from tests.api.desk import PROMPT, WIDTH, Desk, eventually
from tests.api.desk import chromium as chromium  # the fixtures, as these tests find them
from tests.api.desk import desk as desk
from tests.api.desk import files as files
from tests.support.jobs import card, video_request

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


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
