"""Laws of scale-blindness: what each operator lets through of what its readers do not see.

One row of `LAWS` is one operator, with a law for each argument of which one is known. A law is
given one use of a value, with everything else as it is, and answers for the value: which factors of
its blocks change nothing, and which constants added to them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blind import Blind, Use
from normfx.analyses.partition import Partition
from normfx.laws import ARRANGEMENTS, VIEWS, einsum_equation
from normfx.layout import is_one
from normfx.lifted import normal_dims
from normfx.ops import NormSpec, norm

aten = torch.ops.aten

Law: TypeAlias = Callable[[Use], Blind]

# An eps above this is no guard against a zero: it is meant to be seen, as in x / (1 + |x|).
MAX_EPS = 1e-2
# Statistics that grow with x: S(c*x) = c^2 * S(x). Given ones and those of families are others.
_STATISTICS = frozenset({"variance", "mean-square", "sum-square", "compressed", "batch"})
# Of these, what does not change when a constant is added to x.
_CENTRED = frozenset({"variance", "batch"})


# ---------------------------------------------------------------------------- norms


def _normalized(use: Use) -> Blind:
    spec: Any = use.user.kwargs["spec"]
    given: dict[str, Any] = use.named
    if spec.statistic != "batch" and (given["mean"] is not None or given["square"] is not None):
        return use.nothing()
    if given["gate"] is not None or given["eps"] is not None or not _is_blind(spec):
        return use.nothing()
    if not all(_is_only_updated(given[name]) for name in ("mean", "square")):
        return use.nothing()
    blocks = _statistic_blocks(spec, use.shape)
    centred = spec.centre and spec.statistic in _CENTRED
    shift = blocks if centred else Partition.none(blocks.rank)
    return Blind(blocks, shift, frozenset({use.user}))


def _is_only_updated(statistic: fx.Node | None) -> bool:
    """Whether nothing reads a running statistic: it sees the scale."""
    readers = [] if statistic is None else statistic.users
    specs: list[Any] = [reader.kwargs.get("spec") for reader in readers]
    return all(spec is not None and spec.statistic == "batch" for spec in specs)


def _is_blind(spec: NormSpec) -> bool:
    return spec.statistic in _STATISTICS and spec.eps is not None and 0 <= spec.eps <= MAX_EPS


def _statistic_blocks(spec: NormSpec, shape: tuple[Any, ...]) -> Partition:
    """What the statistics are taken over, for each index of the other dims."""
    if not spec.groups:
        return Partition.sharing(len(shape), spec.dims)
    dim = spec.group_dim
    cut = (*shape[:dim], spec.groups, shape[dim] // spec.groups, *shape[dim + 1 :])
    return Partition.sharing(len(cut), spec.dims).viewed(cut, shape)


def _norm_weight(use: Use) -> Blind:
    bias = use.named["bias"]
    blocks = use.out.scale
    if bias is not None:
        blocks = _beside(use.out, _aligned(use, bias), use.made)
    return use.scale(blocks.broadcast(_aligned(use, use.source)).viewed(*_alignment(use)))


def _norm_bias(use: Use) -> Blind:
    aligned, shape = _alignment(use)
    shift = use.out.shift.broadcast(aligned).viewed(aligned, shape)
    return Blind(Partition.none(len(shape)), shift, use.out.norms)


def _alignment(use: Use) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return _aligned(use, use.source), use.shape


def _aligned(use: Use, operand: fx.Node) -> tuple[Any, ...]:
    """The shape of a norm's weight or bias as it broadcasts against x."""
    spec: Any = use.user.kwargs["spec"]
    shape = g.shape(operand) or ()
    if spec.affine_dim is None or len(shape) != 1:
        return shape
    return shape + (1,) * (len(use.made) - 1 - spec.affine_dim)


# ---------------------------------------------------------------------------- sums


def _beside(out: Blind, summand: tuple[Any, ...], made: tuple[Any, ...]) -> Partition:
    """The factors of u that are unseen in u + b: (1 - c) * b must be.

    Args:
        out: of the sum.
        summand: the shape of b; () for a number.
        made: the shape of the sum.
    """
    rank, missing = len(made), len(made) - len(summand)
    varying = [d for d in range(missing, rank) if not is_one(summand[d - missing])]
    shift = out.shift
    if any(d not in shift.free and shift.labels.shape[d] == 1 for d in varying):
        return Partition.none(rank)
    spread = [d for d in varying if shift.labels.shape[d] != 1]
    if spread:  # blocks that b is not constant on
        place = torch.zeros([1] * rank, dtype=torch.int64, device="cpu")
        for d in spread:
            size = shift.labels.shape[d]
            index = torch.arange(size, device="cpu").reshape(
                [-1 if i == d else 1 for i in range(rank)]
            )
            place = place * size + index
        ids = shift.labels.unique(return_inverse=True)[1].flatten()
        places = place.expand(shift.labels.shape).flatten()
        first = torch.zeros_like(ids).scatter(0, ids, places)  # one of the places of each block
        shift = shift.without(shift.labels.flatten()[first[ids] != places])
    return out.scale.join(shift)


