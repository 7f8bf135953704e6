"""Laws of operators with one operand: the same numbers elsewhere, some of them, or their means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks
from normfx.analyses.carried.law import (
    Carried,
    is_float,
    narrowed,
    one,
    widened,
    with_leading,
    without_leading,
)
from normfx.layout import is_one, plain

aten = torch.ops.aten


def same(node: fx.Node) -> Carried | None:
    """The result has the numbers of the operand, in their places."""
    if not node.args or not is_float(node.args[0]) or g.shape(node.args[0]) is None:
        return None
    if len(g.shape(node.args[0]) or ()) != len(g.shape(node) or ()):
        return None
    return one(0, lambda b: b, lambda b: b)


def dropout(node: fx.Node) -> Carried | None:
    """In evaluation, the same numbers."""
    return None if node.args[2] else same(node)


def view(node: fx.Node) -> Carried | None:
    """The same numbers in another shape."""
    old, new = g.shape(node.args[0]), g.shape(node)
    if old is None or new is None or not is_float(node.args[0]):
        return None
    return one(0, lambda b: b.viewed(new, old), lambda b: b.viewed(old, new))


def permute(node: fx.Node) -> Carried | None:
    """The same numbers with the dims in another order."""
    order = g.permutation(node, len(g.shape(node) or ()))
    return one(0, lambda b: b.inverse_permuted(order), lambda b: b.permuted(order))


def expand(node: fx.Node) -> Carried | None:
    """Each number several times, along new dims or dims of size one."""
    old, new = g.shape(node.args[0]), g.shape(node)
    if old is None or new is None:
        return None
    return one(0, lambda b: narrowed(b, new, old), lambda b: widened(b, old, new))


def repeat(node: fx.Node) -> Carried | None:
    """Whole copies beside each other, along free dims."""
    old, new = g.shape(node.args[0]), g.shape(node)
    if old is None or new is None:
        return None
    extra = len(new) - len(old)
    same = [str(a) == str(b) for a, b in zip(new[extra:], old, strict=True)]

    def back(blocks: Blocks) -> Blocks:
        kept = without_leading(blocks, extra)
        for dim, is_same in enumerate(same):
            kept = kept if is_same else kept.free(dim)
        return kept

    def forth(blocks: Blocks) -> Blocks:
        for dim, is_same in enumerate(same):
            blocks = blocks if is_same else blocks.free(dim)
        return with_leading(blocks, extra)

    return one(0, back, forth)


def slice(node: fx.Node) -> Carried | None:
    """A stretch of a dim."""
    named = g.arguments(node)
    old, new = g.shape(node.args[0]), g.shape(node)
    if old is None or new is None or not old:
        return None
    dim = named.get("dim", 0) % len(old)
    start, size = named.get("start"), plain(new[dim])
    if named.get("step", 1) != 1:
        start = None if plain(old[dim]) != size else 0
    elif start is None:
        start = 0
    return _cut(old, dim, start, size)


def _cut(old: Sequence[Any], dim: int, start: Any, size: Any) -> Carried:
    """A slice along a dim; where it begins matters only if a block runs along that."""
    whole = plain(old[dim])
    known = all(isinstance(number, int) for number in (start, size, whole))
    begin = max(min(start + whole if start < 0 else start, whole), 0) if known else 0
    known = known and begin + size <= whole
    indices = range(begin, begin + size) if known else range(0)

    def back(blocks: Blocks) -> Blocks | None:
        if known and (not blocks.is_free(dim) or _may_be_cut(old, dim)):
            return blocks.placed(dim, indices, whole)
        return blocks if blocks.is_free(dim) else None

    def forth(blocks: Blocks) -> Blocks | None:
        if blocks.is_free(dim):
            return blocks
        return blocks.taken(dim, indices) if known else None

    return one(0, back, forth)


# A longer dim than this, if not the last, is one of tokens: that some are read by nobody is not
# worth a label for each of them.
_FEW = 64


def _may_be_cut(shape: Sequence[Any], dim: int) -> bool:
    """Whether a dim may be one of outputs of a fused projection: its parts have other readers."""
    size = plain(shape[dim])
    return isinstance(size, int) and (dim == len(shape) - 1 or size <= _FEW)


def select(node: fx.Node) -> Carried | None:
    """One index of a dim."""
    named = g.arguments(node)
    old = g.shape(node.args[0])
    if old is None:
        return None
    return _index_of(old, named["dim"] % len(old), named["index"])


def _index_of(old: Sequence[Any], dim: int, index: Any) -> Carried:
    """One index of a dim, which is no dim of the result."""
    whole = plain(old[dim])
    known = isinstance(index, int) and isinstance(whole, int)
    at = index % whole if known else 0
    indices = range(at, at + 1)

    def back(blocks: Blocks) -> Blocks | None:
        lifted = blocks.unsqueezed(dim)
        if known and _may_be_cut(old, dim):
            return lifted.placed(dim, indices, whole)
        return lifted

    def forth(blocks: Blocks) -> Blocks | None:
        if blocks.is_free(dim):
            return blocks.squeezed(dim)
        return blocks.taken(dim, indices).squeezed(dim) if known else None

    return one(0, back, forth)


def part(node: fx.Node) -> Carried | None:
    """One of the tensors that a split makes: a slice of what was split."""
    source, index = node.args
    if not isinstance(source, fx.Node) or g.packet(source) not in _SPLITS:
        return None
    old, parts = g.shape(source.args[0]), g.value(source)
    if old is None or not isinstance(index, int) or not is_float(node):
        return None
    dim = g.arguments(source).get("dim", 0)
    if not isinstance(dim, int):
        return None
    dim %= len(old)
    if g.packet(source) is aten.unbind:
        found = _index_of(old, dim, index % len(parts))
    else:
        index %= len(parts)
        sizes = [plain(part.shape[dim]) for part in parts]
        start = sum(sizes[:index]) if all(isinstance(s, int) for s in sizes) else None
        found = _cut(old, dim, start, sizes[index])
    return Carried(((0, -1),), found.back, found.forth)


def index(node: fx.Node) -> Carried | None:
    """Rows picked by one tensor of indices, or several beside each other."""
    old, new = g.shape(node.args[0]), g.shape(node)
    indices: Any = node.args[1]
    if old is None or new is None or not is_float(node.args[0]):
        return None
    used = [i for i, index in enumerate(indices) if index is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    masks = [g.dtype(indices[i]) in (torch.bool, torch.uint8) for i in used]
    if any(masks) and len(used) > 1:
        return None
    first = used[0]
    taken = len(g.shape(indices[first]) or ()) if any(masks) else len(used)
    made = len(new) - (len(old) - taken)
    return _rows(len(old), len(new), first, taken, made)


def _rows(old: int, new: int, first: int, taken: int, made: int) -> Carried:
    """`taken` dims from `first` on become `made` others; all of them are free."""

    def exchanged(blocks: Blocks, gone: int, there: int) -> Blocks | None:
        for dim in range(first, first + gone):
            blocks = blocks.free(dim)
        sizes = list(blocks.labels.shape)
        return Blocks(blocks.labels.reshape([*sizes[:first], *[1] * there, *sizes[first + gone :]]))

    return one(0, lambda b: exchanged(b, made, taken), lambda b: exchanged(b, taken, made))


def gather(node: fx.Node) -> Carried | None:
    """Rows picked by indices that were expanded along the rows."""
    named = g.arguments(node)
    old, new, index = g.shape(node.args[0]), g.shape(node), named["index"]
    if old is None or new is None or len(old) != len(new) or not is_float(node.args[0]):
        return None
    dim = named["dim"] % len(new)
    alike = [
        d != dim and str(old[d]) == str(new[d]) and _is_constant_along(index, d)
        for d in range(len(new))
    ]

    def picked(blocks: Blocks) -> Blocks:
        for d, is_alike in enumerate(alike):
            blocks = blocks if is_alike else blocks.free(d)
        return blocks

    return one(0, picked, picked)


def _is_constant_along(node: Any, dim: int) -> bool:
    """Whether a value was made by repeating one index along a dim."""
    new = g.shape(node)
    while g.packet(node) in (aten.expand, aten.repeat, aten.tile, aten.to, aten.clone):
        node = node.args[0]
        old = g.shape(node)
        if new is None or old is None or len(old) + dim < len(new):
            return old is not None
        if is_one(old[len(old) - len(new) + dim]):
            return True
        dim += len(old) - len(new)
        new = old
    return False


def index_select(node: fx.Node) -> Carried | None:
    """Some indices of a dim."""
    named = g.arguments(node)
    old = g.shape(node.args[0])
    if old is None or not isinstance(named["dim"], int):
        return None
    dim = named["dim"] % len(old)
    return _along_free((dim,))


def _along_free(dims: Sequence[int]) -> Carried:
    """What happens along some dims stays within a block if no block runs along these."""

    def same(blocks: Blocks) -> Blocks:
        for dim in dims:
            blocks = blocks.free(dim)
        return blocks

    return one(0, same, same)


def reduce(node: fx.Node) -> Carried | None:
    """A mean or a sum over dims that no block runs along."""
    named = g.arguments(node)
    old = g.shape(node.args[0])
    dims = named.get("dim")
    if old is None or not is_float(node.args[0]):
        return None
    over = range(len(old)) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
    over = sorted({d % len(old) for d in over})
    keep = bool(named.get("keepdim"))

    def back(blocks: Blocks) -> Blocks:
        for dim in () if keep else over:
            blocks = blocks.unsqueezed(dim)
        return blocks

    def forth(blocks: Blocks) -> Blocks:
        for dim in reversed(over):
            blocks = blocks.free(dim)
            blocks = blocks if keep else blocks.squeezed(dim)
        return blocks

    return one(0, back, forth)


def spatial(count: int) -> Callable[[fx.Node], Carried | None]:
    """Linear along the last dims (pooling, interpolation), for each channel alike."""

    def law(node: fx.Node) -> Carried | None:
        rank = len(g.shape(node) or ())
        named = g.arguments(node)
        if rank < count or named.get("divisor_override"):
            return None
        return _along_free(range(rank - count, rank))

    return law


def roll(node: fx.Node) -> Carried | None:
    """The same numbers at other indices of a dim that no block runs along."""
    dims: Any = g.arguments(node).get("dims") or ()
    rank = len(g.shape(node) or ())
    dims = [dims] if isinstance(dims, int) else dims
    return _along_free([d % rank for d in dims]) if dims else None


def pad(node: fx.Node) -> Carried | None:
    """Zeros beside the numbers, along dims that no block runs along."""
    named = g.arguments(node)
    rank = len(g.shape(node) or ())
    pads: Any = named["pad"]
    padded = [rank - 1 - i // 2 for i, size in enumerate(pads) if not is_one(size) and size != 0]
    padded += [rank - 1 - i // 2 for i, size in enumerate(pads) if is_one(size)]
    found = _along_free(sorted(set(padded)))
    constant = named.get("mode", "constant") == "constant"
    if constant and named.get("value") not in (None, 0, 0.0):
        return Carried(found.paths, found.back, lambda _: None)
    return found


_SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.chunk, aten.unbind})
