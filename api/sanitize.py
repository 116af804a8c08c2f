"""Runs `image_process` on untrusted bytes, and `image_fetch` on untrusted URLs: another process, a clean
environment, limited time and memory.
"""

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from jobs.settings import Settings

SCRIPT = Path(__file__).with_name("image_process.py")
SECONDS = 30.0  # wall time, with a busy machine in mind; the process itself gets 20 s of CPU
AT_ONCE = 2  # decoders in parallel; more images wait
FETCHES_AT_ONCE = 8  # downloads in parallel, which cost little but time; more wait
FETCHES_A_KEY = 2  # so that one key's slow servers don't take all of them


class ImageRefusedError(ValueError):
    """The bytes are not an image that we take; the text says why, for the client."""


class TooManyFetches(Exception):
    """The key has FETCHES_A_KEY images on their way."""


class CleanImage(NamedTuple):
    """A picture that we wrote ourselves."""

    width: int
    height: int
    png: bytes


_slots = asyncio.Semaphore(AT_ONCE)
_downloads = asyncio.Semaphore(FETCHES_AT_ONCE)
_by_key: Counter[str] = Counter()


async def clean_image(data: bytes, max_pixels: int) -> CleanImage:
    """Decode `data` apart from this process and return it re-encoded. Raises ImageRefusedError."""
    if not data:
        raise ImageRefusedError("it is empty")
    async with _slots, _child(str(SCRIPT), str(max_pixels)) as process:
        return await _picture(process, data)


async def fetch_image(url: str, settings: Settings, key_id: str) -> CleanImage:
    """Fetch and decode the image behind `url` apart from this process.

    Raises ImageRefusedError, and TooManyFetches when this key has too many under way.
    """
    if _by_key[key_id] >= FETCHES_A_KEY:
        raise TooManyFetches
    _by_key[key_id] += 1
    order = {
        "url": url,
        "max_bytes": settings.max_upload_bytes,
        "max_pixels": settings.max_image_pixels,
        "allow_loopback": settings.allow_loopback_callbacks,
        "allowed_hosts": sorted(settings.local_hosts),
    }
    try:
        async with _downloads, _child("-m", "api.image_fetch") as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(order).encode() + b"\n")
            with contextlib.suppress(TimeoutError):  # it has its own, shorter limit and says so
                await asyncio.wait_for(process.stdout.readline(), SECONDS)
            async with _slots:  # only decoding takes memory
                return await _picture(process, b"\n")
    finally:
        _by_key[key_id] -= 1
        if not _by_key[key_id]:
            del _by_key[key_id]


@contextlib.asynccontextmanager
async def _child(*args: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process with none of our settings or secrets; killed at the end if it still runs.

    -I and an empty environment: no user site, no PYTHON* variables, nothing from ours.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", *args, env={"LANG": "C.UTF-8"}, cwd="/",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _picture(process: asyncio.subprocess.Process, data: bytes) -> CleanImage:
    """Send `data` and read the picture that comes back. Raises ImageRefusedError."""
    try:
        out, errors = await asyncio.wait_for(process.communicate(data), SECONDS)
    except TimeoutError:
        raise ImageRefusedError(f"decoding it takes longer than {SECONDS:g} s") from None
    if process.returncode == 2:
        raise ImageRefusedError(errors.decode("utf-8", "replace").strip()[:200])
    if process.returncode != 0:  # killed by a limit, or the decoder crashed
        raise ImageRefusedError("decoding it takes more memory or time than is allowed")
    head, _, png = out.partition(b"\n")
    size = json.loads(head)
    return CleanImage(size["width"], size["height"], png)
