"""Old and new code on one queue: an older node gets what it can run, and leaves the rest for a newer one."""

import json
from typing import Any

from jobs.job import LATER, SCHEMA, Lora, VideoRequest
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job, video_request

FIRST = {  # a request's fields in schema 1; a later one belongs into LATER
    "prompt", "negative_prompt", "model", "size", "frame_num", "shift", "sampling_steps", "guide_scale",
    "seed", "sample_solver", "image",
}  # fmt: skip


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
    request = video_request(loras=(Lora(name="ink"),))
    job, _ = store.submit(new_job(request=request))
    assert store.claim("tiny", "old", schema=1) is None
    taken = store.claim("tiny", "new")
    assert taken is not None
    assert (taken.id, taken.schema_, taken.request) == (job.id, 2, request)


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
