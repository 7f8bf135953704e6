"""What each kernel moves, computes and launches, by paper and pencil: before it and with it.

Before: what the same takes without the kernel, where Inductor fuses all that it can but makes no
product with a norm inside: its norm kernel, the product of a library, and for a backward pass one
kernel for dx and one for the gradients of weight and bias, each of which reads x and dy. Vectors of
a row's length or of one number a row count, as they are small but real.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes of memory, flops (additions and multiplications) and kernels of one call."""

    bytes: float
    flops: float
    launches: int


@dataclass(frozen=True, slots=True)
class Pair:
    """The same computation without a kernel of ours and with it."""

    before: Work
    after: Work


def row_norm(rows: int, cols: int, size: int = 2) -> Pair:
    """LayerNorm, with weight and bias: reads x, writes y, and mean and S for the backward pass."""
    own = Work(2 * rows * cols * size + 2 * cols * size + 8 * rows, 8 * rows * cols, 1)
    return Pair(own, own)


def add_row_norm(rows: int, cols: int, size: int = 2) -> Pair:
    """Of x + residual, which is written too."""
    own = Work(4 * rows * cols * size + 2 * cols * size + 8 * rows, 9 * rows * cols, 1)
    return Pair(own, own)


def row_norm_backward(rows: int, cols: int, size: int = 2) -> Pair:
    """Reads x and dy and writes dx. Without the kernel, the sums of columns read x and dy again.

    Inductor joins the two for rows up to 16384 columns and many rows (`mix_order_reduction`);
    then the two sides are the same.
    """
    tensor = rows * cols * size
    vectors = 4 * cols * 4 + 8 * rows
    return Pair(
        Work(5 * tensor + vectors, 14 * rows * cols, 2),
        Work(3 * tensor + vectors, 14 * rows * cols, 2),
    )


def row_norm_quantised(rows: int, cols: int, size: int = 2) -> Pair:
    """With a scale a row: without the kernel y is written, and read to be quantised."""
    tensor = rows * cols * size
    return Pair(
        Work(3 * tensor + rows * cols + 4 * rows, 11 * rows * cols, 2),
        Work(tensor + rows * cols + 4 * rows, 11 * rows * cols, 1),
    )


def add_row_scale(rows: int, cols: int, size: int = 2) -> Pair:
    """x + residual and one number a row, beside a norm that writes the normalized rows as well."""
    tensor = rows * cols * size
    return Pair(
        Work(4 * tensor + 4 * rows, 6 * rows * cols, 1),
        Work(3 * tensor + 4 * rows, 3 * rows * cols, 1),
    )


def norm_linear(rows: int, cols: int, outs: int, size: int = 2) -> Pair:
    """The norm writes its rows, and a product reads them again; with the kernel there is one."""
    product = (rows * cols + cols * outs + rows * outs) * size
    flops = 2.0 * rows * cols * outs
    return Pair(
        Work(product + 2 * rows * cols * size, flops + 4 * rows * cols, 2),
        Work(product, flops + 2 * rows * cols + rows * outs, 1),
    )


def unified_forward(rows: int, cols: int, size: int = 2) -> Pair:
    """UnifiedNorm in training, uncompiled, of (rows, cols) tokens: the moment, then the map.

    Without the kernels, in this order: x in float32, its square, the sum; x in float32, times the
    factor, times the weight, plus the bias, and rounded.
    """
    numbers = rows * cols
    moment = (size + 4) + (4 + 4) + 4
    mapped = (size + 4) + 3 * (4 + 4) + (4 + size)
    own = Work(3 * size * numbers, 6 * numbers, 3)
    return Pair(Work((moment + mapped) * numbers, 6 * numbers, 8), own)


def unified_backward(rows: int, cols: int, size: int = 2) -> Pair:
    """The two sums, then dx, which each read x and dy.

    Without the kernels: x and dy in float32, the sum of dy, dy * x and its sum; dy * a, x * b,
    their sum, and rounded.
    """
    numbers = rows * cols
    sums = 2 * (size + 4) + 4 + (4 + 4 + 4) + 4
    mapped = 2 * (4 + 4) + (4 + 4 + 4) + (4 + size)
    own = Work(5 * size * numbers, 6 * numbers, 3)
    return Pair(Work((sums + mapped) * numbers, 6 * numbers, 9), own)


# Of each kernel, the sizes that the tables have: tokens of a transformer of some width.
KERNELS: dict[str, tuple[Callable[..., Pair], list[tuple[int, ...]]]] = {
    "row_norm": (row_norm, [(4096, 768), (16384, 4096)]),
    "add_row_norm": (add_row_norm, [(4096, 768), (16384, 4096)]),
    "row_norm_backward": (row_norm_backward, [(4096, 768), (16384, 4096)]),
    "row_norm_quantised": (row_norm_quantised, [(16384, 4096)]),
    "add_row_scale": (add_row_scale, [(4096, 768), (16384, 4096)]),
    "norm_linear": (
        norm_linear,
        [(1, 4096, 14336), (16, 4096, 14336), (1, 768, 2304), (4096, 4096, 14336)],
    ),
    "channel_moments, channel_affine": (unified_forward, [(8192, 768)]),
    "channel_sums, channel_affine": (unified_backward, [(8192, 768)]),
}
