"""The parallel benchmark's other parts: the VAE in stripes, the text encoder, and the link itself."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import UMT5EncoderModel

from benchmarks._layouts import Bench, Contestant
from benchmarks._measure import profile_kernels
from benchmarks._random_vae import random_vae
from benchmarks._text_shards import shard_encoder
from benchmarks._together import shared, together
from engine.parallel.exchange import Traffic
from engine.parallel.frames import StripedFrame
from engine.parallel.text import broadcast_texts
from engine.pipeline import to_uint8
from engine.umt5 import umt5_config
from engine.vae_blocks import Space, WholeFrame
from engine.vae_graph import Recordings
from kernels.qk_norm_rope import SendLayout


def link(bench: Bench, parts: int, transport: str, seconds: float) -> dict[str, Any]:
    """Rate of one rank's sends when nothing else runs: all pieces of q of a share of `parts` to the peer."""
    tokens = -(-math.prod(bench.grid) // parts)
    config = bench.config
    layout = SendLayout.of(config.num_heads, parts)
    traffic = Traffic(1, tokens, layout, config.head_dim, bench.dtype, bench.device)
    carrier = bench.transport(Contestant(f"1x{parts}", transport, share=True))
    x = torch.randn(1, tokens, config.num_heads, config.head_dim, device=bench.device).to(bench.dtype)
    sent = traffic.bytes * (parts - 1) / parts

    def step(packed: bool = True) -> Tensor:
        exchange = carrier.exchange(traffic, 0)
        exchange.send("q", x, packed)
        exchange.receive("q", 0)
        exchange.send_back(0, received)
        return exchange.receive_back(0)

    received = torch.randn(traffic.received(0), device=bench.device).to(bench.dtype)
    timed = together(step, seconds, bench.device, parts=False)
    return {"mb": sent / 1e6, "ms_both_ways": timed.ms, "gb_s": 2 * sent / timed.ms / 1e6} | {
        "transport": transport,
        "share_of": parts,
    }


class Decoder:
    """The VAE with random weights, latents for it, and the ways to hold their frames."""

    def __init__(self, bench: Bench, frames: int, rows: int, columns: int) -> None:
        self.device = bench.device
        self.model = random_vae(bench.device)
        dtype = next(self.model.parameters()).dtype
        latents = torch.randn(1, 16, frames, rows, columns, generator=torch.Generator().manual_seed(2))
        self.latents = latents.to(bench.device, dtype)
        self.spaces: dict[str, Space] = {"one rank": WholeFrame()}
        if bench.world > 1:
            self.spaces[f"{bench.world} ranks"] = StripedFrame(None, rows, columns)

    def decode(self, space: Space) -> list[Tensor]:
        """The levels, on rank 0's host."""
        chunks = []
        for chunk in self.model.decode_chunks(self.latents, space):
            levels = space.collect(to_uint8(chunk[0]))
            if levels is not None and dist.get_rank() == 0:
                host = torch.empty(levels.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
                chunks.append(host.copy_(levels, non_blocking=True))
        return chunks


def vae(bench: Bench, seconds: float, frames: int, rows: int, columns: int) -> dict[str, Any]:
    """Decode and encode on one rank (all do the same) and in stripes over all, and how far the pixels differ.

    Decoding includes the levels' way to rank 0 and to the host.
    """
    decoder, device = Decoder(bench, frames, rows, columns), bench.device
    model, spaces, dtype = decoder.model, decoder.spaces, decoder.latents.dtype
    video = torch.rand(1, 3, 4 * frames - 3, 8 * rows, 8 * columns, device=device, dtype=dtype) * 2 - 1
    dist.broadcast(video, 0)
    pixels = {name: decoder.decode(space) for name, space in spaces.items()}
    encoded = {name: model.encode(video, space) for name, space in spaces.items()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    one, many = (list(pixels.values()) * 2)[:2]
    found: dict[str, Any] = {"decode psnr_db": psnr(one, many), "stripes_equal": equal(one, many)}
    a, b = (latents.double() for latents in (list(encoded.values()) * 2)[:2])
    found["encode relative error"] = float((a - b).norm() / a.norm())
    for name, space in spaces.items():
        decoding: Callable[[], object] = lambda space=space: decoder.decode(space)  # noqa: E731
        encoding: Callable[[], object] = lambda space=space: model.encode(video, space)  # noqa: E731
        found[f"decode, {name}"] = together(decoding, seconds, device, warm=0, parts=False).json()
        found[f"encode, {name}"] = together(encoding, seconds / 2, device, warm=0, parts=False).json()
        if device.type == "cuda":
            found[f"kernels, {name}"] = dict(list(profile_kernels(decoding, 1).items())[:20])  # ms
    return found | {f"{what} speed-up": speed_up(found, what, spaces) for what in ("decode", "encode")}


def vae_recorded(bench: Bench, seconds: float, frames: int, rows: int, columns: int) -> dict[str, Any]:
    """Decode with each chunk replayed as a CUDA graph, held to the same without."""
    decoder, found = Decoder(bench, frames, rows, columns), dict[str, Any]()
    for name, space in decoder.spaces.items():
        want = decoder.decode(space)
        decoder.model.recordings = Recordings()
        found[f"equal, {name}"] = equal(want, decoder.decode(space))
        again: Callable[[], object] = lambda space=space: decoder.decode(space)  # noqa: E731
        found[f"decode, {name}"] = together(again, seconds, bench.device, warm=0, parts=False).json()
        decoder.model.recordings = None
    return found | {"decode speed-up": speed_up(found, "decode", decoder.spaces)}


def speed_up(found: dict[str, Any], what: str, spaces: Iterable[str]) -> float:
    """One rank's time over that of all; 1 where there is one rank."""
    times = [found[f"{what}, {name}"]["ms"] for name in spaces]
    return float(times[0] / times[-1])


def psnr(one: list[Tensor], many: list[Tensor]) -> float:
    """Of 8-bit levels, in dB; infinite where all are equal, NaN on ranks that have none."""
    if not one:
        return math.nan
    squared = torch.cat(
        [(a.double() - b.double()).square().flatten() for a, b in zip(one, many, strict=True)]
    )
    mean = float(squared.mean())
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


def equal(one: list[Tensor], many: list[Tensor]) -> bool:
    """Whether all levels are the same."""
    return bool(one) and all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def text(bench: Bench, tokens: int, repetitions: int = 10) -> dict[str, Any]:
    """Two prompts on every rank, against one rank each with a broadcast, against sharded over all ranks."""
    cuda, device = bench.device.type == "cuda", bench.device
    sizes = (256_384, 4096, 4096, 10_240, 64, 24) if cuda else (384, 64, 64, 128, 8, 2)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(device):
            umt5 = UMT5EncoderModel(umt5_config(*sizes)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    ids = [torch.randint(sizes[0], (1, tokens), device=device) for _ in range(2)]
    for each in ids:
        dist.broadcast(each, 0)

    def encode(number: int) -> Tensor:
        hidden: Tensor = umt5(input_ids=ids[number], attention_mask=torch.ones_like(ids[number]))[0]
        return hidden[0]

    def everywhere() -> list[Tensor]:
        return [encode(0), encode(1)]

    def spread() -> list[Tensor]:
        shape = (tokens, sizes[1])
        return broadcast_texts(encode, 2, shape, torch.empty(0, dtype=bench.dtype, device=device))

    found: dict[str, Any] = {"tokens": tokens}
    ways: dict[str, Callable[[], list[Tensor]]] = {"on every rank": everywhere}
    if bench.world > 1:
        ways["one rank a prompt, broadcast"] = spread
    whole = everywhere()
    for name, way in ways.items():
        found[name] = _milliseconds(way, repetitions, device)
    if bench.world > 1 and sizes[4] % bench.world == 0:
        shard_encoder(umt5)
        sharded = everywhere()
        found["sharded over all ranks"] = _milliseconds(everywhere, repetitions, device)
        error = max(
            float((a - b).double().norm() / a.double().norm()) for a, b in zip(whole, sharded, strict=True)
        )
        found["sharded, relative error"] = error
    return found


def _milliseconds(call: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """The slowest rank's mean time of a call that is waited for."""
    call()
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(repetitions):
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return shared((time.perf_counter() - begin) * 1e3 / repetitions, device)
