"""Layouts: which axes of x each dim of a value stands for.

An axis is a factor of a dim of x: where x is viewed from (batch, channels) to (batch, groups,
channels // groups), the dim of the channels has two axes. A layout is one tuple of axes for each
dim, in the order in which they are nested. A dim that the value is constant along has none: one of
size one, or one that was expanded.

So a statistic that is broadcast along the wrong axis (a square matrix hides that from shapes) is
not mistaken for one that is not, and a view is no more than another grouping of the same axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

Layout: TypeAlias = "tuple[tuple[int, ...], ...]"


def is_one(size: Any) -> bool:
    """Whether a size is the number one: a symbolic size never is."""
    return isinstance(size, int) and size == 1


def plain(size: Any) -> Any:
    """A size as an int, or as the expression of a symbolic one: comparing these guards nothing."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


class Placed(NamedTuple):
    """Axes as dims of a tensor.

    Attributes:
        dims: the dims; where one is cut in groups, of the tensor viewed so.
        groups: how many groups a dim is cut into, or 0.
        group_dim: that dim.
        prefix: how many elements of the last of the dims count, or 0: all.
    """

    dims: tuple[int, ...]
    groups: int = 0
    group_dim: int = 1
    prefix: int = 0


class Axes:
    """The axes of one tensor and their sizes.

    Args:
        shape: of the tensor.

    Attributes:
        whole: the layout of the tensor itself.
    """

    def __init__(self, shape: Iterable[Any]) -> None:
        self._sizes: list[Any] = []
        self._parts: dict[int, tuple[int, int]] = {}  # an axis that was split: the two it became
        self._slices: dict[tuple[int, int, Any], int] = {}
        self.whole: Layout = tuple(() if is_one(s) else (self._new(s),) for s in shape)

    def _new(self, size: Any) -> int:
        self._sizes.append(plain(size))
        return len(self._sizes) - 1

    def size(self, axes: Iterable[int]) -> Any:
        """How many elements there are along some axes."""
        total = 1
        for axis in axes:
            total = total * self._sizes[axis]
        return total

    def all(self) -> frozenset[int]:
        """Every axis of the tensor."""
        return frozenset(axis for dim in self.whole for axis in dim)

    def slice(self, axis: int, start: int, size: Any) -> int:
        """The axis that a slice along another one leaves: one for each slice."""
        key = (axis, start, plain(size))
        if key not in self._slices:
            self._slices[key] = self._new(size)
        return self._slices[key]

    def placed(self, layout: Layout, over: frozenset[int]) -> Placed | None:
        """Where some axes are in a layout, or None if that cannot be said in dims and one cut."""
        prefix, cut_axis = 0, -1
        for whole, start, size in [key for key, part in self._slices.items() if part in over]:
            if prefix or start or not isinstance(size, int):
                return None
            over = over - {self._slices[whole, start, size]} | {whole}
            prefix, cut_axis = size, whole
        dims: list[int] = []
        groups, group_dim = 0, 1
        for i, axes in enumerate(layout):
            inside = [axis in over for axis in axes]
            if not any(inside):
                continue
            if all(inside):
                dims.append(i + (groups > 0))
                continue
            cut = inside.index(not inside[0])
            outer = self.size(axes[:cut])
            if groups or inside[cut:] != [not inside[0]] * len(inside[cut:]):
                return None
            if not isinstance(outer, int):
                return None
            dims.append(i if inside[0] else i + 1)
            groups, group_dim = outer, i
        if over - {axis for axes in layout for axis in axes}:
            return None
        if prefix and (groups or not dims or layout[dims[-1]] != (cut_axis,)):
            return None
        return Placed(tuple(dims), groups, group_dim, prefix)

    def view(self, layout: Layout, shape: Sequence[Any], *, split: bool = False) -> Layout | None:
        """The layout after a view to a shape, or None if it would cut an axis in two.

        Args:
            layout: before the view.
            shape: after it.
            split: cut axes in two where the view does so, and change `whole` accordingly.
        """
        pending = [axis for dim in layout for axis in dim]
        dims: list[tuple[int, ...]] = []
        for size in map(plain, shape):
            taken: list[int] = []
            missing = size
            while not is_one(missing):
                if not pending:
                    return None
                axis = pending.pop(0)
                rest = _quotient(missing, self._sizes[axis])
                if rest is None:
                    inner = _quotient(self._sizes[axis], missing) if split else None
                    if inner is None:
                        return None
                    axis, leftover = self._split(axis, missing, inner)
                    dims = [self._renewed(dim) for dim in dims]
                    pending.insert(0, leftover)
                    rest = 1
                taken.append(axis)
                missing = rest
            dims.append(tuple(taken))
        return tuple(dims) if not pending else None

    def _split(self, axis: int, outer: Any, inner: Any) -> tuple[int, int]:
        parts = self._new(outer), self._new(inner)
        self._parts[axis] = parts
        self.whole = tuple(self._renewed(dim) for dim in self.whole)
        return parts

    def _renewed(self, dim: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(part for axis in dim for part in self._parts.get(axis, (axis,)))


def _quotient(a: Any, b: Any) -> Any:
    """A / b if that is a whole number of elements for all values of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = a / b
    if getattr(quotient, "is_Integer", False):
        return int(quotient)
    numerator, denominator = quotient.as_numer_denom()
    return numerator if denominator == 1 else None


def arranged(permutation: Sequence[int], layout: Layout) -> Layout:
    """The layout after the dims were put in another order."""
    return tuple(layout[d] for d in permutation)
