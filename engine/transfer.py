"""Tensors from mapped files to the device: each byte read by one rank only, cast there, then gathered.

Files are cut into buckets of `BUCKET` bytes. Of each bucket every rank reads its own part (threads copy it
from the mapping into a staging buffer, pinned on a GPU, while earlier buckets are on their way), casts it on
the device, and an all-gather gives it to the others. So a node reads a checkpoint once, not once a rank, and
never needs memory for more than a few buckets beside the weights themselves.
"""

import math
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.parallel.collectives import all_gather
from engine.parallel.mesh import Mesh

BUCKET = 128 << 20  # bytes in the file
THREADS = 8  # that copy out of the mapping: one alone waits for the disk most of the time
AHEAD = 3  # buckets being read while one is on its way to the device


@dataclass(frozen=True)
class Source:
    """One tensor's elements in a mapped file."""

    name: str
    elements: Tensor  # flat, in the file's dtype
    shape: tuple[int, ...]
    dtype: torch.dtype  # wanted
    prefetch: Callable[[int, int], None]  # (first element, count): ask the kernel to read ahead


@dataclass(frozen=True)
class Span:
    """A run of one tensor's elements."""

    source: Source
    start: int
    stop: int


class Files:
    """Files mapped for reading, once each; private, so nothing can be written back."""

    def __init__(self) -> None:
        self._maps: dict[Path, Tensor] = {}
        self._handles: dict[Path, int] = {}

    def elements(
        self, path: Path, dtype: torch.dtype, offset: int, count: int
    ) -> tuple[Tensor, Callable[[int, int], None]]:
        """`count` elements from byte `offset` on, without reading them, and their prefetch."""
        if path not in self._maps:
            self._handles[path] = os.open(path, os.O_RDONLY)
            mapped = mmap.mmap(self._handles[path], 0, access=mmap.ACCESS_COPY)
            if hasattr(mmap, "MADV_SEQUENTIAL"):
                mapped.madvise(mmap.MADV_SEQUENTIAL)
            self._maps[path] = torch.frombuffer(mapped, dtype=torch.uint8)
        handle, size = self._handles[path], dtype.itemsize

        def prefetch(first: int, many: int) -> None:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, offset + first * size, many * size, os.POSIX_FADV_WILLNEED)

        if count == 0:
            return torch.empty(0, dtype=dtype), prefetch
        raw = self._maps[path][offset : offset + count * size]
        # A header of odd length leaves the data unaligned, which `view` refuses and `frombuffer` does not.
        return torch.frombuffer(raw.numpy(), dtype=dtype), prefetch

    def close(self) -> None:
        """Forget the mappings; they end when no tensor uses them any more."""
        self._maps.clear()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


@dataclass
class Meter:
    """What was read, by whom, in what time."""

    total: int = 0  # bytes in the files
    own: int = 0  # of them, read by this rank
    began: float = 0.0
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator["Meter"]:
        """Times the block."""
        self.began = time.perf_counter()
        yield self
        self.seconds = time.perf_counter() - self.began

    @property
    def rate(self) -> float:
        """GB/s of the node."""
        return self.total / max(self.seconds, 1e-9) / 1e9


