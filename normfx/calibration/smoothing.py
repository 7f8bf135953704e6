"""Smoothing: Unified Normalization's statistic over a sequence of batches (2208.01313).

With m the second moment of one batch for each channel, over a window of the last M batches:

    v = GM(window),    running = a running + (1 - a) v        (GM: the geometric mean)

An outlier batch, for which AM(window) - GM(window) > M V in any channel, is taken as it is (v = m),
and the window keeps the running statistic in its place; V is the unbiased variance of the square
roots in the window *before* this batch, over all channels. (With V of the window itself, as the
paper prints it, that cannot happen: AM - GM <= M V is a theorem.) As in the released code, but that
the running statistic begins with the first batch and not with one, since nothing is trained here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOMENTUM = 0.9  # the weight of the old statistic


class Smoothed(NamedTuple):
    """The state after some batches.

    Shapes: batches, skipped (); window (M, channels); running (channels,).
    Dtypes: float64.

    Attributes:
        batches: how many were seen.
        skipped: how many of them were outliers.
        window: the second moments of the last M, or what stands for them.
        running: the smoothed second moment.
    """

    batches: Tensor
    skipped: Tensor
    window: Tensor
    running: Tensor


def fresh(length: int, like: Tensor) -> Smoothed:
    """The state before the first batch, for moments like this one."""
    zero = like.new_zeros(())
    return Smoothed(zero, zero, like.new_zeros(length, *like.shape), torch.zeros_like(like))


def smoothed(state: Smoothed, second: Tensor, count: Tensor, *, filtration: bool) -> Smoothed:
    """The state after one more batch.

    Args:
        state: before it.
        second: (channels,) its second moments.
        count: () how many rows it has: a batch without any changes nothing.
        filtration: whether outliers are kept out of the window.
    """
    length = state.window.shape[0]
    batches = state.batches + 1
    slots = torch.arange(length, device=second.device).unsqueeze(-1)
    here = slots == batches.long() % length
    window = torch.where(here, second, state.window)
    geometric = window.log().mean(0).exp()
    full = batches > length
    outlier = torch.zeros_like(full)
    if filtration:
        spread = state.window.sqrt().var(correction=1)
        outlier = full & (window.mean(0) - geometric > length * spread).any()
    window = torch.where(outlier & here, state.running, window)
    value = torch.where(full & ~outlier, geometric, second)
    running = torch.where(batches > 1, MOMENTUM * state.running + (1 - MOMENTUM) * value, value)
    after = Smoothed(batches, state.skipped + outlier, window, running)
    seen = count > 0
    return Smoothed(*(torch.where(seen, new, old) for new, old in zip(after, state, strict=True)))
