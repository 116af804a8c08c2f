"""What ``POST /v1/jobs`` takes: the video's fields (from `jobs.requests`) and the job's own."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from jobs.job import DEFAULT_WEBHOOK_EVENTS, Priority, WebhookEvent
from jobs.requests import NUMBER_MAX, PROMPT_MAX, SEED_MAX, SHIFT_MIN, VideoRequestIn

DEADLINE_MAX = 30 * 86_400  # seconds
METADATA_MAX = 16  # entries
CALLBACK_MAX = 2048  # characters
MetadataName = Annotated[str, Field(min_length=1, max_length=64)]
MetadataText = Annotated[str, Field(max_length=500)]

EXAMPLE: dict[str, Any] = {
    "prompt": "A red fox trots through fresh snow at dawn, soft light, slow pan",
    "size": "1280*720",
    "frame_num": 81,
    "guide_scale": [3.0, 4.0],
    "seed": 42,
    "metadata": {"ref": "order-1001"},
}


class JobIn(VideoRequestIn):
    """A video to make. Only `prompt` is needed; `GET /v1/models` shows what the rest defaults to."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    priority: Annotated[
        Priority, Field(description="`high` goes first and needs a key with the scope priority_high.")
    ] = Priority.NORMAL
    deadline_seconds: Annotated[
        float | None,
        Field(
            gt=0, le=DEADLINE_MAX, strict=True, description="Not started by then: the job becomes `expired`."
        ),
    ] = None
    callback_url: Annotated[
        str | None,
        Field(
            max_length=CALLBACK_MAX,
            description="Where to post signed webhooks (Standard Webhooks): https, to a public address.",
            examples=["https://example.com/hooks/reel"],
        ),
    ] = None
    webhook_events: Annotated[
        tuple[WebhookEvent, ...],
        Field(min_length=1, max_length=len(WebhookEvent), description="Which events to post."),
    ] = DEFAULT_WEBHOOK_EVENTS
    metadata: Annotated[
        dict[MetadataName, MetadataText],
        Field(
            default_factory=dict,
            max_length=METADATA_MAX,
            description=f"Your own notes: up to {METADATA_MAX} texts. `ref` can be searched for.",
            examples=[{"ref": "order-1001"}],
        ),
    ]


VIDEO_FIELDS = frozenset(VideoRequestIn.model_fields)

# What is allowed, in one sentence a field, where it doesn't depend on the model.
EXPECTED: Mapping[str, str] = {
    "prompt": f"a text of 1 to {PROMPT_MAX} characters",
    "negative_prompt": f"a text of at most {PROMPT_MAX} characters",
    "model": "a model's name, as `GET /v1/models` lists them",
    "size": 'a text "width*height", such as "1280*720"',
    "frame_num": "a whole number 4n+1, such as 81",
    "shift": f"a number from {SHIFT_MIN:g} to {NUMBER_MAX:g}",
    "sampling_steps": "a whole number from 1",
    "guide_scale": f"a number from 0 to {NUMBER_MAX:g}, or a pair [low-noise, high-noise] of them",
    "seed": "a whole number from 0 to 2^63-1",
    "sample_solver": 'a text, "unipc" or "dpm++"',
    "image": "an upload's id (img_...) from POST /v1/uploads, or an https URL",
    "loras": 'a list of {"name": a text, "strength": -10 to 10, "expert": "both", "high" or "low"}',
    "loras.*": '{"name": a text, "strength": -10 to 10, "expert": "both", "high" or "low"}',
    "loras.*.name": "a LoRA's name, as `GET /v1/models` lists them",
    "loras.*.strength": "a number from -10 to 10",
    "loras.*.expert": "one of both, high, low",
    "quality": "a text, one of the model's presets, as `GET /v1/models` lists them",
    "priority": "one of high, normal, low",
    "deadline_seconds": f"a number above 0, at most {DEADLINE_MAX}",
    "callback_url": f"an https URL of at most {CALLBACK_MAX} characters",
    "webhook_events": "a list of " + ", ".join(event.value for event in WebhookEvent),
    "metadata": f"at most {METADATA_MAX} texts by name: names of 1 to 64 characters, texts of at most 500",
}


class EndpointIn(BaseModel):
    """A webhook endpoint to add."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[
        str,
        Field(
            max_length=CALLBACK_MAX,
            description="https, to a public address.",
            examples=["https://example.com/hooks/reel"],
        ),
    ]
    events: Annotated[
        tuple[WebhookEvent, ...],
        Field(min_length=1, max_length=len(WebhookEvent), description="What it wants to hear of."),
    ] = DEFAULT_WEBHOOK_EVENTS
    description: Annotated[str, Field(max_length=200, examples=["orders"])] = ""


class EndpointChange(BaseModel):
    """What to change of an endpoint; what is left out stays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str | None, Field(max_length=CALLBACK_MAX, description="https, to a public address.")] = (
        None
    )
    events: Annotated[tuple[WebhookEvent, ...] | None, Field(min_length=1, max_length=len(WebhookEvent))] = (
        None
    )
    description: Annotated[str | None, Field(max_length=200)] = None
    enabled: Annotated[StrictBool | None, Field(description="`false` silences it.")] = None


ENDPOINT_EXPECTED: Mapping[str, str] = {
    "url": f"an https URL of at most {CALLBACK_MAX} characters",
    "events": EXPECTED["webhook_events"],
    "description": "a text of at most 200 characters",
    "enabled": "true or false",
}


def body_hash(data: Mapping[str, Any]) -> str:
    """A hash of the body's meaning: the order of its fields and its white space don't count."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def job_schema() -> dict[str, Any]:
    """JobIn for the OpenAPI document, with the limits that hold for every model."""
    schema = JobIn.model_json_schema(ref_template="#/components/schemas/{model}")
    limits: dict[str, dict[str, Any]] = {
        "prompt": {"minLength": 1, "maxLength": PROMPT_MAX, "examples": [EXAMPLE["prompt"]]},
        "negative_prompt": {"maxLength": PROMPT_MAX, "examples": ["blurry, text, watermark"]},
        "model": {"examples": ["wan2.2-t2v-a14b"]},
        "size": {"pattern": r"^\d+\*\d+$", "examples": ["1280*720"]},
        "frame_num": {"minimum": 1, "examples": [81]},
        "shift": {"minimum": SHIFT_MIN, "maximum": NUMBER_MAX, "examples": [12.0]},
        "sampling_steps": {"minimum": 1, "examples": [40]},
        "seed": {"minimum": 0, "maximum": SEED_MAX, "examples": [42]},
        "sample_solver": {"enum": ["unipc", "dpm++"]},
        "image": {"examples": ["img_0m7f3c2k9x1v5n8p4q6r7s2t1", "https://example.com/first.jpg"]},
    }
    for name, extra in limits.items():
        field = schema["properties"][name]
        examples = extra.pop("examples", None)
        if examples:
            field["examples"] = examples
        # `null` stands for "left out", so the limits belong to the other branch.
        branches = [branch for branch in field.get("anyOf", [field]) if branch.get("type") != "null"]
        branches[0].update(extra)
    for branch in schema["properties"]["guide_scale"]["anyOf"]:
        if branch.get("type") == "number":
            branch.update(minimum=0, maximum=NUMBER_MAX)
    schema["properties"]["guide_scale"]["examples"] = [4.0, [3.0, 4.0]]
    return schema