def read(
    sources: Sequence[Source],
    device: torch.device,
    mesh: Mesh,
    meter: Meter,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Every source as a tensor of its wanted dtype on `device`, on every rank of the mesh.

    `on_bytes` hears of the bytes of each bucket. A collective call when the mesh has more than one rank.
    """
    done = {s.name: torch.empty(s.shape, dtype=s.dtype, device=device) for s in sources}
    flat = {name: tensor.view(-1) for name, tensor in done.items()}
    buckets = list(_buckets(sources, mesh.size))
    with ThreadPoolExecutor(THREADS, "weights") as pool:
        stages = deque(_Stage(device) for _ in range(AHEAD))
        waiting: deque[tuple[list[Span], _Stage]] = deque()
        for index in range(len(buckets) + AHEAD - 1):
            if index < len(buckets):
                stage = stages.popleft()
                stage.start(pool, buckets[index], mesh.rank, mesh.size)
                waiting.append((buckets[index], stage))
            if index >= AHEAD - 1:
                bucket, stage = waiting.popleft()
                mine = stage.finish()
                meter.own += stage.bytes_read
                whole = all_gather(mine.view(torch.uint8), None).view(-1) if mesh.size > 1 else mine
                _scatter(whole.view(bucket[0].source.dtype), bucket, flat)
                stages.append(stage)
                size = sum((s.stop - s.start) * s.source.elements.itemsize for s in bucket)
                meter.total += size
                on_bytes(size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done


def _buckets(sources: Iterable[Source], ranks: int) -> Iterator[list[Span]]:
    """Runs of elements that share both dtypes, each of about BUCKET bytes in the file."""

    def kinds(source: Source) -> tuple[str, str]:
        return str(source.elements.dtype), str(source.dtype)

    for _, group in groupby(sorted(sources, key=kinds), kinds):  # stable: the files' order is kept
        bucket: list[Span] = []
        room = 0
        for source in group:
            start, count = 0, source.elements.numel()
            while start < count:
                if not room:
                    if bucket:
                        yield bucket
                    bucket, room = [], max(BUCKET // source.elements.itemsize, 1)
                stop = min(count, start + room)
                bucket.append(Span(source, start, stop))
                room -= stop - start
                start = stop
        if bucket:
            yield bucket


def _part(bucket: Sequence[Span], rank: int, ranks: int) -> tuple[int, list[tuple[int, Span]]]:
    """(elements a rank, padding included; this rank's spans, each with its place in the part)."""
    total = sum(span.stop - span.start for span in bucket)
    part = math.ceil(total / ranks)
    first, last = rank * part, min((rank + 1) * part, total)
    mine, at = [], 0
    for span in bucket:
        start, stop = max(first, at), min(last, at + span.stop - span.start)
        if start < stop:
            shift = span.start - at
            mine.append((start - first, Span(span.source, start + shift, stop + shift)))
        at += span.stop - span.start
    return part, mine


def _scatter(whole: Tensor, bucket: Sequence[Span], flat: dict[str, Tensor]) -> None:
    """Copy a bucket's elements to where their tensors are."""
    at = 0
    for span in bucket:
        count = span.stop - span.start
        flat[span.source.name][span.start : span.stop].copy_(whole[at : at + count])
        at += count


class _Stage:
    """A staging buffer and the copies that are filling it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes_read = 0
        self._buffer: Tensor | None = None
        self._copied: torch.cuda.Event | None = None  # when the device has taken the buffer's content
        self._futures: list[Future[None]] = []
        self._dtype = torch.float32
        self._used = Tensor()

    def start(self, pool: ThreadPoolExecutor, bucket: Sequence[Span], rank: int, ranks: int) -> None:
        """Begin to read this rank's part of a bucket."""
        if self._copied is not None:
            self._copied.synchronize()
        part, spans = _part(bucket, rank, ranks)
        source = bucket[0].source
        on_gpu = self.device.type == "cuda"
        # A GPU casts faster than the CPU's threads could, and the buffer must be pinned for its copies.
        kept = source.elements.dtype if on_gpu else source.dtype
        size = part * kept.itemsize
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._used, self._dtype = self._buffer[:size].view(kept), source.dtype
        self.bytes_read = sum((s.stop - s.start) * source.elements.itemsize for _, s in spans)
        step = max(1, math.ceil(part / THREADS))
        self._futures = []
        for at, span in spans:
            for start in range(span.start, span.stop, step):
                stop = min(start + step, span.stop)
                place = at + start - span.start
                target = self._used[place : place + stop - start]
                self._futures.append(pool.submit(_copy, span.source, start, stop, target))

    def finish(self) -> Tensor:
        """This rank's part on the device in the wanted dtype, once it is read."""
        for future in self._futures:
            future.result()
        if self.device.type != "cuda":
            return self._used
        raw = self._used.to(self.device, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()
        return raw.to(self._dtype)


def _copy(source: Source, start: int, stop: int, target: Tensor) -> None:
    """Read elements from the mapping into `target`, casting where its dtype differs."""
    source.prefetch(start, stop - start)
    elements = source.elements[start:stop]
    if elements.dtype == target.dtype:  # numpy copies without the GIL and without threads of its own
        np.copyto(target.view(torch.uint8).numpy(), elements.view(torch.uint8).numpy())
    else:
        target.copy_(elements)
