"""When the state of a layer advances, and how that survives compilation and checkpointing.

A layer whose *output* depends on its state (UnifiedNorm, PowerNorm) must not change the state in
its forward pass: activation checkpointing runs that pass twice, and a compiled backward computes
again what it did not save; both would see the changed state and differentiate another function.
Such a layer advances in its backward pass, which runs once for each forward pass that counts, and
at once where no gradient is asked for.

A layer whose state is only a by-product (running statistics of a BatchNorm) advances in the forward
pass, and not again while a backward pass runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfx.torch_internals import in_backward


def is_first_pass() -> bool:
    """Whether a forward pass is not one that activation checkpointing repeats.

    In a compiled graph that contains the checkpoint the state changes once by construction. A
    checkpoint around a compiled function is not seen from inside of that.
    """
    return torch.compiler.is_compiling() or not in_backward()


@torch.library.custom_op("normfx::keep", mutates_args=())
def keep(statistics: Tensor) -> Tensor:
    """A copy that a compiled backward pass reads as it was, and never computes again.

    Between a compiled forward pass and its backward pass, the backward of another call may have
    advanced the state; statistics computed again from that would be of another step.
    """
    return statistics.clone()


@keep.register_fake
def _(statistics: Tensor) -> Tensor:
    return torch.empty_like(statistics)


def now(state: Tensor, gradient: Tensor) -> Tensor:
    """State as it is once a gradient, (C,), is known.

    A partitioner moves what depends on no gradient into the forward graph, where the state may be
    older than at the time of the backward pass. This depends on one.
    """
    return torch.where(gradient.isnan().any(), state, state)
