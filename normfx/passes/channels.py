"""Channels: which channel of a norm's affine part each number of a value belongs to.

The result of a norm is s[c] * y + t[c] for the channel c of each number. Operators that move
numbers take that along: to another dim, to a slice, to each head, beside other channels. The labels
here go through the same moves, so that whoever contracts the numbers at last knows which s and t
belong to each. Dims along which the channel does not change have size one in the labels.

What is multiplied with the numbers, each by its own, stays multiplied with s; only t would be, too.
A maximum over one channel takes s out where it is not negative, and ReLU does where t is zero.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from normfx import graph as g
from normfx.laws import ARRANGEMENTS, EXACT_DTYPES, VIEWS
from normfx.layout import Axes, plain

aten = torch.ops.aten

# The label of a number that belongs to no channel: it is beside them, as it is.
NONE = -1
# More labels than this would cost more time than a fold saves.
MAX_LABELS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """The channel of each number of a tensor.

    Attributes:
        labels: as many dims as the tensor, of size one where the channel does not change.
    """

    labels: torch.Tensor

    @classmethod
    def along(cls, rank: int, dim: int, size: int) -> Channels:
        """A channel for each index of one dim."""
        shape = [1] * rank
        shape[dim] = size
        return cls(torch.arange(size, device="cpu").reshape(shape))

    def dims(self) -> list[int]:
        """The dims along which the channel changes."""
        return [d for d, size in enumerate(self.labels.shape) if size != 1]

    def is_free(self, dims: Sequence[int]) -> bool:
        """Whether the channel is one and the same along some dims."""
        return not set(dims) & set(self.dims())

    def stretches(self) -> list[tuple[int, int]]:
        """The labels, in order, as stretches of ascending ones: (first, how many)."""
        found: list[tuple[int, int]] = []
        for label in self.labels.flatten().tolist():
            first, count = found[-1] if found else (0, 0)
            follows = first if first == NONE else first + count
            if found and label == follows:
                found[-1] = (first, count + 1)
            else:
                found.append((label, 1))
        return found

    def through(
        self, source: fx.Node, user: fx.Node, *, shifted: bool, monotonic: bool = False
    ) -> Channels | None:
        """The channels of the numbers that an operator makes of these, or None.

        Args:
            source: the value these are the channels of.
            user: what reads it. A split has no channels of its own: those of what it splits.
            shifted: whether t is not zero. Then a factor would not leave it as it is.
            monotonic: whether operators may be passed that take out only factors that are not
                negative. The caller sees to the sign.
        """
        if g.is_call(user, operator.getitem):
            return _part(self, user)
        law = _LAWS.get(g.packet(user))
        scales_only = g.packet(user) in _SCALES
        if law is None or (scales_only and shifted and not _keeps_constants(user)):
            return None
        if is_monotonic(user) and not monotonic:
            return None
        if g.packet(user) not in (aten.cat, aten.concat) and user.args[0] is not source:
            if g.packet(user) not in (aten.mul, aten.multiply):
                return None
        held = g.value(user)
        if isinstance(held, torch.Tensor) and held.dtype not in EXACT_DTYPES:
            return None
        moved = law(self, source, user)
        return None if moved is None else moved._settled()

    def _settled(self) -> Channels:
        """With size one along each dim that the channel does not change along."""
        labels = self.labels
        for dim, size in enumerate(labels.shape):
            first = labels.narrow(dim, 0, 1)
            if size != 1 and torch.equal(first.expand_as(labels), labels):
                labels = first
        return Channels(labels)


def is_monotonic(user: fx.Node) -> bool:
    """Whether an operator takes a factor out only where that is not negative."""
    return g.packet(user) in _MONOTONIC


def is_pool(user: fx.Node) -> bool:
    """Whether an operator leaves fewer numbers of each channel."""
    return g.packet(user) in _POOLS


Law: TypeAlias = Callable[[Channels, fx.Node, fx.Node], "Channels | None"]


def channel_dim(node: fx.Node, operands: Sequence[Any]) -> int | None:
    """The dim of a norm's x that some of its operands run along, or None if there is not just one.

    An operand of one number runs along none; with no other there is no such dim either.
    """
    spec: Any = node.kwargs["spec"]
    rank: Any = node.kwargs["rank"]
    dims = {1 if rank > 1 else 0} if spec.statistic == "running" else set()
    for operand in operands:
        shape = g.shape(operand)
        if shape is None:
            continue
        if spec.affine_dim is not None and len(shape) == 1:
            dims.add(spec.affine_dim)
        else:
            dims |= {rank - len(shape) + i for i, size in enumerate(shape) if str(size) != "1"}
    return dims.pop() if len(dims) == 1 else None


# ---------------------------------------------------------------------------- the moves


def _same(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    return channels if len(g.shape(user) or ()) == channels.labels.dim() else None


def _dropout(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    return None if user.args[2] else channels


def _view(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    old, new = g.shape(source), g.shape(user)
    if old is None or new is None or g.dtype(user) != g.dtype(source):
        return None  # of another dtype: the bits, read as that
    axes = Axes(old)
    layout = axes.view(axes.whole, new, split=True)
    if layout is None:
        return None
    labelled = [d in channels.dims() for d, dim in enumerate(axes.whole) for _ in dim]
    sizes = [axes.size([axis]) for dim in axes.whole for axis in dim]
    if not all(isinstance(s, int) for s, is_in in zip(sizes, labelled, strict=True) if is_in):
        return None
    labels = channels.labels.reshape(
        [s if is_in else 1 for s, is_in in zip(sizes, labelled, strict=True)]
    )
    position, shape, expanded = 0, [], []
    for dim in layout:
        inside = range(position, position + len(dim))
        spread = any(labelled[i] for i in inside)  # the others of it repeat the labels
        expanded += [sizes[i] if spread else 1 for i in inside]
        shape.append(axes.size(dim) if spread else 1)
        position += len(dim)
    if not all(isinstance(size, int) for size in expanded) or _count(expanded) > MAX_LABELS:
        return None
    return Channels(labels.expand(expanded).reshape(shape))


def _arranged(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    return Channels(channels.labels.permute(g.permutation(user, channels.labels.dim())))


def _expand(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    missing = len(g.shape(user) or ()) - channels.labels.dim()
    return Channels(channels.labels.reshape([1] * missing + list(channels.labels.shape)))


def _repeat(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    times: Any = user.args[1]
    wide = _expand(channels, source, user)
    if wide is None or len(times) != wide.labels.dim():
        return None
    if not all(isinstance(times[d], int) for d in wide.dims()):
        return None
    repeated = [n if d in wide.dims() else 1 for d, n in enumerate(times)]
    if _count(repeated) * wide.labels.numel() > MAX_LABELS:
        return None
    return Channels(wide.labels.repeat(repeated))


def _slice(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    named = g.arguments(user)
    dim = named["dim"] % channels.labels.dim()
    if channels.is_free([dim]):
        return channels
    if g.packet(user) is aten.narrow:
        cut: tuple[Any, ...] = (named["start"], named["start"] + named["length"], 1)
    else:
        cut = (named.get("start"), named.get("end"), named.get("step", 1))
    if not all(number is None or isinstance(number, int) for number in cut):
        return None
    kept = torch.arange(channels.labels.shape[dim], device="cpu")[slice(*cut)]
    return Channels(channels.labels.index_select(dim, kept)) if kept.numel() else None


def _select(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    named = g.arguments(user)
    dim = named["dim"] % channels.labels.dim()
    index = 0 if channels.is_free([dim]) else named["index"]
    return Channels(channels.labels.select(dim, index)) if isinstance(index, int) else None


def _part(channels: Channels, user: fx.Node) -> Channels | None:
    """One of the tensors that a split makes of what it splits."""
    split, index = user.args
    if g.packet(split) in _FIRST_OF_SEVERAL:
        return channels if index == 0 else None
    if g.packet(split) not in _SPLITS or not isinstance(index, int):
        return None
    assert isinstance(split, fx.Node)
    parts: Any = g.value(split)
    dim = g.arguments(split).get("dim", 0)
    if not isinstance(dim, int):
        return None
    dim, index = dim % channels.labels.dim(), index % len(parts)
    if g.packet(split) is aten.unbind:
        return Channels(channels.labels.select(dim, 0 if channels.is_free([dim]) else index))
    if channels.is_free([dim]):
        return channels
    sizes = [plain(part.shape[dim]) for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return Channels(channels.labels.narrow(dim, sum(sizes[:index]), sizes[index]))


def _index(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    """Rows picked along neighbouring dims that have one channel."""
    indices: Any = user.args[1]
    rank, made = channels.labels.dim(), len(g.shape(user) or ())
    given = [i for i, index in enumerate(indices) if isinstance(index, fx.Node)]
    if not given or given != list(range(given[0], given[-1] + 1)):
        return None
    first, taken = given[0], len(given)
    for index in indices[first : first + taken]:
        if g.dtype(index) in (torch.bool, torch.uint8):
            taken += len(g.shape(index) or ()) - 1
    if first + taken > rank or not channels.is_free(range(first, first + taken)):
        return None
    sizes = list(channels.labels.shape)
    picked = [1] * (made - rank + taken)
    return Channels(channels.labels.reshape([*sizes[:first], *picked, *sizes[first + taken :]]))


def _gather(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    """Numbers picked along a dim that has one channel; along the others they keep their places."""
    dim: Any = g.arguments(user)["dim"]
    made = g.shape(user)
    if (
        made is None
        or len(made) != channels.labels.dim()
        or not channels.is_free([dim % len(made)])
    ):
        return None
    labels = channels.labels
    for d in channels.dims():
        size = plain(made[d])
        if not isinstance(size, int) or not size:
            return None
        labels = labels.narrow(d, 0, size)
    return Channels(labels)


def _embedding(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    """Rows of a table that is no parameter, picked, added up or averaged."""
    if channels.dims() != [1] or g.arguments(user).get("mode") == 2:  # the maximum of each bag
        return None
    held: Any = g.value(user)
    rank = held.dim() if isinstance(held, torch.Tensor) else 2  # of bags: a tuple, the rows first
    return Channels(channels.labels.reshape([1] * (rank - 1) + [-1]))


def _along_free(dims_of: Callable[[fx.Node, int], Sequence[int]]) -> Law:
    """What happens along dims that have one channel leaves the channels as they are."""

    def law(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
        rank = channels.labels.dim()
        dims = [d % rank for d in dims_of(user, rank)]
        return _same(channels, source, user) if channels.is_free(dims) else None

    return law


def _spatial(count: int) -> Law:
    return _along_free(lambda user, rank: range(rank - count, rank))


def _pooled(count: int) -> Law:
    """A maximum over the last dims; some of these operators have the places as a second result."""

    def law(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
        rank = channels.labels.dim()
        return channels if channels.is_free(range(rank - count, rank)) else None

    return law


def _dims(user: fx.Node, rank: int) -> Sequence[int]:
    dims = g.arguments(user).get("dims") or g.arguments(user).get("dim")
    if dims is None or dims == []:
        return range(rank)
    return [dims] if isinstance(dims, int) else dims


def _padded(user: fx.Node, rank: int) -> Sequence[int]:
    pads = g.arguments(user)["pad"]
    return [rank - 1 - i // 2 for i, size in enumerate(pads) if size != 0]


def _padding(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    """Zeros around the numbers stay zeros; another constant would have to be scaled as well."""
    named = g.arguments(user)
    if named.get("mode", "constant") == "constant" and named.get("value") not in (None, 0):
        return None
    return _along_free(_padded)(channels, source, user)


def _mean(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    rank = channels.labels.dim()
    dims = sorted({d % rank for d in _dims(user, rank)})
    if not channels.is_free(dims):
        return None
    if g.arguments(user).get("keepdim"):
        return channels
    kept = [size for d, size in enumerate(channels.labels.shape) if d not in dims]
    return Channels(channels.labels.reshape(kept))


def _cat(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    """Beside other channels. Beside other rows, those would have to be scaled as well."""
    terms: Any = user.args[0]
    dim = g.arguments(user).get("dim", 0) % channels.labels.dim()
    if channels.dims() != [dim]:
        return None
    parts = []
    for term in terms:
        shape = g.shape(term)
        size = plain(shape[dim]) if shape is not None and len(shape) > dim else None
        if not isinstance(size, int):
            return None
        like = [size if d == dim else 1 for d in range(channels.labels.dim())]
        parts.append(channels.labels if term is source else torch.full(like, NONE, device="cpu"))
    return Channels(torch.cat(parts, dim))


def _scaled(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    """Times a number, or a factor for each: s stays a factor of the product."""
    factor = user.args[1] if user.args[0] is source else user.args[0]
    if g.arguments(user).get("rounding_mode") is not None or factor is source:
        return None
    return _expand(channels, source, user)


def _masked(channels: Channels, source: fx.Node, user: fx.Node) -> Channels | None:
    """Zeros in place of some numbers stay zeros."""
    return _expand(channels, source, user) if user.args[2] == 0 else None


def _keeps_constants(user: fx.Node) -> bool:
    """Whether an operator of `_LINEAR` leaves a constant as it is after all."""
    named = g.arguments(user)
    if g.packet(user) in (aten.pad, aten.constant_pad_nd):
        return named.get("mode", "constant") != "constant" or not any(named["pad"])
    if g.packet(user) in (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d):
        unpadded = not any(named["padding"]) or not named["count_include_pad"]
        return unpadded and named.get("divisor_override") is None
    return False


def _count(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


_SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.chunk, aten.unbind})
# Operators with several results, of which the first has the numbers.
_FIRST_OF_SEVERAL = frozenset(
    {
        aten.max_pool1d_with_indices,
        aten.max_pool2d_with_indices,
        aten.max_pool3d_with_indices,
        aten.adaptive_max_pool1d,
        aten.adaptive_max_pool2d,
        aten.adaptive_max_pool3d,
        aten.embedding_bag,
    }
)
_MAXIMA_OF_ALL = frozenset({aten.amax, aten.amin})
_RECTIFIERS = frozenset({aten.relu, aten.leaky_relu, aten.prelu, aten.abs})
_MAX_POOLS = {
    aten.max_pool1d: 1,
    aten.max_pool2d: 2,
    aten.max_pool3d: 3,
    aten.max_pool1d_with_indices: 1,
    aten.max_pool2d_with_indices: 2,
    aten.max_pool3d_with_indices: 3,
    aten.adaptive_max_pool1d: 1,
    aten.adaptive_max_pool2d: 2,
    aten.adaptive_max_pool3d: 3,
}
_MEAN_POOLS = {
    aten.avg_pool1d: 1,
    aten.avg_pool2d: 2,
    aten.avg_pool3d: 3,
    aten.adaptive_avg_pool1d: 1,
    aten.adaptive_avg_pool2d: 2,
    aten.adaptive_avg_pool3d: 3,
}
_POOLS = _MAXIMA_OF_ALL | _MAX_POOLS.keys() | _MEAN_POOLS.keys() | {aten.mean}
# f(s * y) = s * f(y), but only where s is not negative.
_MONOTONIC = _MAXIMA_OF_ALL | _RECTIFIERS | _MAX_POOLS.keys()
# Operators that take a factor out, but need not leave a constant as it is.
_SCALES = _RECTIFIERS | frozenset(
    {
        aten.mul,
        aten.multiply,
        aten.div,
        aten.divide,
        aten.neg,
        aten.sum,
        aten.masked_fill,
        aten.embedding_bag,
        aten.pad,
        aten.constant_pad_nd,
        aten.avg_pool1d,
        aten.avg_pool2d,
        aten.avg_pool3d,
    }
)
_COPIES = (aten.clone, aten.contiguous, aten.alias, aten.detach, aten.to, aten._to_copy)

_LAWS: dict[Any, Law] = {
    # the same numbers
    **dict.fromkeys(_COPIES, _same),
    **dict.fromkeys((aten.dropout, aten.feature_dropout), _dropout),
    # the same numbers elsewhere
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(ARRANGEMENTS, _arranged),
    **dict.fromkeys(_SPLITS, lambda channels, source, user: channels),
    aten.expand: _expand,
    aten.repeat: _repeat,
    aten.tile: _repeat,
    aten.slice: _slice,
    aten.narrow: _slice,
    aten.select: _select,
    aten.index: _index,
    aten.gather: _gather,
    aten.embedding: _embedding,
    aten.embedding_bag: _embedding,
    aten.cat: _cat,
    aten.concat: _cat,
    aten.index_select: _along_free(_dims),
    aten.flip: _along_free(_dims),
    aten.roll: _along_free(_dims),
    # averages
    aten.mean: _mean,
    **{pool: _spatial(count) for pool, count in _MEAN_POOLS.items()},
    aten.upsample_nearest1d: _spatial(1),
    aten.upsample_nearest2d: _spatial(2),
    aten.upsample_bilinear2d: _spatial(2),
    # multiples
    aten.mul: _scaled,
    aten.multiply: _scaled,
    aten.div: _scaled,
    aten.divide: _scaled,
    aten.neg: _same,
    aten.sum: _mean,
    aten.masked_fill: _masked,
    aten.pad: _padding,
    aten.constant_pad_nd: _padding,
    # where s is not negative
    **dict.fromkeys(_RECTIFIERS, _same),
    **dict.fromkeys(_MAXIMA_OF_ALL, _mean),
    **{pool: _pooled(count) for pool, count in _MAX_POOLS.items()},
}

# The operators above: numbers go elsewhere, or are multiplied, added up or left out.
MOVES = frozenset(_LAWS)