def _summand(use: Use) -> Blind:
    args = [use.named.get(name) for name in ("self", "other")]
    other = args[1] if use.name == "self" else args[0]
    if isinstance(other, fx.Node) and g.shape(other) is None:
        return use.nothing()
    blocks = _beside(use.out, g.shape(other) or (), use.made)
    shift = use.out.shift.broadcast(use.shape)
    return Blind(blocks.broadcast(use.shape), shift, use.out.norms)


# ---------------------------------------------------------------------------- element by element


def _homogeneous(use: Use) -> Blind:
    return use.scale(use.out.scale.broadcast(use.shape))


def _same(use: Use) -> Blind:
    return use.moved(lambda blocks: blocks.broadcast(use.shape))


def _factor(use: Use) -> Blind:
    """One of two factors; beside a number, a constant added to it is one of the product."""
    if use.named.get("rounding_mode") is not None:
        return use.nothing()
    other = use.named["other" if use.name == "self" else "self"]
    return _homogeneous(use) if isinstance(other, fx.Node) or use.name != "self" else _same(use)


def _dropout(use: Use) -> Blind:
    return _homogeneous(use) if use.named["train"] else _same(use)


def _power(use: Use) -> Blind:
    exponent = use.named["exponent"]
    is_number = isinstance(exponent, (int, float)) and not isinstance(exponent, bool)
    return _homogeneous(use) if is_number else use.nothing()


def _clamp(use: Use) -> Blind:
    """The positive or the negative part."""
    bounds = [use.named.get(name) for name in ("min", "max")]
    return _homogeneous(use) if all(b is None or _is_zero(b) for b in bounds) else use.nothing()


def _threshold(use: Use) -> Blind:
    at_zero = _is_zero(use.named["threshold"]) and _is_zero(use.named["value"])
    return _homogeneous(use) if at_zero else use.nothing()


def _masked(use: Use) -> Blind:
    return _homogeneous(use) if _is_zero(use.named["value"]) else use.nothing()


def _is_zero(number: Any) -> bool:
    return isinstance(number, (int, float)) and number == 0


# ---------------------------------------------------------------------------- moves


def _view(use: Use) -> Blind:
    return use.moved(lambda blocks: blocks.viewed(use.made, use.shape))


def _arranged(use: Use) -> Blind:
    order = g.permutation(use.user, len(use.shape))
    return use.moved(lambda blocks: blocks.arranged(order))


def _slice(use: Use) -> Blind:
    named = use.named
    dim, size = named["dim"] % len(use.shape), use.shape[named["dim"]]
    if g.packet(use.user) is aten.narrow:
        cut: tuple[Any, ...] = (named["start"], named["start"] + named["length"] or None, 1)
    else:
        cut = (named.get("start"), named.get("end"), named.get("step", 1))
    plain = [size, *(number for number in cut if number is not None)]
    if not all(isinstance(number, int) for number in plain):
        return use.moved(lambda blocks: blocks.shared([dim]))
    positions = range(size)[slice(*cut)]
    if len(positions) != use.made[dim]:
        return use.nothing()
    return use.moved(lambda blocks: blocks.picked(dim, positions, size))


def _select(use: Use) -> Blind:
    dim, index = use.named["dim"] % len(use.shape), use.named["index"]
    return _chosen(use, use.out, dim, index)


def _chosen(use: Use, out: Blind, dim: int, index: Any) -> Blind:
    """One index of a dim was taken, without the dim."""
    size = use.shape[dim]

    def move(blocks: Partition) -> Partition:
        wide = blocks.unsqueezed(dim)
        if not isinstance(size, int) or not isinstance(index, int):
            return wide
        return wide.picked(dim, [index % size], size)

    return Blind(move(out.scale), move(out.shift), out.norms)


