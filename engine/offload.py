"""Weights that don't all stay on the GPU: what the rungs of `engine.memory` do."""

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from engine import fused
from engine.dit import DiT
from engine.dit_block import Block
from engine.memory import BOUNCE, is_sharded
from engine.parallel.mesh import Mesh
from engine.pinned import pinned_copies
from engine.text_encoder import TextEncoder


class PromptEncoder(Protocol):
    """What a pipeline asks of its text encoder."""

    def encode_all(self, prompts: Sequence[str], mesh: Mesh) -> list[Tensor]:
        """[T, E] embeddings of each prompt, on the device of every rank; a collective call of the mesh."""
        ...


class HostTextEncoder:
    """The text encoder on the CPU of rank 0, which sends what it computes to the other ranks."""

    def __init__(self, encoder: TextEncoder | None, width: int, device: torch.device) -> None:
        self.encoder = encoder  # None on the other ranks
        self.width, self.device = width, device

    def encode_all(self, prompts: Sequence[str], mesh: Mesh) -> list[Tensor]:
        """[T, E] embeddings of each prompt; a collective call."""
        return [self._encode(prompt, mesh) for prompt in prompts]

    def _encode(self, prompt: str, mesh: Mesh) -> Tensor:
        if mesh.control is None:
            assert self.encoder is not None
            return self.encoder.encode(prompt).to(self.device)
        shape = torch.zeros(2, dtype=torch.int64)
        text = Tensor()
        if self.encoder is not None:
            text = self.encoder.encode(prompt, mesh.beat).contiguous()
            shape = torch.tensor([text.shape[0], list(DTYPES).index(text.dtype)])
        dist.broadcast(shape, src=0, group=mesh.control)
        if self.encoder is None:
            text = torch.empty(int(shape[0]), self.width, dtype=DTYPES[int(shape[1])])
        dist.broadcast(text.view(torch.uint8), src=0, group=mesh.control)
        return text.to(self.device)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ShardedBlocks:
    """An expert's blocks spread over the ranks by FSDP2, each gathered while the one before it computes."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh = init_device_mesh(device.type, (mesh.size,))

    def shard(self, block: Block) -> None:
        """Keep this rank's rows of a loaded block's matrices; what is fp32 is small, and stays whole."""
        half = block.self_attn.o.weight.dtype
        whole = {p for name, p in block.named_parameters() if p.dtype != half or not is_sharded(name)}
        fully_shard(block, mesh=self._mesh, ignored_params=whole)
        block.self_attn.gathered = True  # type: ignore[assignment]

    def visit(self, expert: DiT, *, forward: bool) -> Iterator[Block]:
        """The blocks in order, gathered; the next one's gather is under way."""
        blocks = [cast(Block, block) for block in expert.blocks]
        gathering = _gather(blocks[0])
        for index, block in enumerate(blocks):
            gathering.wait()
            following = index + 1 < len(blocks)
            try:
                if following:
                    gathering = _gather(blocks[index + 1])
                yield block
            except GeneratorExit:
                if following:
                    gathering.wait()
                    cast(FSDPModule, blocks[index + 1]).reshard()
                raise
            finally:
                cast(FSDPModule, block).reshard()


class _Gathering(Protocol):
    def wait(self) -> None: ...


def _gather(block: nn.Module) -> _Gathering:
    handle = cast(FSDPModule, block).unshard(async_op=True)
    assert handle is not None
    return handle


