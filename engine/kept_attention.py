"""A block's self-attention kept from step to step, so that a later step can do without computing it.

What is kept is the branch after its output projection and before its gate: before the projection it would
be as large and cost a product more, after the gate it would carry an old timestep's. A step that takes it
computes no q, k, v or o and sends nothing; norms, cross-attention and feed-forward run as always. Published
as a broadcast of attention outputs (Pyramid Attention Broadcast, arXiv:2408.12588; FORA, arXiv:2407.01425);
which steps may do so is `engine.cache`'s to decide, by measured change instead of by fixed ranges.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from engine.dit import DiT
    from engine.dit_block import Block


class KeptAttention:
    """The branches of one pass through an expert, [B, L here, D] in the weights' dtype each."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Block, int], Tensor] = {}  # by lane: passes that take turns have one each
        self._reusing = False

    @contextmanager
    def used(self, expert: "DiT", *, reusing: bool) -> Iterator[None]:
        """While the expert runs this pass: its blocks keep their branches here, or take them."""
        self._reusing = reusing
        self._set(expert, self)
        try:
            yield
        finally:
            self._set(expert, None)

    @staticmethod
    def _set(expert: "DiT", kept: "KeptAttention | None") -> None:
        for block in expert.blocks:
            block.kept = kept  # type: ignore[assignment]

    def take(self, block: "Block", lane: int, batch: int) -> Tensor | None:
        """The kept branch of the first `batch` rows, None where it is to be computed."""
        # The first block has one row for both prompts; a pass of both serves one of the first alone.
        return self._kept[block, lane][:batch] if self._reusing else None

    def keep(self, block: "Block", lane: int, branch_BLD: Tensor) -> Tensor:
        """The branch, kept for later steps."""
        self._kept[block, lane] = branch_BLD
        return branch_BLD


def attend(block: "Block", batch: int, compute: Callable[[], Tensor]) -> Tensor:
    """A block's self-attention branch [B, L, D]: the kept one, or `compute`'s."""
    kept = block.kept
    if kept is None:
        return compute()
    found = kept.take(block, 0, batch)
    return kept.keep(block, 0, compute()) if found is None else found


def attend_in_turns(
    block: "Block", lane: int, batch: int, compute: Generator[None, None, Tensor]
) -> Generator[None, None, Tensor]:
    """As `attend`, for one that stops while data is on its way; not begun where the kept one is there."""
    kept = block.kept
    found = None if kept is None else kept.take(block, lane, batch)
    if found is not None:
        return found
    branch_BLD = yield from compute
    return branch_BLD if kept is None else kept.keep(block, lane, branch_BLD)