def _split(use: Use) -> Blind:
    """All parts together: each reads some positions of the dim."""
    dim = use.named.get("dim", 0)
    held: Any = g.value(use.user)
    blind = use.unread()
    if not isinstance(dim, int) or not isinstance(held, (list, tuple)):
        return use.nothing()
    dim %= len(use.shape)
    for part in use.user.users:
        if part.target is not operator.getitem or not isinstance(part.args[1], int):
            return use.nothing()
        index, out = part.args[1] % len(held), use.found.get(part)
        if out is None:
            return use.nothing()
        if g.packet(use.user) is aten.unbind:
            blind = blind.join(_chosen(use, out, dim, index))
            continue
        size, sizes = use.shape[dim], [piece.shape[dim] for piece in held]
        start = sum(sizes[:index]) if all(isinstance(s, int) for s in sizes) else None

        def move(
            blocks: Partition, start: Any = start, size: Any = size, length: Any = sizes[index]
        ) -> Partition:
            if start is None:
                return blocks.shared([dim])
            return blocks.picked(dim, range(start, start + length), size)

        blind = blind.join(Blind(move(out.scale), move(out.shift), out.norms))
    return blind


def _cat(use: Use) -> Blind:
    terms: Any = use.named["tensors"]
    dim, stacked = use.named["dim"], g.packet(use.user) is aten.stack
    dim %= len(use.made)
    shapes = [g.shape(term) for term in terms]
    if any(shape is None or len(shape) != len(use.shape) for shape in shapes):
        return use.nothing()  # an empty tensor without dims may stand beside others
    sizes = [1 if stacked else shape[dim] for shape in shapes if shape is not None]

    def move(blocks: Partition) -> Partition:
        if dim not in blocks.free and not all(isinstance(size, int) for size in sizes):
            return Partition.none(len(use.shape))
        start = 0 if dim in blocks.free else sum(sizes[: use.index])
        total = 0 if dim in blocks.free else sum(sizes)
        found = blocks.part(dim, start, sizes[use.index], total)
        return found.squeezed(dim) if stacked else found

    return use.moved(move)


def _reordered(use: Use) -> Blind:
    """A dim in another order, or some of it several times: as if all of it were one."""
    dims = normal_dims(use.named.get("dims", use.named.get("dim")), len(use.shape))
    return use.moved(lambda blocks: blocks.shared(dims))


# ---------------------------------------------------------------------------- sums over dims


def _reduced(use: Use) -> Blind:
    """A sum, a mean, a maximum or a norm of what shares a factor."""
    rank, blocks = len(use.shape), use.out.scale
    dims = normal_dims(use.named.get("dim"), rank)
    if not use.named.get("keepdim"):
        for dim in sorted(dims):
            blocks = blocks.unsqueezed(dim)
    return use.scale(blocks.shared(dims))


def _over_last(count: int) -> Law:
    """A linear operator or a maximum along the last dims."""
    return lambda use: use.scale(use.out.scale.shared(range(-count, 0)))


