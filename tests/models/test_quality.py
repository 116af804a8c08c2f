"""The quality command: what it asks of the engine, and how it goes on after a cut."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.quality import Setting, Worker, measure, summary
from models.demo.train.captions import held_out_prompts, known_prompts
from models.demo.train.common import MODEL_DIR
from models.demo.train.world import thing_is_held_out

SETTING = Setting(MODEL_DIR, MODEL_DIR, 5, 128, 1, '{"sampling_steps": 2, "guide_scale": [1.0]}')


def test_a_caption_is_made_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trained model with what is asked: two steps and no guidance leave the defaults."""
    made: list[Any] = []
    monkeypatch.setattr(Worker, "loaded", None)
    resolve = quality.resolve
    monkeypatch.setattr(quality, "resolve", lambda *a, **k: made.append(resolve(*a, **k)) or made[-1])
    pairs = [(scene, caption.text) for scene, caption in held_out_prompts(1)]
    rows = measure(pairs, tmp_path / "rows.jsonl", SETTING, processes=1)
    request = made[0]
    assert (request.seed, request.sampling_steps, request.guide_scale) == (0, 2, (1.0, 1.0))
    assert rows[0]["generated"].keys() == rows[0]["drawn"].keys()
    found = summary(rows)
    assert found["captions"] == 1
    assert found["vae_psnr_db"] > 25


def test_a_cut_run_goes_on_with_its_own_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other captions, or made with other settings, are not taken for this run's."""
    asked: list[int] = []

    def row(task: tuple[Setting, int, Any, str]) -> dict[str, Any]:
        setting, index, _, prompt = task
        asked.append(index)
        return {"seed": index, "prompt": prompt, "asked": json.loads(setting.asked)}

    monkeypatch.setattr(Worker, "row", row)
    pairs = [(scene, caption.text) for scene, caption in held_out_prompts(3)]
    log = tmp_path / "rows.jsonl"
    measure(pairs[:2], log, SETTING, 1)
    assert asked == [0, 1]
    measure(pairs, log, SETTING, 1)
    assert asked == [0, 1, 2]  # the third alone is new
    measure(pairs, log, Setting(MODEL_DIR, MODEL_DIR, 5, 128, 1), 1)
    assert asked == [0, 1, 2, 0, 1, 2]
    measure([(pairs[0][0], "another prompt")], log, SETTING, 1)
    assert asked[6:] == [0]


def test_settings_are_chosen_on_other_captions_than_they_are_judged_on() -> None:
    known, unseen = known_prompts(200), held_out_prompts(200)
    assert [caption.text for _, caption in known] == [caption.text for _, caption in known_prompts(200)]
    assert not {caption.text for _, caption in known} & {caption.text for _, caption in unseen}
    assert not any(thing_is_held_out(thing) for scene, _ in known for thing in scene.things)
    assert all(any(thing_is_held_out(thing) for thing in scene.things) for scene, _ in unseen)
