"""Reading files without us: the baseline of every loading figure, and whether a read is the disk's at all."""

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BLOCK = 16 << 20  # bytes a read


def drop(paths: Iterable[Path]) -> None:
    """Have the page cache forget these files, so that the next read is the disk's."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cached(paths: Iterable[Path]) -> float | None:
    """The share of these files' pages that is in memory, by mincore(2); None where it can't be told."""
    pages = resident = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            failed = libc.mincore(
                ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(found.ctypes.data)
            )
            del view
        if failed:
            return None
        pages += len(found)
        resident += int((found & 1).sum())
    return resident / max(pages, 1)


def filesystem(folder: Path) -> str:
    """The kind of filesystem that a folder lies on ("ext4", "tmpfs", ...); "unknown" where nothing says."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    place = str(folder.resolve())
    best, kind = "", "unknown"
    for line in mounts.read_text().splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two at one place the later one hides the other
            best, kind = point, found
    return kind


def in_memory(folder: Path) -> bool:
    """Whether files there never leave memory, so that no read of them is a disk's."""
    return filesystem(folder) in ("tmpfs", "ramfs")


def plain_read(paths: Iterable[Path], threads: int = 1) -> float:
    """GB/s of reading files in 16 MiB reads, each thread with one buffer; a thread takes whole files."""

    def read(path: Path) -> int:
        buffer, size = bytearray(BLOCK), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
        return size

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, paths))
    return total / 1e9 / (time.perf_counter() - began)
