"""The operators of the channel kernels, as torch sees them, and their launches.

x is (batch, channels, positions), as `by_channel` views a tensor; a mask is (batch, positions).

| operator | gives |
| --- | --- |
| channel_moments | n, mean, m2 of each channel, where the mask is set and where it is not |
| channel_sums | sum of u, of u * (v - centre), of (v - centre)^2 |
| channel_affine | a*u + b*(v - centre) + c |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from normfx.kernels import channel_source, runs_on
from normfx.kernels.launch import power_of_two
from normfx.kernels.row import operator

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Elements of a tile: 16 a thread, for each of which the moments are three registers. Two regions
# need six, and with as many elements spill on sm_100.
_TILE = 2048
# Programs that share the positions of a channel: `channel_join` reads what they leave as one tile.
_PROGRAMS = 256
_JOIN_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program holds: positions and channels of a tile, powers of two."""

    positions: int
    channels: int


def tile_of(channels: int, positions: Any, *, channels_adjoin: bool, regions: int = 1) -> Tile:
    """The tile whose longer side lies along memory, where it has 64 numbers if there are."""
    elements = _TILE // regions
    if channels_adjoin:
        width = min(64, power_of_two(channels))
        return Tile(elements // width, width)
    length = min(256, power_of_two(positions)) if isinstance(positions, int) else 256
    return Tile(length, elements // length)


def by_channel(x: Tensor, dim: int) -> Tensor:
    """A tensor as (batch, channels, positions), a view where its memory allows one.

    Tokens whose channels are last are one batch, so that a tile is of many tokens.
    """
    before = x.flatten(0, dim - 1) if dim > 0 else x.unsqueeze(0)
    if x.dim() - 1 in (dim, dim - x.dim()):
        return before.transpose(0, 1).unsqueeze(0)
    return before.flatten(2)


@operator("normfx::channel_moments")
def channel_moments(x: Tensor, mask: Tensor | None, centred: bool, regions: int) -> Tensor:
    """n, mean and sum of squares about the mean of each channel: (regions, 3, channels), float32.

    Shapes:
        x: (batch, channels, positions). mask: (batch, positions) boolean, or None: all count.

    Args:
        x: float16, bfloat16 or float32.
        mask: which positions region 0 has.
        centred: whether there is a mean: else it is zero, and the squares are about zero.
        regions: 1, or 2: region 1 has the positions that the mask leaves out.
    """
    if not runs_on(x):
        return _moments(x, mask, centred, regions)
    batch, channels, positions = x.shape
    total = torch.empty((regions, 3, channels), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return total.zero_()
    tile = tile_of(channels, positions, channels_adjoin=x.stride(1) == 1, regions=regions)
    blocks = -(-channels // tile.channels)
    programs = _programs(x.device, batch * -(-positions // tile.positions), blocks)
    part = torch.empty((programs, regions, 4, channels), dtype=torch.float32, device=x.device)
    wrap_triton(channel_source.channel_moments)[(programs, blocks)](
        x,
        None if mask is None else mask.contiguous(),
        part,
        batch,
        channels,
        positions,
        *x.stride(),
        MEAN=centred,
        REGIONS=regions,
        BLOCK_P=tile.positions,
        BLOCK_C=tile.channels,
        num_warps=4,
    )
    wrap_triton(channel_source.channel_join)[(-(-channels // _JOIN_CHANNELS), regions)](
        part,
        total,
        programs,
        channels,
        MEAN=centred,
        REGIONS=regions,
        BLOCK_P=power_of_two(programs),
        BLOCK_C=_JOIN_CHANNELS,
        num_warps=4,
    )
    return total


@operator("normfx::channel_sums")
def channel_sums(u: Tensor, v: Tensor, centre: Tensor | None, squares: bool) -> Tensor:
    """Sums of u, of u*d and of d^2 of each channel, with d = v - centre: (3, channels), float32.

    Shapes:
        u, v: (batch, channels, positions). centre: (channels,).

    Args:
        u: a gradient.
        v: what it is the gradient of an affine map of.
        centre: what is taken off v, or None.
        squares: whether the third sum is asked for; else it is zero.
    """
    if not runs_on(v):
        d = v.float() if centre is None else v.float() - centre[:, None]
        third = (d * d).sum((0, 2)) if squares else torch.zeros_like(d[0, :, 0])
        return torch.stack((u.float().sum((0, 2)), (u.float() * d).sum((0, 2)), third))
    batch, channels, positions = v.shape
    if v.numel() == 0:
        return torch.zeros((3, channels), dtype=torch.float32, device=v.device)
    tile = tile_of(channels, positions, channels_adjoin=v.stride(1) == 1)
    blocks = -(-channels // tile.channels)
    programs = _programs(v.device, batch * -(-positions // tile.positions), blocks)
    part = torch.empty((programs, 3, channels), dtype=torch.float32, device=v.device)
    wrap_triton(channel_source.channel_sums)[(programs, blocks)](
        u,
        v,
        centre,
        part,
        batch,
        channels,
        positions,
        *u.stride(),
        *v.stride(),
        SQUARES=squares,
        BLOCK_P=tile.positions,
        BLOCK_C=tile.channels,
        num_warps=4,
    )
    return part.sum(0)


@operator("normfx::channel_affine")
def channel_affine(
    u: Tensor | None,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor | None,
    centre: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """a*u + b*(v - centre) + c, rounded once to the dtype of v.

    Shapes:
        u, v: (batch, channels, positions). a: (channels,). b, c, centre: (channels,), or
        (2, channels) with a mask (batch, positions): first where it is set, then where it is not.
    """
    if not runs_on(v):
        return _affine(u, v, a, b, c, centre, mask)
    y = torch.empty_like(v)
    if v.numel() == 0:
        return y
    batch, channels, positions = v.shape
    tile = tile_of(channels, positions, channels_adjoin=v.stride(1) == 1)
    tiles = batch * -(-positions // tile.positions)
    wrap_triton(channel_source.channel_affine)[(tiles, -(-channels // tile.channels))](
        u,
        v,
        None if a is None else a.contiguous(),
        b.contiguous(),
        None if c is None else c.contiguous(),
        None if centre is None else centre.contiguous(),
        None if mask is None else mask.contiguous(),
        y,
        channels,
        positions,
        *(v if u is None else u).stride(),
        *v.stride(),
        *y.stride(),
        BLOCK_P=tile.positions,
        BLOCK_C=tile.channels,
        num_warps=4,
    )
    return y


def _programs(device: torch.device, tiles: Any, blocks: int) -> int:
    """How many programs share the positions: four for each multiprocessor, at most a tile each."""
    if device.type != "cuda" or not torch.cuda.is_available():
        wanted = 3  # the interpreter runs them one after the other
    else:
        wanted = max(1, 4 * _multiprocessors(device.index or 0) // blocks)
    # a symbol is not asked: a program without a tile leaves zeros
    return min(wanted, _PROGRAMS, tiles) if isinstance(tiles, int) else min(wanted, _PROGRAMS)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


# -- plain torch, fake bodies and gradients --------------------------------------------------------


def _moments(x: Tensor, mask: Tensor | None, centred: bool, regions: int) -> Tensor:
    h = x.float()
    found = []
    for region in range(regions):
        counts = torch.ones_like(h[:, :1]) > 0 if mask is None else mask[:, None] ^ (region == 1)
        n = counts.expand_as(h).sum((0, 2)).to(h.dtype)
        mean = torch.where(counts, h, 0.0).sum((0, 2)) / n.clamp(min=1)
        mean = mean if centred else torch.zeros_like(mean)
        m2 = torch.where(counts, (h - mean[:, None]).square(), 0.0).sum((0, 2))
        found.append(torch.stack((n, mean, m2)))
    return torch.stack(found)


def _affine(
    u: Tensor | None,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor | None,
    centre: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    def aligned(values: Tensor) -> Tensor:
        if mask is None:
            return values.float()[:, None]
        return torch.where(mask[:, None], values[0, :, None].float(), values[1, :, None].float())

    h = v.float() if centre is None else v.float() - aligned(centre)
    h = h * aligned(b)
    h = h if c is None else h + aligned(c)
    if u is not None and a is not None:
        h = h + u.float() * a.float()[:, None]
    return torch.empty_like(v).copy_(h)


@channel_moments.register_fake
def _(x: Tensor, mask: Tensor | None, centred: bool, regions: int) -> Tensor:
    return torch.empty((regions, 3, x.shape[1]), dtype=torch.float32, device=x.device)


@channel_sums.register_fake
def _(u: Tensor, v: Tensor, centre: Tensor | None, squares: bool) -> Tensor:
    return torch.empty((3, v.shape[1]), dtype=torch.float32, device=v.device)


@channel_affine.register_fake
def _(u: Any, v: Tensor, a: Any, b: Tensor, c: Any, centre: Any, mask: Any) -> Tensor:
    return torch.empty_like(v)


def _keep_moments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, ctx.centred, ctx.regions = inputs
    ctx.save_for_backward(x, mask, output)


def _moments_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """1/n at the mean, and 2 (x - mean) at m2, of the region that x is in."""
    x, mask, moments = ctx.saved_tensors
    b = 2 * grad[:, 2]
    c = grad[:, 1] / moments[:, 0].clamp(min=1) if ctx.centred else torch.zeros_like(b)
    centre = moments[:, 1]
    if mask is None:
        b, c, centre = b[0], c[0], centre[0]
    elif ctx.regions == 1:  # what the mask leaves out has no part in it
        b, c, centre = (torch.cat((t, torch.zeros_like(t))) for t in (b, c, centre))
    dx = torch.ops.normfx.channel_affine(None, x, None, b, c, centre, mask)
    return dx, None, None, None


def _keep_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, v, _, b, c, centre, mask = inputs
    if u is not None or mask is not None:
        raise NotImplementedError(
            "normfx::channel_affine: expected neither u nor a mask where a gradient is asked for; "
            "they are for backward passes"
        )
    ctx.save_for_backward(v, b, centre)
    ctx.has_c = c is not None


def _affine_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    v, b, centre = ctx.saved_tensors
    total, product, _ = torch.ops.normfx.channel_sums(dy, v, centre, False).unbind()
    dv = torch.ops.normfx.channel_affine(None, dy, None, b, None, None, None)
    dcentre = None if centre is None else -b * total
    return None, dv.to(v.dtype), None, product, total if ctx.has_c else None, dcentre, None


channel_moments.register_autograd(_moments_gradient, setup_context=_keep_moments)
channel_affine.register_autograd(_affine_gradient, setup_context=_keep_affine)
