"""The order in which Blackwell's tensor cores want block scales.

cuBLAS documentation, "1D Block Scaling Factors Layout": tiles of 128 rows by 4 scales, 512 bytes each, row
after row of tiles; within a tile row r's scale c lies at (r % 32) * 16 + (r / 32) * 4 + c. Rows and scales
are padded to whole tiles. torch calls it SWIZZLE_32_4_4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS, STRIPE = 128, 4, 32  # a tile is four stripes of 32 rows, side by side


def swizzle(scale_RC: Tensor) -> Tensor:
    """Scales of R rows, C each, any 1-byte dtype: [ceil(R / 128) * ceil(C / 4) * 512], zeros where padded."""
    rows, columns = scale_RC.shape
    down, across = -(-rows // ROWS), -(-columns // COLUMNS)
    missing = (0, across * COLUMNS - columns, 0, down * ROWS - rows)
    padded = F.pad(scale_RC.view(torch.uint8), missing)
    tiles = padded.view(down, ROWS // STRIPE, STRIPE, across, COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scale_RC.dtype)


def unswizzle(flat: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse: the scales [rows, columns] without the padding."""
    down, across = -(-rows // ROWS), -(-columns // COLUMNS)
    tiles = flat.view(torch.uint8).view(down, across, STRIPE, ROWS // STRIPE, COLUMNS)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(down * ROWS, across * COLUMNS)
    return padded[:rows, :columns].contiguous().view(flat.dtype)
