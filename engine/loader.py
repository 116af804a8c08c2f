"""Filling models from a checkpoint's files, where the memory plan's rung says they belong."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from engine.config import DiTConfig
from engine.dit import DiT, stays_fp32
from engine.dit_block import Block
from engine.eight_bit import Weights, hold
from engine.errors import CheckpointError
from engine.layout import Layout, Part
from engine.memory import Rung
from engine.offload import ExpertExchange, HostTextEncoder, PromptEncoder, ShardedBlocks
from engine.parallel.mesh import Mesh
from engine.text_encoder import TextEncoder, load_tokenizer
from engine.transfer import Meter
from engine.umt5 import config_from_shapes, official_name
from engine.weights import Reader, check, expected_shapes

log = logging.getLogger(__name__)
C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)
OnBytes = Callable[[str, int, int], None]  # part, bytes that came, bytes of the part


@dataclass(frozen=True)
class Loader:
    """Fills models from files, and tells how it goes."""

    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    on_bytes: OnBytes
    held: dict[Block, Weights] = field(default_factory=dict)  # of blocks loaded as 8-bit weights alone

    def experts(
        self, layout: Layout, config: DiTConfig, rung: Rung, eight: Collection[int] = ()
    ) -> tuple[DiT, DiT | None, ExpertExchange | None]:
        """(high-noise or only expert, low-noise expert, what exchanges the two if one is on the host).

        Of the blocks number `eight` only 8-bit weights stay, in `held`.
        """
        if eight:

            def quantise(index: int, block: Block) -> None:
                if index in eight:
                    self.held[block] = hold(block)

            high = self._by_blocks(layout.high, config, quantise)
            return high, None if layout.low is None else self._by_blocks(layout.low, config, quantise), None
        if rung == "shard":
            keeper = ShardedBlocks(self.mesh, self.device)
            high = self._sharded(layout.high, config, keeper)
            low = None if layout.low is None else self._sharded(layout.low, config, keeper)
            return high, low, None
        high = self.part(layout.high.folder.name, DiT, config, layout.high, self._expert_dtype)
        if layout.low is None:
            return high, None, None
        away = torch.device("cpu") if rung == "host" else None
        low = self.part(layout.low.folder.name, DiT, config, layout.low, self._expert_dtype, away)
        if rung != "host":
            return high, low, None
        for name, child in low.named_children():
            if name != "blocks":
                child.to(self.device)
        return high, low, ExpertExchange(high, low, self.device)

    def text_encoder(self, layout: Layout, dit: DiTConfig, *, on_cpu: bool) -> PromptEncoder:
        """UMT5 and its tokenizer, on the device or on rank 0's CPU."""
        encoder = make_text_encoder(layout, dit)
        check(expected_shapes(encoder.umt5), layout.text.entries)
        if on_cpu and self.mesh.rank > 0:
            return HostTextEncoder(None, dit.text_dim, self.device)
        place = torch.device("cpu") if on_cpu else self.device
        mesh = Mesh.single() if on_cpu else self.mesh
        self._fill("text encoder", encoder.umt5, layout.text, lambda _: self.dtype, place, mesh)
        encoder.umt5.encoder.embed_tokens.weight = encoder.umt5.shared.weight
        encoder.eval()
        return HostTextEncoder(encoder, dit.text_dim, self.device) if on_cpu else encoder

    def part(
        self,
        label: str,
        build: Callable[[C], M],
        config: C,
        part: Part,
        dtype_of: Callable[[str], torch.dtype],
        device: torch.device | None = None,
    ) -> M:
        """A model built without memory and filled from its files."""
        with torch.device("meta"):
            model = build(config)
        self._fill(label, model, part, dtype_of, device or self.device, self.mesh)
        return model

    def _sharded(self, part: Part, config: DiTConfig, keeper: ShardedBlocks) -> DiT:
        """An expert of which this rank keeps its share."""
        expert = self._by_blocks(part, config, lambda index, block: keeper.shard(block))
        expert.keeper = keeper
        return expert

    def _by_blocks(self, part: Part, config: DiTConfig, loaded: Callable[[int, Block], None]) -> DiT:
        """An expert whose blocks each are `loaded` before the next comes: never more than one is whole."""
        with torch.device("meta"):
            expert = DiT(config)
        check(expected_shapes(expert), part.entries)
        pieces: list[tuple[str, nn.Module]] = [(f"blocks.{i}", b) for i, b in enumerate(expert.blocks)]
        pieces += [(name, child) for name, child in expert.named_children() if name != "blocks"]
        reader = self._reader(part.folder.name, part, self.device, self.mesh)
        with reader.meter.running():
            for prefix, module in pieces:
                start = f"{prefix}."
                entries = {n.removeprefix(start): e for n, e in part.entries.items() if n.startswith(start)}
                reader.fill(module, entries, lambda name, start=start: self._expert_dtype(start + name))  # type: ignore[misc]
                if isinstance(module, Block):
                    loaded(int(prefix.removeprefix("blocks.")), module)
        _log_rate(part.folder.name, part, reader.meter)
        return expert.requires_grad_(False).eval()

    def _fill(
        self,
        label: str,
        model: nn.Module,
        part: Part,
        dtype_of: Callable[[str], torch.dtype],
        device: torch.device,
        mesh: Mesh,
    ) -> None:
        reader = self._reader(label, part, device, mesh)
        with reader.meter.running():
            reader.fill(model, part.entries, dtype_of)
        _log_rate(label, part, reader.meter)

    def _reader(self, label: str, part: Part, device: torch.device, mesh: Mesh) -> Reader:
        """What reads one part, and tells of its progress."""
        total = sum(entry.size for entry in part.entries.values())
        return Reader(device, mesh, lambda came: self.on_bytes(label, came, total))

    def _expert_dtype(self, tensor: str) -> torch.dtype:
        return torch.float32 if stays_fp32(tensor) else self.dtype


def make_text_encoder(layout: Layout, dit: DiTConfig) -> TextEncoder:
    """The text encoder of a checkpoint, without memory. Raises CheckpointError where it doesn't fit."""
    try:
        config = config_from_shapes(
            {official_name(name): entry.shape for name, entry in layout.text.entries.items()}
        )
    except KeyError as error:
        raise CheckpointError(f"the text encoder in {layout.text.folder} lacks {error.args[0]}") from None
    if config.d_model != dit.text_dim:
        raise CheckpointError(
            f"the text encoder in {layout.text.folder} is {config.d_model} wide, "
            f"the transformer expects {dit.text_dim}"
        )
    with torch.device("meta"):
        return TextEncoder(config, load_tokenizer(layout.tokenizer), dit.text_len)


def _log_rate(label: str, part: Part, meter: Meter) -> None:
    files = len({entry.path for entry in part.entries.values()})
    log.info(
        "loaded %s: %.2f GB from %d files in %.1f s, %.2f GB/s (%.2f GB of it read by this rank)",
        label, meter.total / 1e9, files, meter.seconds, meter.rate, meter.own / 1e9,
    )  # fmt: skip
