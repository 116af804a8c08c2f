"""Runs `image_process` on untrusted bytes: another process, a clean environment, limited time and memory."""

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).with_name("image_process.py")
SECONDS = 30.0  # wall time, with a busy machine in mind; the process itself gets 20 s of CPU
AT_ONCE = 2  # decoders in parallel; more uploads wait


class ImageRefusedError(ValueError):
    """The bytes are not an image that we take; the text says why, for the client."""


class CleanImage(NamedTuple):
    """A picture that we wrote ourselves."""

    width: int
    height: int
    png: bytes


_slots = asyncio.Semaphore(AT_ONCE)


async def clean_image(data: bytes, max_pixels: int) -> CleanImage:
    """Decode `data` apart from this process and return it re-encoded. Raises ImageRefusedError."""
    if not data:
        raise ImageRefusedError("it is empty")
    async with _slots:
        # -I and an empty environment: no user site, no PYTHON* variables, none of our settings or secrets.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(SCRIPT), str(max_pixels), env={"LANG": "C.UTF-8"}, cwd="/",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            out, errors = await asyncio.wait_for(process.communicate(data), SECONDS)
        except TimeoutError:
            raise ImageRefusedError(f"decoding it takes longer than {SECONDS:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
    if process.returncode == 2:
        raise ImageRefusedError(errors.decode("utf-8", "replace").strip()[:200])
    if process.returncode != 0:  # killed by a limit, or the decoder crashed
        raise ImageRefusedError("decoding it takes more memory or time than is allowed")
    head, _, png = out.partition(b"\n")
    size = json.loads(head)
    return CleanImage(size["width"], size["height"], png)