def _padded(use: Use) -> Blind:
    named = use.named
    if named.get("mode", "constant") == "constant" and not _is_zero(named.get("value") or 0):
        return use.nothing()
    dims = [len(use.shape) - 1 - i // 2 for i, size in enumerate(named["pad"]) if size != 0]
    return use.scale(use.out.scale.shared(dims))


# ---------------------------------------------------------------------------- products


def _linear_input(use: Use) -> Blind:
    if len(g.shape(use.named["weight"]) or ()) != 2:
        return use.nothing()
    return use.scale(_before_bias(use, -1).shared([-1]))


def _linear_weight(use: Use) -> Blind:
    if len(use.shape) != 2:
        return use.nothing()
    return use.scale(_before_bias(use, -1).placed(2, {len(use.made) - 1: 0}))


def _linear_bias(use: Use) -> Blind:
    return _bias(use, -1)


def _before_bias(use: Use, channel: int) -> Partition:
    """Of u in u + bias, where the bias runs along one dim."""
    bias = use.named.get("bias")
    if bias is None:
        return use.out.scale
    shape = g.shape(bias) or ()
    if len(shape) != 1:
        return Partition.none(len(use.made))
    behind = len(use.made) - 1 - channel % len(use.made)
    return _beside(use.out, shape + (1,) * behind, use.made)


def _bias(use: Use, channel: int) -> Blind:
    if len(use.shape) != 1:
        return use.nothing()
    behind = len(use.made) - 1 - channel % len(use.made)
    aligned = use.shape + (1,) * behind
    shift = use.out.shift.broadcast(aligned).viewed(aligned, use.shape)
    return Blind(Partition.none(1), shift, use.out.norms)


def _addmm(use: Use) -> Blind:
    """Beta * bias + alpha * a @ b."""
    summand = g.shape(use.named["self"]) or ()
    blocks = _beside(use.out, summand, use.made)
    if use.name == "mat1":
        return use.scale(blocks.shared([1]))
    if use.name == "mat2":
        return use.scale(blocks.shared([0]))
    shift = use.out.shift.broadcast(use.shape)
    return Blind(Partition.none(len(use.shape)), shift, use.out.norms)


def _product(use: Use) -> Blind:
    """A product of matrices, in batches that may be broadcast."""
    operands: Any = use.user.args[:2]
    if any(len(g.shape(operand) or ()) < 2 for operand in operands):
        return use.nothing()
    contracted = -1 if use.name == "self" else -2
    blocks = use.out.scale.shared([contracted]).broadcast(use.shape)
    # one vector added to all rows of a is one row added to all of a @ b; so for the columns of b
    other = -3 - contracted
    added = Partition.sharing(len(use.made), [len(use.made) + other])
    seen = use.out.shift.join(added)
    if seen.free != added.free or seen.labels.numel() > 1 or not seen.is_complete():
        return use.scale(blocks)
    return Blind(blocks, Partition.sharing(len(use.shape), [len(use.shape) + other]), use.out.norms)


def _softmax(use: Use) -> Blind:
    """A softmax does not see what is added to all that it normalizes."""
    rank = len(use.shape)
    shift = Partition.sharing(rank, [use.named["dim"] % rank])
    return Blind(Partition.none(rank), shift)


def _key(use: Use) -> Blind:
    """Attention does not see what is added to all keys: q (k + t)^T, of which it takes softmax."""
    rank = len(use.shape)
    return Blind(Partition.none(rank), Partition.sharing(rank, [rank - 2]))


def _attended(use: Use) -> Blind:
    """Attention is linear in the values, which it sums over tokens."""
    if use.named.get("enable_gqa") or len(use.shape) != len(use.made):
        return use.nothing()
    return use.scale(use.out.scale.shared([-2]).broadcast(use.shape))


def _einsum(use: Use) -> Blind:
    """A sum of products, of two operands."""
    equation = einsum_equation(use.user)
    operands: Any = use.named["tensors"]
    if equation is None or len(operands) != 2:
        return use.nothing()
    inputs, _, output = equation.partition("->")
    word = inputs.split(",")[use.index]
    shapes = [g.shape(operand) or () for operand in operands]
    sizes: dict[str, Any] = {}
    for letters, shape in zip(inputs.split(","), shapes, strict=True):
        if len({*letters}) != len(letters) or len(letters) != len(shape):
            return use.nothing()
        if any(str(sizes.setdefault(c, n)) != str(n) for c, n in zip(letters, shape, strict=True)):
            return use.nothing()  # one of size one is repeated
    both = {d: word.index(letter) for d, letter in enumerate(output) if letter in word}
    return use.scale(use.out.scale.placed(len(word), both))


def _embedded(use: Use) -> Blind:
    """Rows of a table: each by itself only where each token is, whichever row it is."""
    tokens = len(use.made) - 1
    by_token = use.out.scale.free.issuperset(range(tokens))
    placed = use.out.scale.placed(2, {tokens: 1})
    rows = frozenset({0}) if by_token else frozenset()
    return use.scale(Partition(placed.labels, placed.free | rows))


# ---------------------------------------------------------------------------- convolutions


def _conv(use: Use) -> tuple[int, int, Partition]:
    """(number of spatial dims, dim of the channels, blocks before the bias is added)."""
    spatial = len(g.shape(use.named["weight"]) or ()) - 2
    channel = len(use.made) - spatial - 1
    return spatial, channel, _before_bias(use, channel)


def _conv_input(use: Use) -> Blind:
    """The channels of a group, and all places, share a factor."""
    spatial, channel, blocks = _conv(use)
    blocks = blocks.shared(range(len(use.made) - spatial, len(use.made)))
    groups = use.named["groups"]

    def cut(shape: tuple[Any, ...]) -> tuple[Any, ...]:
        count = shape[channel] // groups
        return (*shape[:channel], groups, count, *shape[channel + 1 :])

    by_group = blocks.viewed(use.made, cut(use.made)).shared([channel + 1])
    return use.scale(by_group.viewed(cut(use.shape), use.shape))


def _conv_weight(use: Use) -> Blind:
    _, channel, blocks = _conv(use)
    return use.scale(blocks.placed(len(use.shape), {channel: 0}))


def _transposed_weight(use: Use) -> Blind:
    """(in, out of a group, ...): the outputs are numbered by (group of the inputs, out)."""
    _, channel, blocks = _conv(use)
    groups = use.named["groups"]
    made, shape = use.made, use.shape
    cut = (*made[:channel], groups, shape[1], *made[channel + 1 :])
    wide = (groups, shape[0] // groups, *shape[1:])
    by_group = blocks.viewed(made, cut).placed(len(wide), {channel: 0, channel + 1: 2})
    return use.scale(by_group.viewed(wide, shape))


def _conv_bias(use: Use) -> Blind:
    return _bias(use, _conv(use)[1])


# ---------------------------------------------------------------------------- the table

SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split})
_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
_TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})


