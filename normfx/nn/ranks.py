"""Sums over the ranks of a process group: statistics of the whole batch, not of one rank's part."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def across_ranks(sums: Tensor, sync: bool) -> Tensor:
    """The sum over all ranks of the default group; what is given where there is one rank or none.

    The gradient is summed over the ranks too: each rank's loss reads the same total.
    """
    if not sync or is_alone():
        return sums
    return _AllReduce.apply(sums) if sums.requires_grad else _all_reduced(sums)


def is_alone() -> bool:
    """Whether there is no other rank."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def _all_reduced(sums: Tensor) -> Tensor:
    total = sums.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        return _all_reduced(sums)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_reduced(gradient)
