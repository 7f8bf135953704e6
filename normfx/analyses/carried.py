"""Carried: operators that are linear in an operand and keep its blocks apart.

If one number is added to all of a block of the operand, then some number is added to all of the
block of the result that it becomes; and where every block of the operands has mean zero, so has
that of the result. Each law says which block becomes which, in both directions, for one operator:

    add            a sum of operands that are carried, broadcast only along free dims
    mul, div       times a factor that is one number for each block
    views, slices  the same numbers elsewhere; of a block that is cut in two nothing is known
    linear, conv   linear in the weight and the bias: the outputs are a dim of both
    matmul         linear in the second factor, whose rows are mixed: A (B + s 1^T) = AB + (As) 1^T
    embedding      rows of a table
    mean, pooling  over dims that no block runs along
    where          of a condition that is one for each block

A constant factor for each channel (LayerScale, 2103.17239, 2) is carried where the operator before
it is linear in a weight: the factor goes into that first,  g * (Wx + c) = (diag(g) W) x + g * c.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks, concatenated
from normfx.laws import ARRANGEMENTS, ASKS, VIEWS
from normfx.layout import is_one, plain

aten = torch.ops.aten

Path: TypeAlias = "tuple[int, ...]"
Parts: TypeAlias = "list[Blocks | None]"


class Use(NamedTuple):
    """One place where a value is read.

    Attributes:
        reader: the node that reads.
        path: where among its arguments.
        scale: a factor for each output that goes into the value first (LayerScale), or None.
        scaled: the product with that factor, which then goes.
    """

    reader: fx.Node
    path: Path
    scale: fx.Node | None = None
    scaled: fx.Node | None = None

    @property
    def value(self) -> Any:
        """What is read."""
        found: Any = self.reader.args
        for index in self.path:
            found = found[index]
        return found

    def replace(self, new: fx.Node) -> None:
        """Makes the reader read another node there."""

        def replaced(old: Any, rest: Path) -> Any:
            if not rest:
                return new
            return tuple(
                replaced(item, rest[1:]) if i == rest[0] else item for i, item in enumerate(old)
            )

        self.reader.args = replaced(self.reader.args, self.path)


FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class Carried:
    """What an operator does with the blocks of the operands it carries.

    Attributes:
        paths: where these operands stand among the arguments; the others are seen.
        back: from blocks of the result to those of each operand: an addition to these does no more
            than one to the result's. None for an operand without such blocks.
        forth: from blocks of zero mean of each operand (None: none are known) to the result's.
    """

    paths: tuple[Path, ...]
    back: Callable[[Blocks], Parts]
    forth: Callable[[Parts], Blocks | None]


def carried(node: fx.Node, constant: set[fx.Node]) -> tuple[Carried, tuple[Use, ...]] | None:
    """The law of a node and the uses it is about; None if it has none: it sees all that it reads.

    Args:
        node: an operator.
        constant: the nodes that depend on parameters alone.
    """
    if g.is_call(node, operator.getitem):
        law: Carried | None = _part(node)
        if law is None:
            return None
        return law, (Use(node.args[0], (0,)),)  # pyright: ignore[reportArgumentType]
    rule = _LAWS.get(g.packet(node))
    if rule is None or not _is_float(node) or g.shape(node) is None:
        return None
    if g.packet(node) in _PRODUCTS:
        scaled = _channel_scale(node, constant)
        if scaled is not None:
            return scaled
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
    seen: Blocks | None = _narrowed(numbers, new, g.shape(value))
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


def _is_float(node: Any) -> bool:
    return g.dtype(node) in FLOATS


# ---------------------------------------------------------------------------- one operand


def _one(
    path: int, back: Callable[[Blocks], Blocks | None], forth: Callable[[Blocks], Blocks | None]
) -> Carried:
    def forward(parts: Parts) -> Blocks | None:
        return None if parts[0] is None else forth(parts[0])

    return Carried(((path,),), lambda blocks: [back(blocks)], forward)


def _same(node: fx.Node) -> Carried | None:
    if not node.args or not _is_float(node.args[0]) or g.shape(node.args[0]) is None:
        return None
    if len(g.shape(node.args[0]) or ()) != len(g.shape(node) or ()):
        return None
    return _one(0, lambda b: b, lambda b: b)


def _dropout(node: fx.Node) -> Carried | None:
    return None if node.args[2] else _same(node)


def _view(node: fx.Node) -> Carried | None:
    old, new = g.shape(node.args[0]), g.shape(node)
    if old is None or new is None or not _is_float(node.args[0]):
        return None
    return _one(0, lambda b: b.viewed(new, old), lambda b: b.viewed(old, new))


def _permute(node: fx.Node) -> Carried | None:
    order = g.permutation(node, len(g.shape(node) or ()))
    return _one(0, lambda b: b.inverse_permuted(order), lambda b: b.permuted(order))


def _expand(node: fx.Node) -> Carried | None:
    old, new = g.shape(node.args[0]), g.shape(node)
    if old is None or new is None:
        return None
    return _one(0, lambda b: _narrowed(b, new, old), lambda b: _widened(b, old, new))


def _repeat(node: fx.Node) -> Carried | None:
    """Whole copies beside each other, along free dims."""
    old, new = g.shape(node.args[0]), g.shape(node)
    if old is None or new is None:
        return None
    extra = len(new) - len(old)
    same = [str(a) == str(b) for a, b in zip(new[extra:], old, strict=True)]

    def back(blocks: Blocks) -> Blocks:
        kept = _without_leading(blocks, extra)
        for dim, is_same in enumerate(same):
            kept = kept if is_same else kept.free(dim)
        return kept

    def forth(blocks: Blocks) -> Blocks:
        for dim, is_same in enumerate(same):
            blocks = blocks if is_same else blocks.free(dim)
        return _with_leading(blocks, extra)

    return _one(0, back, forth)


def _slice(node: fx.Node) -> Carried | None:
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

    return _one(0, back, forth)


# A longer dim than this, if not the last, is one of tokens: that some are read by nobody is not
# worth a label for each of them.
_FEW = 64


def _may_be_cut(shape: Sequence[Any], dim: int) -> bool:
    """Whether a dim may be one of outputs of a fused projection: its parts have other readers."""
    size = plain(shape[dim])
    return isinstance(size, int) and (dim == len(shape) - 1 or size <= _FEW)


def _select(node: fx.Node) -> Carried | None:
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

    return _one(0, back, forth)


def _part(node: fx.Node) -> Carried | None:
    """One of the tensors that a split makes: a slice of what was split."""
    source, index = node.args
    if not isinstance(source, fx.Node) or g.packet(source) not in _SPLITS:
        return None
    old, parts = g.shape(source.args[0]), g.value(source)
    if old is None or not isinstance(index, int) or not _is_float(node):
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


def _index(node: fx.Node) -> Carried | None:
    """Rows picked by one tensor of indices, or several beside each other."""
    old, new = g.shape(node.args[0]), g.shape(node)
    indices: Any = node.args[1]
    if old is None or new is None or not _is_float(node.args[0]):
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

    return _one(0, lambda b: exchanged(b, made, taken), lambda b: exchanged(b, taken, made))


def _gather(node: fx.Node) -> Carried | None:
    """Rows picked by indices that were expanded along the rows."""
    named = g.arguments(node)
    old, new, index = g.shape(node.args[0]), g.shape(node), named["index"]
    if old is None or new is None or len(old) != len(new) or not _is_float(node.args[0]):
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

    return _one(0, picked, picked)


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


def _index_select(node: fx.Node) -> Carried | None:
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

    return _one(0, same, same)


def _reduce(node: fx.Node) -> Carried | None:
    named = g.arguments(node)
    old = g.shape(node.args[0])
    dims = named.get("dim")
    if old is None or not _is_float(node.args[0]):
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

    return _one(0, back, forth)


def _spatial(count: int) -> Callable[[fx.Node], Carried | None]:
    """Linear along the last dims (pooling, interpolation), for each channel alike."""

    def law(node: fx.Node) -> Carried | None:
        rank = len(g.shape(node) or ())
        named = g.arguments(node)
        if rank < count or named.get("divisor_override"):
            return None
        return _along_free(range(rank - count, rank))

    return law


def _roll(node: fx.Node) -> Carried | None:
    dims: Any = g.arguments(node).get("dims") or ()
    rank = len(g.shape(node) or ())
    dims = [dims] if isinstance(dims, int) else dims
    return _along_free([d % rank for d in dims]) if dims else None


def _pad(node: fx.Node) -> Carried | None:
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


# ---------------------------------------------------------------------------- several operands


def _add(node: fx.Node) -> Carried | None:
    terms = node.args[:2]
    shapes, new = [g.shape(t) for t in terms], g.shape(node)
    if new is None or not all(isinstance(t, fx.Node) and _is_float(t) for t in terms):
        return None
    if isinstance(g.arguments(node).get("alpha", 1), fx.Node):
        return None
    return _sum(new, [((i,), shape) for i, shape in enumerate(shapes)])


def _sum(new: Sequence[Any], terms: Sequence[tuple[Path, Any]]) -> Carried:
    """A sum of operands, each broadcast to the result."""

    def back(blocks: Blocks) -> Parts:
        return [_narrowed(blocks, new, shape) for _, shape in terms]

    def forth(parts: Parts) -> Blocks | None:
        found: Blocks | None = None
        for part, (_, shape) in zip(parts, terms, strict=True):
            wide = None if part is None else _widened(part, shape, new)
            found = wide if found is None or wide is None else found.join(wide, new)
            if found is None:
                return None
        return found

    return Carried(tuple(path for path, _ in terms), back, forth)


def _scaled(node: fx.Node) -> Carried | None:
    """A product with a factor that is one number for each block; a quotient likewise."""
    a, b = node.args[:2]
    new = g.shape(node)
    is_product = g.packet(node) in _PRODUCTS
    if new is None or g.arguments(node).get("rounding_mode") is not None:
        return None
    if not isinstance(b, fx.Node) or g.tensor(b) is None:
        return _same(node)
    if not isinstance(a, fx.Node) or g.tensor(a) is None:
        return None
    # the operand with the larger shape is the value; of two as large, the first that varies
    values = [(0, a, b)]
    if is_product and _count(g.shape(b)) > _count(g.shape(a)):
        values = [(1, b, a)]
    ((position, value, factor),) = values
    if not _is_float(value):
        return None
    shape, of_factor = g.shape(value), g.shape(factor)
    assert shape is not None
    assert of_factor is not None

    def within(blocks: Blocks) -> bool:
        missing = len(new) - len(of_factor)
        return all(d < missing or is_one(of_factor[d - missing]) for d in blocks.labelled())

    def back(blocks: Blocks) -> Parts:
        return [_narrowed(blocks, new, shape) if within(blocks) else None]

    def forth(parts: Parts) -> Blocks | None:
        wide = None if parts[0] is None else _widened(parts[0], shape, new)
        return wide if wide is not None and within(wide) else None

    return Carried(((position,),), back, forth)


def _count(shape: Sequence[Any] | None) -> int:
    """How many dims are no single number."""
    return sum(not is_one(size) for size in shape or ())


def _where(node: fx.Node) -> Carried | None:
    condition, *terms = node.args
    new, of_condition = g.shape(node), g.shape(condition)
    if new is None or of_condition is None or not all(isinstance(t, fx.Node) for t in terms):
        return None
    if not all(_is_float(t) for t in terms):
        return None
    return _chosen(
        new, of_condition, _sum(new, [((i + 1,), g.shape(t)) for i, t in enumerate(terms)])
    )


def _masked_fill(node: fx.Node) -> Carried | None:
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


def _cat(node: fx.Node) -> Carried | None:
    terms: Any = node.args[0]
    shapes, new = [g.shape(t) for t in terms], g.shape(node)
    if new is None or not all(_is_float(t) for t in terms):
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


def _stack(node: fx.Node) -> Carried | None:
    terms: Any = node.args[0]
    new = g.shape(node)
    if new is None or not all(_is_float(t) for t in terms):
        return None
    dim = g.arguments(node).get("dim", 0) % len(new)

    def back(blocks: Blocks) -> Parts:
        if blocks.is_free(dim):
            return [blocks.squeezed(dim) for _ in terms]
        return [blocks.taken(dim, range(i, i + 1)).squeezed(dim) for i in range(len(terms))]

    def forth(parts: Parts) -> Blocks | None:
        return _all([None if part is None else part.unsqueezed(dim) for part in parts], new)

    return Carried(tuple((0, i) for i in range(len(terms))), back, forth)


# ---------------------------------------------------------------------------- linear in a weight


def _linear(node: fx.Node) -> Carried | None:
    args: Any = node.args
    if len(g.shape(args[1]) or ()) != 2:
        return None
    bias = args[2] if len(args) > 2 else None
    return _outputs(node, -1, (1,), 0, None if bias is None else (2,))


def _addmm(node: fx.Node) -> Carried | None:
    named = g.arguments(node)
    args: Any = node.args
    if named["beta"] != 1 or named["alpha"] != 1 or len(g.shape(args[0]) or ()) != 1:
        return None
    return _outputs(node, -1, (2,), 1, (0,))


def _outputs(
    node: fx.Node, made: int, weight: Path, out: int, bias: Path | None, groups: int = 1
) -> Carried:
    """Linear in a weight and a bias: dim `out` of the weight is dim `made` of the result."""
    shape: Any = g.shape(node)
    new, rank = len(shape), len(g.shape(Use(node, weight).value) or ())
    made %= new
    sizes = shape[made]

    def moved(blocks: Blocks, dim: int, rank: int, to: int) -> Blocks:
        """The blocks along one dim of a tensor as those along one dim of another."""
        shape = [1] * rank
        shape[to] = -1
        return Blocks(blocks.only(dim).labels.reshape(shape))

    def grouped(row: Blocks) -> Blocks | None:
        """Blocks whose outputs read the same inputs."""
        count = row.labels.numel()
        if groups == 1 or count == 1:
            return row
        cut = [groups, count // groups]
        viewed = row.viewed([count], cut)
        return None if viewed is None else viewed.within(0).viewed(cut, [count])

    def back(blocks: Blocks) -> Parts:
        row = grouped(moved(blocks, made, 1, 0))
        of_weight = None if row is None else moved(row, 0, rank, out)
        return [of_weight] if bias is None else [of_weight, row]

    def forth(parts: Parts) -> Blocks | None:
        row = None if parts[0] is None else moved(parts[0], out, 1, 0)
        if bias is not None and row is not None:
            row = None if parts[1] is None else row.join(parts[1], [sizes])
        return None if row is None else moved(row, 0, new, made)

    return Carried((weight,) if bias is None else (weight, bias), back, forth)


def _conv(node: fx.Node) -> Carried | None:
    named = g.arguments(node)
    args: Any = node.args
    spatial = len(g.shape(args[1]) or ()) - 2
    if node.kwargs:
        return None
    bias = None if named["bias"] is None else (2,)
    return _outputs(node, -1 - spatial, (1,), 0, bias, named["groups"])


def _conv_transpose(node: fx.Node) -> Carried | None:
    named = g.arguments(node)
    args: Any = node.args
    if named["groups"] != 1:
        return None
    spatial = len(g.shape(args[1]) or ()) - 2
    if node.kwargs:
        return None
    bias = None if named["bias"] is None else (2,)
    return _outputs(node, -1 - spatial, (1,), 1, bias)


def _matmul(node: fx.Node) -> Carried | None:
    """Rows of the second factor, mixed: its last dim is the last of the result."""
    first, second = (g.shape(a) for a in node.args[:2])
    if first is None or second is None or len(second) < 2:
        return None
    return _mixed((1,), len(second), len(g.shape(node) or ()))


def _attention(node: fx.Node) -> Carried | None:
    values = g.shape(node.args[2])
    return None if values is None else _mixed((2,), len(values), len(g.shape(node) or ()))


def _embedding(node: fx.Node) -> Carried | None:
    return _mixed((0,), 2, len(g.shape(node) or ()))


def _mixed(path: Path, old: int, new: int) -> Carried:
    """The last dim stays the last; all others are mixed or picked from, and free."""

    def moved(blocks: Blocks | None, rank: int) -> Blocks | None:
        if blocks is None:
            return None
        last = blocks.only(blocks.labels.dim() - 1)
        return Blocks(last.labels.reshape([1] * (rank - 1) + [-1]))

    return Carried((path,), lambda b: [moved(b, old)], lambda parts: moved(parts[0], new))


# ---------------------------------------------------------------------------- broadcasting


def _narrowed(blocks: Blocks, new: Sequence[Any], old: Sequence[Any] | None) -> Blocks | None:
    """The blocks of an operand that is broadcast to a result with these blocks."""
    if old is None:
        return None
    kept = _without_leading(blocks, len(new) - len(old))
    for dim, (size, wide) in enumerate(zip(old, new[len(new) - len(old) :], strict=True)):
        if not kept.is_free(dim) and str(size) != str(wide):
            kept = kept.free(dim)
    return kept


def _widened(blocks: Blocks, old: Sequence[Any] | None, new: Sequence[Any]) -> Blocks | None:
    """The blocks of a result that an operand with these blocks is broadcast to."""
    return None if old is None else _with_leading(blocks, len(new) - len(old))


def _without_leading(blocks: Blocks, count: int) -> Blocks:
    for dim in range(count):
        blocks = blocks.free(dim)
    return Blocks(blocks.labels.reshape(blocks.labels.shape[count:]))


def _with_leading(blocks: Blocks, count: int) -> Blocks:
    return Blocks(blocks.labels.reshape([*[1] * count, *blocks.labels.shape]))


_PRODUCTS = frozenset({aten.mul, aten.multiply})
_SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.chunk, aten.unbind})
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
        _same,
    ),
    **dict.fromkeys((aten.dropout, aten.feature_dropout), _dropout),
    # the same numbers elsewhere
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(ARRANGEMENTS, _permute),
    aten.expand: _expand,
    aten.expand_as: _expand,
    aten.repeat: _repeat,
    aten.slice: _slice,
    aten.narrow: _slice,
    aten.select: _select,
    aten.gather: _gather,
    aten.index: _index,
    aten.index_select: _index_select,
    aten.roll: _roll,
    aten.flip: _roll,
    aten.pad: _pad,
    aten.constant_pad_nd: _pad,
    aten.cat: _cat,
    aten.concat: _cat,
    aten.stack: _stack,
    # sums, products, choices
    aten.add: _add,
    aten.sub: _add,
    aten.mul: _scaled,
    aten.multiply: _scaled,
    aten.div: _scaled,
    aten.divide: _scaled,
    aten.true_divide: _scaled,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.mean: _reduce,
    aten.sum: _reduce,
    aten.avg_pool1d: _spatial(1),
    aten.avg_pool2d: _spatial(2),
    aten.avg_pool3d: _spatial(3),
    aten.adaptive_avg_pool1d: _spatial(1),
    aten.adaptive_avg_pool2d: _spatial(2),
    aten.adaptive_avg_pool3d: _spatial(3),
    aten.upsample_nearest2d: _spatial(2),
    aten.upsample_bilinear2d: _spatial(2),
    aten.upsample_bicubic2d: _spatial(2),
    # linear in a weight
    aten.linear: _linear,
    aten.addmm: _addmm,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.matmul: _matmul,
    aten.scaled_dot_product_attention: _attention,
    aten.embedding: _embedding,
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _conv),
    **dict.fromkeys(
        (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), _conv_transpose
    ),
}
