"""Laws of sums, products with a factor, choices and concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks, concatenated
from normfx.analyses.carried.law import PRODUCTS, Carried, Parts, Path, is_float, narrowed, widened
from normfx.analyses.carried.moves import same
from normfx.layout import is_one, plain

aten = torch.ops.aten


def add(node: fx.Node) -> Carried | None:
    """A + b and a - b."""
    terms = node.args[:2]
    shapes, new = [g.shape(t) for t in terms], g.shape(node)
    if new is None or not all(isinstance(t, fx.Node) and is_float(t) for t in terms):
        return None
    if isinstance(g.arguments(node).get("alpha", 1), fx.Node):
        return None
    return _sum(new, [((i,), shape) for i, shape in enumerate(shapes)])


def _sum(new: Sequence[Any], terms: Sequence[tuple[Path, Any]]) -> Carried:
    """A sum of operands, each broadcast to the result."""

    def back(blocks: Blocks) -> Parts:
        return [narrowed(blocks, new, shape) for _, shape in terms]

    def forth(parts: Parts) -> Blocks | None:
        found: Blocks | None = None
        for part, (_, shape) in zip(parts, terms, strict=True):
            wide = None if part is None else widened(part, shape, new)
            found = wide if found is None or wide is None else found.join(wide, new)
            if found is None:
                return None
        return found

    return Carried(tuple(path for path, _ in terms), back, forth)


def scaled(node: fx.Node) -> Carried | None:
    """A product with a factor that is one number for each block; a quotient likewise."""
    a, b = node.args[:2]
    new = g.shape(node)
    is_product = g.packet(node) in PRODUCTS
    if new is None or g.arguments(node).get("rounding_mode") is not None:
        return None
    if not isinstance(b, fx.Node) or g.tensor(b) is None:
        return same(node)
    if not isinstance(a, fx.Node) or g.tensor(a) is None:
        return None
    # the operand with the larger shape is the value; of two as large, the first that varies
    values = [(0, a, b)]
    if is_product and _count(g.shape(b)) > _count(g.shape(a)):
        values = [(1, b, a)]
    ((position, value, factor),) = values
    if not is_float(value):
        return None
    shape, of_factor = g.shape(value), g.shape(factor)
    assert shape is not None
    assert of_factor is not None

    def within(blocks: Blocks) -> bool:
        missing = len(new) - len(of_factor)
        return all(d < missing or is_one(of_factor[d - missing]) for d in blocks.labelled())

    def back(blocks: Blocks) -> Parts:
        return [narrowed(blocks, new, shape) if within(blocks) else None]

    def forth(parts: Parts) -> Blocks | None:
        wide = None if parts[0] is None else widened(parts[0], shape, new)
        return wide if wide is not None and within(wide) else None

    return Carried(((position,),), back, forth)


def _count(shape: Sequence[Any] | None) -> int:
    """How many dims are no single number."""
    return sum(not is_one(size) for size in shape or ())


def where(node: fx.Node) -> Carried | None:
    """One of two operands, by a condition that is one for each block."""
    condition, *terms = node.args
    new, of_condition = g.shape(node), g.shape(condition)
    if new is None or of_condition is None or not all(isinstance(t, fx.Node) for t in terms):
        return None
    if not all(is_float(t) for t in terms):
        return None
    return _chosen(
        new, of_condition, _sum(new, [((i + 1,), g.shape(t)) for i, t in enumerate(terms)])
    )


def masked_fill(node: fx.Node) -> Carried | None:
    """The operand, or a number, by a mask that is one for each block."""
    new, of_mask = g.shape(node), g.shape(node.args[1])
    if new is None or of_mask is None:
        return None
    found = _chosen(new, of_mask, _sum(new, [((0,), g.shape(node.args[0]))]))
    value = node.args[2]
    if isinstance(value, (int, float)) and value == 0:
        return found
    return Carried(found.paths, found.back, lambda _: None)


def _chosen(new: Sequence[Any], condition: Sequence[Any], found: Carried) -> Carried:
    """A law under a condition, which has to be one for each block."""
    missing = len(new) - len(condition)

    def within(blocks: Blocks) -> bool:
        return all(d < missing or is_one(condition[d - missing]) for d in blocks.labelled())

    def back(blocks: Blocks) -> Parts:
        return found.back(blocks) if within(blocks) else [None] * len(found.paths)

    def forth(parts: Parts) -> Blocks | None:
        blocks = found.forth(parts)
        return blocks if blocks is not None and within(blocks) else None

    return Carried(found.paths, back, forth)


def cat(node: fx.Node) -> Carried | None:
    """Operands beside each other along a dim."""
    terms: Any = node.args[0]
    shapes, new = [g.shape(t) for t in terms], g.shape(node)
    if new is None or not all(is_float(t) for t in terms):
        return None
    if any(shape is None or len(shape) != len(new) for shape in shapes):
        return None  # an empty vector beside others
    dim = g.arguments(node).get("dim", 0) % len(new)
    sizes = [plain(shape[dim]) for shape in shapes if shape is not None]
    paths = tuple((0, i) for i in range(len(terms)))

    def back(blocks: Blocks) -> Parts:
        if blocks.is_free(dim):
            return [blocks for _ in terms]
        found: Parts = []
        start = 0
        for size in sizes:
            found.append(blocks.taken(dim, range(start, start + size)))
            start += size
        return found

    def forth(parts: Parts) -> Blocks | None:
        known = [part for part in parts if part is not None]
        of_some = known and len(known) < len(parts) and _is_small(known[0], new[dim])
        if of_some or any(not part.is_free(dim) for part in known):
            return concatenated(parts, dim, [shape for shape in shapes if shape is not None])
        return _all(parts, new)

    return Carried(paths, back, forth)


# Labels for each token, where some of the tokens have mean zero and are cut out again later, cost
# about a millisecond for this many.
_FEW_LABELS = 1 << 16


def _is_small(blocks: Blocks, size: Any) -> bool:
    """Whether a dim may be labelled for the sake of a part of it."""
    size = plain(size)
    return isinstance(size, int) and blocks.labels.numel() * size <= _FEW_LABELS


def _all(parts: Parts, shape: Sequence[Any]) -> Blocks | None:
    """What holds for all operands."""
    found = parts[0]
    for part in parts[1:]:
        found = None if found is None or part is None else found.join(part, shape)
    return found


def stack(node: fx.Node) -> Carried | None:
    """Operands beside each other along a new dim."""
    terms: Any = node.args[0]
    new = g.shape(node)
    if new is None or not all(is_float(t) for t in terms):
        return None
    dim = g.arguments(node).get("dim", 0) % len(new)

    def back(blocks: Blocks) -> Parts:
        if blocks.is_free(dim):
            return [blocks.squeezed(dim) for _ in terms]
        return [blocks.taken(dim, range(i, i + 1)).squeezed(dim) for i in range(len(terms))]

    def forth(parts: Parts) -> Blocks | None:
        return _all([None if part is None else part.unsqueezed(dim) for part in parts], new)

    return Carried(tuple((0, i) for i in range(len(terms))), back, forth)