class ExpertExchange:
    """Two experts in the memory of one: the blocks of the other are in pinned host memory.

    During the last forward of a step whose follower needs the other expert, each block changes places with
    its counterpart as soon as it is done, on a stream of its own, so the step hides the copies.
    """

    def __init__(self, here: DiT, away: DiT, device: torch.device) -> None:
        self.device = device
        self.exchanged_late = 0  # blocks that a forward had to wait for
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._bounce = torch.empty(BOUNCE, dtype=torch.uint8, device=device)
        self._at = [here for _ in here.blocks]  # whose block is on the device
        self._other = {here: away, away: here}
        self._here = [_tensors(_block(here, i)) for i in range(len(here.blocks))]
        leaving = [_tensors(_block(away, i)) for i in range(len(away.blocks))]
        self._away = pinned_copies(leaving, pin=on_gpu)
        for index, tensors in enumerate(self._away):
            _bind(_block(away, index), tensors)
        self._ready: list[torch.cuda.Event | None] = [None for _ in here.blocks]
        self._upcoming: DiT | None = None
        self._forwards = 0
        here.keeper = away.keeper = self

    def step(self, expert: DiT, upcoming: DiT, forwards: int) -> None:
        """Before a step: which expert it and the next one use, and how many forwards it takes."""
        self._upcoming = None if upcoming is expert else upcoming
        self._forwards = forwards

    def visit(self, expert: DiT, *, forward: bool) -> Iterator[Block]:
        """The expert's blocks in order; in the last forward before the other's turn each leaves after use."""
        if forward:
            self._forwards -= 1
        leaving = forward and self._forwards == 0 and self._upcoming is not None
        # Where the step before made fewer forwards than foreseen (it reused some), nothing has left yet. All
        # are sent for at once, so that each copy runs under the blocks before it.
        late = [index for index, at in enumerate(self._at) if at is not expert]
        for index in late:
            self._exchange(index)
        self.exchanged_late += len(late)
        for index in range(len(self._at)):
            ready = self._ready[index]
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_event(ready)
                self._ready[index] = None
            yield _block(expert, index)
            if leaving:
                self._exchange(index)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _exchange(self, index: int) -> None:
        """Swap the contents of a block's two places, then each expert's view of them."""
        here, away = self._here[index], self._away[index]
        if self._stream is None:
            for mine, theirs in zip(here, away, strict=True):
                _swap(mine, theirs, self._bounce)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for mine, theirs in zip(here, away, strict=True):
                    _swap(mine, theirs, self._bounce)
                event = self._ready[index] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        old = self._at[index]
        new = self._at[index] = self._other[old]
        _bind(_block(old, index), away)
        _bind(_block(new, index), here)


def _block(expert: DiT, index: int) -> Block:
    return cast(Block, expert.blocks[index])


def _tensors(block: Block) -> list[Tensor]:
    """What a block's weights lie in, always in the same order: q, k and v packed, then the others."""
    return [*fused.packed_qkv(block.self_attn), *(p.data for p in _unpacked(block))]


def _bind(block: Block, tensors: list[Tensor]) -> None:
    """Make these tensors (of `_tensors`' order) the block's weights."""
    attention = block.self_attn
    layers = (attention.q, attention.k, attention.v)
    attention.packed = (tensors[0], tensors[1])  # type: ignore[assignment]
    for layer, weight, bias in zip(layers, tensors[0].chunk(3), tensors[1].chunk(3), strict=True):
        layer.weight.data, layer.bias.data = weight, bias
    for parameter, tensor in zip(_unpacked(block), tensors[2:], strict=True):
        parameter.data = tensor


def _unpacked(block: Block) -> list[nn.Parameter]:
    packed = {f"self_attn.{layer}.{kind}" for layer in "qkv" for kind in ("weight", "bias")}
    return [parameter for name, parameter in block.named_parameters() if name not in packed]


def _swap(mine: Tensor, theirs: Tensor, bounce: Tensor) -> None:
    """Exchange two tensors' bytes through a buffer on the device; in stream order on a GPU."""
    a, b = mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)
    for start in range(0, a.numel(), bounce.numel()):
        stop = min(start + bounce.numel(), a.numel())
        part = bounce[: stop - start]
        part.copy_(a[start:stop])
        a[start:stop].copy_(b[start:stop], non_blocking=True)
        b[start:stop].copy_(part, non_blocking=True)
