"""Affine: the static norm s x + t that stands for a norm, for each channel, from its moments.

With y the norm's value before weight and bias, over the calibration data:

| form | s | t |
| --- | --- | --- |
| fitted | cov(x, y) / var(x) | E[y] - s E[x] |
| unified | 1 / sqrt(E[x^2] + eps) | 0 |

`fitted` is the affine map nearest to the norm in the mean square, so it keeps what a trained model
has learnt: the sizes of the channels relative to each other. `unified` is Unified Normalization
(2208.01313), which gives every channel size one: another function than a LayerNorm, for models that
are trained on with it. What a BatchNorm computes from its batch has one static form, the usual
s = 1 / sqrt(var(x) + eps), t = -s E[x].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from normfx.calibration.moments import Moments
from normfx.calibration.sites import Form
from normfx.errors import StatisticsError

Affine = Literal["fitted", "unified"]


def affine(form: Form, measured: Moments, second: Tensor | None, how: Affine) -> tuple[Tensor, ...]:
    """(s, t) of a site, in float64.

    Args:
        form: what the norm is.
        measured: its moments.
        second: a smoothed second moment in place of the exact one, or None.
        how: which affine map.
    """
    if form.over_batch and form.statistic in ("variance", "batch") and form.eps is not None:
        scale = form.scale / _root(measured.variance, form, form.eps)
        return scale, -scale * measured.mean
    if how == "unified":
        square = measured.second if second is None else second
        if form.statistic == "sum-square":
            square = square * form.channels
        if form.eps is None:
            raise StatisticsError(f"the form 'unified' needs the eps of {form}: it is a tensor.")
        scale = form.scale / _root(square, form, form.eps)
        return scale, torch.zeros_like(scale)
    # a channel that never changed says nothing of its slope: that of all channels is taken
    usual = measured.cross.sum() / measured.square.sum().clamp_min(torch.finfo(torch.float64).tiny)
    moves = measured.square > 0
    scale = torch.where(moves, measured.cross / torch.where(moves, measured.square, 1.0), usual)
    return scale, measured.out_mean - scale * measured.mean


def _root(square: Tensor, form: Form, eps: float) -> Tensor:
    """The root that a norm divides by, with eps at its place."""
    if form.eps_place == "outside":
        return square.sqrt() + eps
    if form.eps_place == "floor":
        return square.sqrt().clamp_min(eps)
    return (square.clamp_min(eps) if form.eps_place == "floor-inside" else square + eps).sqrt()


def explained(measured: Moments) -> float:
    """The share of the norm's variance that `fitted` explains: 1 where nothing is lost."""
    safe = measured.square.clamp_min(torch.finfo(torch.float64).tiny)
    total = measured.out_square.sum().item()
    return (measured.cross.square() / safe).sum().item() / total if total else 1.0