def _all(*packets: Any, **laws: Law) -> dict[Any, dict[str, Law]]:
    """The same laws, by the names of arguments, for several operators."""
    return {packet: laws for packet in packets}


def _upsampled(*packets: Any, spatial: int) -> dict[Any, dict[str, Law]]:
    """Interpolations: an overload names its argument otherwise."""
    return _all(*packets, self=_over_last(spatial), input=_over_last(spatial))


# What is known of an operator's arguments. Any other sees every change.
LAWS: dict[Any, dict[str, Law]] = {
    **_all(norm, x=_normalized, weight=_norm_weight, bias=_norm_bias),
    # the same numbers
    **_all(aten.clone, aten.contiguous, aten.alias, aten.detach, aten.expand, self=_same),
    **_all(aten.to, aten._to_copy, self=_same),
    **_all(aten.type_as, aten.expand_as, self=_same, other=Use.unread),
    **_all(aten.dropout, aten.feature_dropout, input=_dropout),
    # the same numbers elsewhere
    **_all(*VIEWS, self=_view, other=Use.unread),
    **_all(*ARRANGEMENTS, self=_arranged),
    **_all(aten.slice, aten.narrow, self=_slice),
    **_all(aten.select, self=_select),
    **_all(*SPLITS, self=_split),
    **_all(aten.cat, aten.concat, aten.stack, tensors=_cat),
    **_all(aten.flip, aten.roll, aten.index_select, self=_reordered),
    # sums and multiples
    **_all(aten.add, aten.sub, aten.subtract, aten.rsub, self=_summand, other=_summand),
    **_all(aten.mul, aten.multiply, self=_factor, other=_factor),
    **_all(aten.div, aten.divide, aten.true_divide, self=_factor, other=_factor),
    # h(c*x) = c^k * h(x)
    **_all(aten.relu, aten.leaky_relu, aten.prelu, aten.abs, aten.absolute, self=_homogeneous),
    **_all(aten.neg, aten.negative, aten.square, aten.sqrt, aten.rsqrt, self=_homogeneous),
    **_all(aten.reciprocal, self=_homogeneous),
    **_all(aten.pow, self=_power),
    **_all(aten.clamp, aten.clamp_min, aten.clamp_max, aten.clip, self=_clamp),
    **_all(aten.threshold, self=_threshold),
    **_all(aten.masked_fill, self=_masked),
    # along dims
    **_all(aten.mean, aten.sum, aten.amax, aten.amin, aten.linalg_vector_norm, self=_reduced),
    **_all(aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d, self=_over_last(1)),
    **_all(aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, self=_over_last(2)),
    **_all(aten.max_pool3d, aten.avg_pool3d, aten.adaptive_avg_pool3d, self=_over_last(3)),
    **_upsampled(aten.upsample_nearest1d, aten.upsample_linear1d, spatial=1),
    **_upsampled(aten.upsample_nearest2d, aten.upsample_bilinear2d, spatial=2),
    **_upsampled(aten.upsample_nearest3d, aten.upsample_trilinear3d, spatial=3),
    **_all(aten.pad, aten.constant_pad_nd, self=_padded),
    # products
    **_all(aten.linear, input=_linear_input, weight=_linear_weight, bias=_linear_bias),
    **_all(aten.addmm, self=_addmm, mat1=_addmm, mat2=_addmm),
    **_all(aten.matmul, self=_product, other=_product),
    **_all(aten.mm, aten.bmm, self=_product, mat2=_product),
    **_all(aten.einsum, tensors=_einsum),
    **_all(aten.softmax, aten._softmax, aten.log_softmax, self=_softmax),
    **_all(aten.scaled_dot_product_attention, key=_key, value=_attended),
    **_all(aten.embedding, weight=_embedded),
    **_all(*_CONVOLUTIONS, input=_conv_input, weight=_conv_weight, bias=_conv_bias),
    **_all(*_TRANSPOSED, input=_conv_input, weight=_transposed_weight, bias=_conv_bias),
    # only the shape
    **_all(aten.sym_size, aten.sym_numel, aten.sym_stride, self=Use.unread),
    **_all(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, self=Use.unread),
    **_all(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, self=Use.unread),
}
