"""The baseline of api_submit: FastAPI doing nothing but one Redis round trip a request."""

import os
from typing import Any

import redis.asyncio
from fastapi import FastAPI

app = FastAPI()
client = redis.asyncio.Redis.from_url(os.environ["REEL_REDIS_URL"])


@app.post("/", status_code=202)
async def submit(body: dict[str, Any]) -> dict[str, str]:
    """Store something small and answer."""
    await client.set("bare", str(body["seed"]))
    return {"id": "x"}
