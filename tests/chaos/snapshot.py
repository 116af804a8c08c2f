"""The final store, as the checker sees it: everything in Redis and S3, read without our own store's code."""

import json
from pathlib import Path
from typing import Any

from jobs.settings import Settings
from jobs.storage import ObjectStore


def snapshot(redis: Any, settings: Settings | None, runs: Path | None) -> dict[str, Any]:
    """Jobs by id, with events and deliveries; leases, lanes, counters; keys and their TTL; objects.

    settings: to reach S3; None: none was used. runs: the chaos engine's notes.
    """
    keys = sorted(str(key) for key in redis.scan_iter(count=1000))
    named = [key.removeprefix("reel:") for key in keys]
    jobs = {name[4:]: _job(redis, name[4:]) for name in named if name.startswith("job:")}
    found: dict[str, Any] = {
        "jobs": jobs,
        "keys": keys,
        "ttl": {key: redis.ttl(key) for key in keys if _may_expire(key)},
        "leases": {name: redis.zrange(f"reel:{name}", 0, -1) for name in named if name.startswith("leases:")},
        "lanes": {name: redis.zrange(f"reel:{name}", 0, -1) for name in named if name.startswith("lane:")},
        "counters": {
            name: redis.hgetall(f"reel:{name}") for name in named if name.startswith(("waiting:", "running:"))
        },
        "dead": redis.zrange("reel:dead", 0, -1),
        "outbox": redis.zrange("reel:outbox", 0, -1),
        "retention": redis.zrange("reel:retention", 0, -1),
        "objects": {},
        "uploads": [],
        "runs": {},
    }
    if settings is not None:
        store = ObjectStore(settings)
        found["objects"] = _objects(store)
        found["uploads"] = [
            one["Key"] for one in store._client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
        ]
    if runs is not None:
        found["runs"] = {path.name: [line.split()[0] for line in path.open()] for path in runs.iterdir()}
    return found


def _may_expire(key: str) -> bool:
    passing = ("claim", "operation", "wake", "idem", "gone", "drain", "node")
    return key == "reel:fence" or key.startswith(tuple(f"reel:{name}:" for name in passing))


def _job(redis: Any, job_id: str) -> dict[str, Any]:
    record = redis.hgetall(f"reel:job:{job_id}")
    deliveries = [
        {
            name: one[name]
            for name in ("id", "event", "state", "status", "attempts", "error", "url")
            if name in one
        }
        for one in (
            redis.hgetall(f"reel:delivery:{delivery}")
            for delivery in redis.lrange(f"reel:deliveries:{job_id}", 0, -1)
        )
    ]
    events = [
        {"ms": int(event_id.split("-")[0]), "type": fields["type"], **_short(json.loads(fields["data"]))}
        for event_id, fields in redis.xrange(f"reel:events:{job_id}")
        if fields["type"] != "job.progress"
    ]
    body = json.loads(redis.get(f"reel:body:{job_id}") or "{}")
    return {
        "state": record.get("state"),
        "attempts": int(record.get("attempts", 0)),
        "token": int(record.get("token", 0)),
        "deadline": record.get("deadline_at") or None,
        "result": json.loads(record["result"]) if record.get("result") else None,
        "error": json.loads(record["error"]) if record.get("error") else None,
        "hooks": record.get("hooks", ""),
        "request": body.get("request", {}),
        "events": events,
        "deliveries": deliveries,
    }


def _short(data: dict[str, Any]) -> dict[str, Any]:
    reason = data.get("reason") or data.get("error") or {}
    return {"attempts": data["attempts"], "state": data["state"], "why": reason.get("failure_class")}


def _objects(store: ObjectStore) -> dict[str, dict[str, Any]]:
    pages = store._client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix="jobs/")
    return {one["Key"]: {"bytes": one["Size"]} for page in pages for one in page.get("Contents", [])}
