"""The table of laws, and which of them is that of a node."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks
from normfx.analyses.carried import moves, products, sums
from normfx.analyses.carried.law import PRODUCTS, Carried, Parts, Use, is_float, narrowed
from normfx.laws import ARRANGEMENTS, ASKS, VIEWS
from normfx.layout import is_one, plain

aten = torch.ops.aten


def carried(node: fx.Node, constant: set[fx.Node]) -> tuple[Carried, tuple[Use, ...]] | None:
    """The law of a node and the uses it is about; None if it has none: it sees all that it reads.

    Args:
        node: an operator.
        constant: the nodes that depend on parameters alone.
    """
    if g.is_call(node, operator.getitem):
        law: Carried | None = moves.part(node)
        if law is None:
            return None
        return law, (Use(node.args[0], (0,)),)  # pyright: ignore[reportArgumentType]
    rule = _LAWS.get(g.packet(node))
    if rule is None or not is_float(node) or g.shape(node) is None:
        return None
    if g.packet(node) in PRODUCTS:
        into_weight = _channel_scale(node, constant)
        if into_weight is not None:
            return into_weight
    law = rule(node)
    return None if law is None else (law, tuple(Use(node, path) for path in law.paths))


def _channel_scale(node: fx.Node, constant: set[fx.Node]) -> tuple[Carried, tuple[Use, ...]] | None:
    """A product with a constant for each channel: it goes into the weight that makes these."""
    a, b = node.args
    value, factor = (b, a) if a in constant else (a, b)
    new, shape = g.shape(node), g.shape(factor)
    if value in constant or factor not in constant or new is None or shape is None:
        return None
    varies = [len(new) - len(shape) + d for d, size in enumerate(shape) if not is_one(size)]
    count = plain(new[varies[0]]) if len(varies) == 1 else None
    if not isinstance(count, int) or not isinstance(value, fx.Node):
        return None
    numbers = Blocks.each(len(new), varies[0], count)
    chain: list[Carried] = []
    seen: Blocks | None = narrowed(numbers, new, g.shape(value))
    if seen is None or len(g.shape(value) or ()) != len(new) or g.dtype(value) != g.dtype(node):
        return None
    while g.packet(value) in _MOVES and len(value.users) == 1:
        law = _LAWS[g.packet(value)](value)
        if law is None or seen is None or law.paths != ((0,),):
            return None
        chain.append(law)
        seen, value = law.back(seen)[0], value.args[0]
        assert isinstance(value, fx.Node)
    writer = _LAWS[g.packet(value)](value) if g.packet(value) in _WEIGHTED else None
    if writer is None or seen is None or len(value.users) != 1 or not factor < value:
        return None
    uses = tuple(Use(value, path, factor, node) for path in writer.paths)
    kept = [writer.back(seen)[i] for i in range(len(uses))]
    for use, blocks in zip(uses, kept, strict=True):
        if use.value not in constant or g.dtype(use.value) is torch.float16 or blocks is None:
            return None
        if blocks.labels.flatten().tolist() != list(range(count)):
            return None  # the channels are not the outputs, in order

    def back(blocks: Blocks) -> Parts:
        found: Blocks | None = blocks
        for law in chain:
            found = None if found is None else law.back(found)[0]
        return [None] * len(uses) if found is None else writer.back(found)

    def forth(parts: Parts) -> Blocks | None:
        found = writer.forth(parts)
        for law in reversed(chain):
            found = None if found is None else law.forth([found])
        return found

    return Carried(writer.paths, back, forth), uses


def reads_numbers(node: fx.Node, position: int) -> bool:
    """Whether a node reads the numbers of an argument, and not the shape or dtype alone."""
    packet = g.packet(node)
    return packet not in ASKS and not (packet in _LIKE and position == 1)


_LIKE = frozenset({aten.view_as, aten.reshape_as, aten.expand_as, aten.type_as})
_WEIGHTED = frozenset(
    {
        aten.linear,
        aten.addmm,
        aten.mm,
        aten.matmul,
        aten.conv1d,
        aten.conv2d,
        aten.conv3d,
        aten.conv_transpose1d,
        aten.conv_transpose2d,
        aten.conv_transpose3d,
    }
)
# What may stand between such an operator and a factor for each of its channels.
_MOVES = frozenset({*VIEWS, *ARRANGEMENTS, aten.dropout, aten.clone, aten.contiguous, aten.alias})

_LAWS: dict[Any, Callable[[fx.Node], Carried | None]] = {
    # the same numbers, or a multiple of all
    **dict.fromkeys(
        (
            aten.to,
            aten._to_copy,
            aten.type_as,
            aten.clone,
            aten.contiguous,
            aten.alias,
            aten.detach,
            aten.neg,
            aten.positive,
            aten.lift_fresh_copy,
        ),
        moves.same,
    ),
    **dict.fromkeys((aten.dropout, aten.feature_dropout), moves.dropout),
    # the same numbers elsewhere
    **dict.fromkeys(VIEWS, moves.view),
    **dict.fromkeys(ARRANGEMENTS, moves.permute),
    aten.expand: moves.expand,
    aten.expand_as: moves.expand,
    aten.repeat: moves.repeat,
    aten.slice: moves.slice,
    aten.narrow: moves.slice,
    aten.select: moves.select,
    aten.gather: moves.gather,
    aten.index: moves.index,
    aten.index_select: moves.index_select,
    aten.roll: moves.roll,
    aten.flip: moves.roll,
    aten.pad: moves.pad,
    aten.constant_pad_nd: moves.pad,
    aten.cat: sums.cat,
    aten.concat: sums.cat,
    aten.stack: sums.stack,
    # sums, products, choices
    aten.add: sums.add,
    aten.sub: sums.add,
    aten.mul: sums.scaled,
    aten.multiply: sums.scaled,
    aten.div: sums.scaled,
    aten.divide: sums.scaled,
    aten.true_divide: sums.scaled,
    aten.where: sums.where,
    aten.masked_fill: sums.masked_fill,
    aten.mean: moves.reduce,
    aten.sum: moves.reduce,
    aten.avg_pool1d: moves.spatial(1),
    aten.avg_pool2d: moves.spatial(2),
    aten.avg_pool3d: moves.spatial(3),
    aten.adaptive_avg_pool1d: moves.spatial(1),
    aten.adaptive_avg_pool2d: moves.spatial(2),
    aten.adaptive_avg_pool3d: moves.spatial(3),
    aten.upsample_nearest2d: moves.spatial(2),
    aten.upsample_bilinear2d: moves.spatial(2),
    aten.upsample_bicubic2d: moves.spatial(2),
    # products.linear in a weight
    aten.linear: products.linear,
    aten.addmm: products.addmm,
    aten.mm: products.matmul,
    aten.bmm: products.matmul,
    aten.matmul: products.matmul,
    aten.scaled_dot_product_attention: products.attention,
    aten.embedding: products.embedding,
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), products.conv),
    **dict.fromkeys(
        (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
        products.conv_transpose,
    ),
}
