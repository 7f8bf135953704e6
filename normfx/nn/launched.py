"""Where the channel kernels compute what a layer needs, and x as they take it.

A layer that runs uncompiled on a GPU calls them: each reads x once, where operators one after the
other would write it in float32 again and again. In a compiled graph Inductor fuses those, and the
layer stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfx.kernels import has_triton, runs_on
from normfx.nn.channels import Channels
from normfx.nn.ranks import is_alone
from normfx.torch_internals import is_transformed

# A CPU has them in Triton's interpreter alone, for the tests.
DEVICES = ("cuda",)


def is_launched(x: Tensor, sync: bool = False) -> bool:
    """Whether the kernels run on x; with `sync`, only if there is no other rank to ask."""
    if torch.compiler.is_compiling() or not has_triton() or (sync and not is_alone()):
        return False
    if x.device.type not in DEVICES or not runs_on(x):
        return False
    is_float = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return is_float and not is_transformed(x)  # vmap has no rule for them


def operators() -> Any:
    """The module of the operators, imported where the first of them is called."""
    from normfx.kernels import channel

    return channel


def flat(x: Tensor, channels: Channels) -> Tensor:
    """A tensor as (batch, channels, positions)."""
    return operators().by_channel(x, channels.dim)


def flat_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask over positions as (batch, positions) of what `flat` gave."""
    return None if mask is None else mask.reshape(like.shape[0], like.shape[2])


def unflat(y: Tensor, x: Tensor, channels: Channels) -> Tensor:
    """(batch, channels, positions) in the shape of x."""
    if channels.dim == x.dim() - 1:
        return y[0].t().reshape(x.shape)
    return y.reshape(x.shape)


def affine(
    x: Tensor, channels: Channels, scale: Tensor, shift: Tensor, centre: Tensor | None = None
) -> Tensor:
    """(x - centre) * scale + shift, rounded once to the dtype of x."""
    y = operators().channel_affine(None, flat(x, channels), None, scale, shift, centre, None)
    return unflat(y, x, channels)
