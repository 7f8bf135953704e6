"""Launch configurations of the row kernels: plain values, chosen from the number of columns alone.

Never from the number of rows: a row is then reduced in the same order whatever batch it is in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# A row of this many columns is held in registers: 16384 floats over 16 warps are 32 a thread.
PERSISTENT_COLS = 16384
# The backward pass holds a row of x, one of dy and the sums for weight and bias.
PERSISTENT_BACKWARD_COLS = 8192
# One program reads a row twice up to here; a longer one is split over several programs.
LOOPED_COLS = 65536
# Columns a program holds at a time where it loops: 16 floats a thread with 8 warps.
CHUNK_COLS = 4096
# Columns of one program of a split row.
SPLIT_COLS = 16384
MAX_COLS = 262144
# Elements of a tile of several short rows: many small programs forward; backward few large ones,
# since each leaves a row of sums for weight and bias. 4096 spill in LayerNorm's on sm_100.
FORWARD_TILE = 1024
BACKWARD_TILE = 2048


@dataclass(frozen=True, slots=True)
class Launch:
    """How a row kernel is launched.

    Attributes:
        path: "persistent" (rows in registers), "looped" (one program reads a row twice) or "split"
            (several programs a row, which meet in a second kernel).
        block_rows: rows of a tile.
        block_cols: columns of a tile, a power of two.
        splits: programs a row.
        split_cols: columns of each of them, but for the last.
        num_warps: warps of a program.
    """

    path: Literal["persistent", "looped", "split"]
    block_rows: int
    block_cols: int
    splits: int
    split_cols: int
    num_warps: int


def forward_launch(cols: int) -> Launch:
    """Of the forward pass over rows of `cols` columns."""
    return _launch(cols, PERSISTENT_COLS, FORWARD_TILE)


def backward_launch(cols: int, *, gated: bool = False) -> Launch:
    """Of the backward pass. One of a gate holds a gate and its gradient too: half the columns."""
    if not gated:
        return _launch(cols, PERSISTENT_BACKWARD_COLS, BACKWARD_TILE)
    launch = _launch(cols, PERSISTENT_BACKWARD_COLS // 2, BACKWARD_TILE)
    if launch.path == "persistent":
        return launch
    return replace(launch, block_cols=launch.block_cols // 2)


def _launch(cols: int, persistent: int, tile: int) -> Launch:
    if cols <= persistent:
        block_cols = power_of_two(cols)
        block_rows = max(1, tile // block_cols)
        elements = block_rows * block_cols
        warps = max(1, min(16, elements // 512))  # 16 elements a thread, 32 for the longest rows
        return Launch("persistent", block_rows, block_cols, 1, cols, warps)
    if cols <= LOOPED_COLS:
        return Launch("looped", 1, CHUNK_COLS, 1, cols, 8)
    return Launch("split", 1, CHUNK_COLS, -(-cols // SPLIT_COLS), SPLIT_COLS, 8)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()
