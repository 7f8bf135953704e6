"""Moments: count, mean and co-moments of each channel of a norm's input and output, merged exactly.

Two sets A and B of numbers with n, mean and M2 = sum (x - mean)^2 make one set with

    n = n_A + n_B,    d = mean_B - mean_A,    mean = mean_A + d n_B / n
    M2 = M2_A + M2_B + d^2 n_A n_B / n

(Chan, Golub and LeVeque, 1979), and so does the co-moment sum (x - mean_x) (y - mean_y). Nothing is
a difference of large numbers, so a large mean costs no digits of the variance. All is float64 and
stays on the device of the data: nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Of numbers x and y, both (rows, channels), over the rows.

    Shapes: rows (); all others (channels,).
    Dtypes: float64.

    Attributes:
        rows: how many.
        mean: of x.
        square: sum (x - mean)^2.
        out_mean: of y.
        out_square: sum (y - out_mean)^2.
        cross: sum (x - mean) (y - out_mean).
    """

    rows: Tensor
    mean: Tensor
    square: Tensor
    out_mean: Tensor
    out_square: Tensor
    cross: Tensor

    @property
    def variance(self) -> Tensor:
        """Of x, biased."""
        return self.square / self.rows.clamp_min(1)

    @property
    def second(self) -> Tensor:
        """The second moment of x, E[x^2]."""
        return self.variance + self.mean.square()


def moments(x: Tensor, y: Tensor, keep: Tensor | None = None) -> Moments:
    """The moments of rows.

    Args:
        x: (rows, channels), any floating dtype.
        y: (rows, channels).
        keep: (rows,) bool: the rows that count; None: all of them. Others may be anything, NaN too.
    """
    x, y = x.double(), y.double()
    if keep is None:
        count = torch.full((), float(x.shape[0]), dtype=torch.float64, device=x.device)
    else:
        count = keep.sum(dtype=torch.float64)
        x, y = _kept(x, keep), _kept(y, keep)
    n = count.clamp_min(1)
    mean, out_mean = x.sum(0) / n, y.sum(0) / n
    x, y = x - mean, y - out_mean
    if keep is not None:
        x, y = _kept(x, keep), _kept(y, keep)
    # what rounding of the mean left in the first sum (the corrected two-pass algorithm)
    rest, out_rest = x.sum(0), y.sum(0)
    return Moments(
        count,
        mean + rest / n,
        (x * x).sum(0) - rest * rest / n,
        out_mean + out_rest / n,
        (y * y).sum(0) - out_rest * out_rest / n,
        (x * y).sum(0) - rest * out_rest / n,
    )


def merged(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of both."""
    count = a.rows + b.rows
    share = b.rows / count.clamp_min(1)
    d, out_d = b.mean - a.mean, b.out_mean - a.out_mean
    between = a.rows * share
    return Moments(
        count,
        a.mean + d * share,
        a.square + b.square + d * d * between,
        a.out_mean + out_d * share,
        a.out_square + b.out_square + out_d * out_d * between,
        a.cross + b.cross + d * out_d * between,
    )


def _kept(rows: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep.unsqueeze(-1), rows, 0.0)
