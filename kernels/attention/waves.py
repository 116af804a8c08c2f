"""Which tile of queries suits a shape: a GPU attends in waves of one tile on each of its multiprocessors.

The tile that is fastest over many waves loses where its last wave is nearly empty: 3 heads of 27,280 queries
are 429 tiles of 192, 3.25 waves of 132 that take the time of 4, and 642 tiles of 128, 4.9 waves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

USUAL_ROWS = 128  # of flash-attn-4's own tile for heads of 128 on Hopper


@dataclass(frozen=True, eq=False)
class Tile:
    """A backend's options, and the milliseconds that they took for so many heads and queries."""

    options: dict[str, Any]
    ms: float
    heads: int
    queries: int

    @property
    def rows(self) -> int:
        """Queries of one tile."""
        tile: Sequence[int] = self.options.get("tile_mn", (USUAL_ROWS, 0))
        return tile[0]

    def waves(self, heads: int, queries: int, processors: int) -> int:
        """Of so many heads' tiles, batch times heads in all."""
        return math.ceil(heads * math.ceil(queries / self.rows) / processors)

    def cost(self, heads: int, queries: int, processors: int) -> float:
        """Expected milliseconds over the measured number of keys; the number of keys is the same for all."""
        measured = self.waves(self.heads, self.queries, processors)
        return self.ms * self.waves(heads, queries, processors) / measured


@lru_cache(maxsize=256)
def pick(tiles: tuple[Tile, ...], heads: int, queries: int, processors: int) -> dict[str, Any]:
    """The options of the tile that should take the shortest time; the first of equals."""
    return min(tiles, key=lambda tile: tile.cost(heads, queries, processors)).options
