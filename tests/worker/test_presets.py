"""What a finished job's record says of its preset."""

from dataclasses import asdict

from engine.config import Work
from jobs.job import VideoResult
from tests.support.jobs import result
from worker.presets import made
from worker.video import VideoFacts


def facts(**manifest: object) -> VideoFacts:
    return VideoFacts("job_x", 64, 48, 5, 16.0, 1, "0", {}, manifest)


def test_the_record_names_the_preset_and_what_it_left_out() -> None:
    found = made(facts(work=asdict(Work("8bit-cache", 14, 6, 3, 2))))
    expected = {"steps_computed": 14, "steps_reused": 6, "guidance_reused": 3, "attention_reused": 2}
    assert found == {"quality": "8bit-cache", **expected}
    stored = VideoResult.model_validate({**result().model_dump(), **found})
    assert (stored.quality, stored.steps_computed, stored.steps_reused) == ("8bit-cache", 14, 6)


def test_a_video_that_an_older_node_left_in_the_spool_was_lossless() -> None:
    nothing = {"steps_reused": 0, "guidance_reused": 0, "attention_reused": 0}
    assert made(facts()) == {"quality": "lossless", "steps_computed": None, **nothing}
