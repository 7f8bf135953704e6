"""Numbers that belong to the channels of a tensor: where they are, and how they line up with it."""

from __future__ import annotations

import torch
from torch import Tensor


class Channels:
    """The channel dim of one input.

    Args:
        x: the input, with at least one dim beside the channels.
        count: how many channels the layer has.
        dim: which dim they are.
        layer: the name of the layer, for the error.

    Attributes:
        dim: non-negative.
        others: every other dim.
        positions: how many numbers each channel has.
    """

    def __init__(self, x: Tensor, count: int, dim: int, layer: str) -> None:
        _check_real(x)
        rank = x.dim()
        if rank < 2 or not -rank <= dim < rank or x.shape[dim] != count:
            raise ValueError(
                f"{layer}: expected {count} channels in dim {dim} of an input with two dims or "
                f"more, got an input of shape {tuple(x.shape)}; construct the layer with the right "
                f"number of channels, or with channel_dim=-1 for tokens (batch, tokens, channels) "
                f"and channel_dim=1 for images (batch, channels, height, width)"
            )
        self.dim = dim % rank
        self.others = tuple(d for d in range(rank) if d != self.dim)
        self._shape = [count if d == self.dim else 1 for d in range(rank)]
        self.positions = 1
        for d in self.others:
            self.positions = self.positions * x.shape[d]

    def align(self, values: Tensor) -> Tensor:
        """Values of the channels, (C,), so that they broadcast against x."""
        return values if self.dim == len(self._shape) - 1 else values.reshape(self._shape)

    def align_mask(self, mask: Tensor, x: Tensor, layer: str) -> Tensor:
        """A mask over positions, so that it broadcasts against x."""
        expected = tuple(x.shape[d] for d in self.others)
        if tuple(mask.shape) != expected or mask.dtype != torch.bool:
            raise ValueError(
                f"{layer}: expected a boolean mask of shape {expected} (True: padding), got "
                f"{mask.dtype} of shape {tuple(mask.shape)}; give one entry for each position"
            )
        return mask.unsqueeze(self.dim)

    def sum(self, values: Tensor) -> Tensor:
        """Over all but the channels: (C,)."""
        return values.sum(self.others)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics are computed in: float32 at least."""
    _check_real(x)
    return torch.promote_types(x.dtype, torch.float32)


def _check_real(x: Tensor) -> None:
    """An integer result would be cut off, and a complex square is no square of a size."""
    if not x.is_floating_point():
        raise ValueError(
            f"a normalization layer: expected a real floating-point input, got {x.dtype}; convert "
            f"it first, for instance with .float()"
        )
