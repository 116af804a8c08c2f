"""Reading files without us: the baseline of every loading figure."""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 16 << 20  # bytes a read


def drop(paths: Iterable[Path]) -> None:
    """Have the page cache forget these files, so that the next read is the disk's."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


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
