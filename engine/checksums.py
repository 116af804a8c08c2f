"""Checksums of a checkpoint's files, when the operator asks for them: slow, so never by default.

Known sums come from a `SHA256SUMS` in the folder (as `sha256sum` writes it), or from what `hf download
--local-dir` leaves beside the files: `.cache/huggingface/download/<file>.metadata`, whose second line is the
file's entity tag, the SHA-256 of every large file (and a git hash, which is no checksum here, of small ones).
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from engine.errors import CheckpointError
from engine.parallel.mesh import Mesh

log = logging.getLogger(__name__)
SHA256 = re.compile(r"[0-9a-f]{64}")
PATIENCE = 3600.0  # seconds that one rank may hash longer than another
BLOCK = 4 << 20  # bytes hashed at a time


def known_sums(folder: Path) -> dict[Path, str]:
    """SHA-256 by file, as the folder tells. Raises CheckpointError where it tells none, or tells nonsense."""
    sums: dict[Path, str] = {}
    listed = folder / "SHA256SUMS"
    if listed.exists():
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            digest, _, name = line.strip().partition(" ")
            name = name.strip().removeprefix("*")
            if not SHA256.fullmatch(digest) or not name:
                raise CheckpointError(f"{listed}, line {number} is not '<sha256>  <file>': {line[:80]!r}")
            sums[folder / name] = digest
    else:
        cache = folder / ".cache" / "huggingface" / "download"
        for path in sorted(cache.rglob("*.metadata")):
            lines = path.read_text(encoding="utf-8").split()
            if len(lines) > 1 and SHA256.fullmatch(lines[1].strip('"')):
                sums[folder / path.relative_to(cache).with_suffix("")] = lines[1].strip('"')
    if not sums:
        raise CheckpointError(
            f"{folder} has no checksums to verify: neither SHA256SUMS nor the metadata of `hf download`. "
            "Make the former from files you trust: sha256sum $(find . -type f) > SHA256SUMS"
        )
    return sums


def verify(folder: Path, mesh: Mesh, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Hash every file that has a known sum, each on one rank; raises CheckpointError on all ranks alike.

    Names every file that is missing or differs, with both sums.
    """
    began = time.perf_counter()
    sums = known_sums(folder)
    # Large files first, dealt out in turn, so that the ranks end at about the same time.
    order = sorted(sums, key=lambda path: -path.stat().st_size if path.exists() else 0)
    faults = []
    for path in order[mesh.rank :: mesh.size]:
        if not path.exists():
            faults.append(f"{path} is not there")
            continue
        found = _sha256(path, on_bytes)
        if found != sums[path]:
            faults.append(f"{path} has SHA-256 {found}, expected {sums[path]}: copy it again")
    faults = _all_faults(faults, mesh)
    if faults:
        raise CheckpointError("; ".join(sorted(faults)))
    log.info("verified %d files in %.1f s", len(sums), time.perf_counter() - began)


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def _all_faults(mine: list[str], mesh: Mesh) -> list[str]:
    if mesh.control is None:
        return mine
    # Files differ in size, so ranks end at different times: wait longer than a collective call may.
    dist.monitored_barrier(mesh.control, timedelta(seconds=PATIENCE))
    every: list[list[str] | None] = [None] * mesh.size
    dist.all_gather_object(every, mine, group=mesh.control)
    return [fault for faults in every for fault in faults or []]
