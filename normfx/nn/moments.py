"""Mean and variance of each channel of a batch: without padding, over all ranks, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfx.nn import launched
from normfx.nn.channels import Channels
from normfx.nn.ranks import across_ranks


def channel_moments(
    x: Tensor, channels: Channels, sync: bool, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and how many positions they are of.

    In two passes: the mean of squares less the square of the mean would cancel.

    Shapes:
        padding: broadcasts against x, True where x does not count.
        Returns (C,), (C,) and (1,). Without any position that counts, zeros.
    """
    if launched.is_launched(x, sync):
        h = launched.flat(x, channels)
        counted = None if padding is None else launched.flat_mask(~padding, h)
        n, mean, m2 = launched.operators().channel_moments(h, counted, True, 1)[0].unbind()
        return mean, m2 / n.clamp(min=1), n[:1].detach()
    if padding is None:
        count = x.new_full((1,), channels.positions)
    else:
        count = (~padding).sum().to(x.dtype).reshape(1)
        x = torch.where(padding, 0.0, x)
    total = across_ranks(torch.cat((channels.sum(x), count)), sync)
    count = total[-1:].detach()
    mean = total[:-1] / count.clamp(min=1)
    centred = x - channels.align(mean)
    if padding is not None:
        centred = torch.where(padding, 0.0, centred)
    squares = across_ranks(channels.sum(centred.square()), sync)
    return mean, squares / count.clamp(min=1), count


def unbiased(variance: Tensor, count: Tensor) -> Tensor:
    """A biased variance as the estimate for the population; that of one number is its own zero."""
    return variance * (count / (count - 1).clamp(min=1))


def trained_batch_norm(norm: Any, layer: str) -> Any:
    """A BatchNorm that has the statistics of its training."""
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        raise ValueError(
            f"{layer}: expected a BatchNorm with running statistics, got {norm}; its statistics "
            f"are the source that is adapted"
        )
    return norm
