"""Old and new code on one queue: an older node gets what it can run, and leaves the rest for a newer one."""

import json
from typing import Any

from jobs.job import LATER, SCHEMA, Lora, ModelCard, VideoRequest, VideoResult, jsonable
from jobs.quality import listed
from tests.jobs.conftest import MakeStore
from tests.support.jobs import card, new_job, result, video_request

FIRST = {  # a request's fields in schema 1; a later one belongs into LATER
    "prompt", "negative_prompt", "model", "size", "frame_num", "shift", "sampling_steps", "guide_scale",
    "seed", "sample_solver", "image",
}  # fmt: skip
NEW_IN_RESULTS = {"quality", "steps_computed", "steps_reused", "guidance_reused", "attention_reused"}


def test_every_later_field_has_its_schema() -> None:
    assert VideoRequest.model_fields.keys() == FIRST | LATER.keys()
    assert not FIRST & LATER.keys()
    assert all(1 < schema <= SCHEMA for schema in LATER.values())


def test_a_job_without_later_fields_is_an_older_nodes(make_store: MakeStore) -> None:
    """An older node refuses fields that it doesn't know, so they must not be there."""
    store = make_store()
    client: Any = store.redis
    plain, _ = store.submit(new_job())
    assert {*json.loads(client.execute_command("GET", f"reel:body:{plain.id}"))["request"]} == FIRST
    taken = store.claim("tiny", "old", schema=1)
    assert taken is not None
    assert (taken.id, taken.schema_, taken.request) == (plain.id, 1, plain.request)


def test_a_job_with_a_later_field_waits_for_a_newer_node(make_store: MakeStore) -> None:
    store = make_store()
    for schema, request in (
        (2, video_request(loras=(Lora(name="ink"),))),
        (3, video_request(quality="8bit")),
    ):
        job, _ = store.submit(new_job(request=request))
        assert store.claim("tiny", "old", schema=schema - 1) is None
        taken = store.claim("tiny", "new")
        assert taken is not None
        assert (taken.id, taken.schema_, taken.request) == (job.id, schema, request)


def test_a_result_and_a_card_of_an_older_node_are_read() -> None:
    old = {name: value for name, value in jsonable(result()).items() if name not in NEW_IN_RESULTS}
    assert VideoResult.model_validate(old).steps_computed is None
    assert VideoResult.model_validate(old).quality == "lossless"
    of_card = {name: value for name, value in jsonable(card()).items() if name != "presets"}
    assert [preset.name for preset in listed(ModelCard.model_validate(of_card).presets)] == ["lossless"]


def test_a_job_of_a_newer_api_is_shown_and_not_run(make_store: MakeStore) -> None:
    store = make_store()
    client: Any = store.redis
    job, _ = store.submit(new_job())
    body = json.loads(client.execute_command("GET", f"reel:body:{job.id}"))
    body["request"]["camera"] = "orbit"
    client.execute_command("SET", f"reel:body:{job.id}", json.dumps(body))
    client.execute_command("HSET", f"reel:job:{job.id}", "schema", SCHEMA + 1)
    assert store.get(job.id).request == job.request
    assert [row.id for row in store.list("*")[0]] == [job.id]
    assert store.claim("tiny", "n") is None
