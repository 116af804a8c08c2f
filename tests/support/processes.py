"""Which processes belong to a test: by a mark in the environment they inherit, or by where they work."""

import contextlib
import os
from pathlib import Path


def marked(mark: str, folder: Path | None = None) -> list[int]:
    """Living processes but this one that carry `mark` (NAME=value), or that work in `folder`.

    The folder finds those that overwrite their environment with a new title, as redis-server and Ray's do.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
                continue
            if folder is not None and (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
    return found
