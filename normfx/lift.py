"""Lift: ATen operators to polynomials of one site, which is a tensor x and what is made of it.

The operators it knows are the table `RULES` in `laws.py`. What is not in the table is opaque, and
so are values that do not depend on x. Beside its polynomial a lifted value carries which axes of x
each of its dims stands for (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly, Ring, number
from normfx.laws import ARRANGEMENTS, PADS, RULES, VIEWS
from normfx.layout import Axes, Layout, arranged, is_one, plain
from normfx.lifted import Lifted, Operand, Reduced, Stuck, literal, normal_dims

_KNOWN = RULES.keys() | PADS


class Lift:
    """The lift of one site. `value_of` answers for any node; None: opaque, or not provable.

    Args:
        x: the tensor.
        order: the place of each node in the graph.
        grad: whether gradients flow (then `detach` is no identity).
        path: nodes from x to a statistic: where views among them cut a dim of x, its axes are cut.
        like: the axes that x has, and its layout among them, where they are known already.
    """

    # How many operators behind an operand are searched for x: a spelled-out norm has about ten in
    # all.
    REACH = 48

    def __init__(
        self,
        x: fx.Node,
        order: dict[fx.Node, int],
        *,
        grad: bool,
        path: Sequence[fx.Node] = (),
        like: tuple[Axes, Layout] | None = None,
    ) -> None:
        self.x, self.order, self.grad = x, order, grad
        if like is None:
            self.axes = Axes(g.shape(x) or ())
            self.layouts = _cut(self.axes, path)
            layout = self.axes.whole
        else:
            self.axes, layout = like
            self.layouts = [layout, self.axes.whole]
        self.ring = Ring(self.axes.all())
        self.stuck: Stuck | None = None
        self.first = order[x]
        self.floats: dict[Operand, torch.SymFloat] = {}
        self.values: dict[fx.Node, Any] = {x: Lifted(self.ring.x, layout)}
        self._reaches: dict[fx.Node, bool] = {x: True}

    def value_of(self, node: fx.Node) -> Any:
        """The lifted value of a node that depends on x through known operators, else None."""
        if node in self.values:
            return self.values[node]
        if not self.depends(node):
            return None
        rule = RULES.get(g.packet(node)) if g.packet(node) is not None else RULES.get(node.target)
        result = None
        if rule is not None:
            try:
                result = rule(self, node)
            except (OverflowError, ValueError):
                pass  # an infinity or a nan, which is no fraction
            if result is None and self.stuck is None:
                self.stuck = Stuck("operator-law", node)
        self.values[node] = result
        return result

    def depends(self, node: fx.Node) -> bool:
        """Whether x is among the last `REACH` known operators behind a node."""
        if node in self._reaches:
            return self._reaches[node]
        pending, seen = [node], {node}
        found = False
        while pending and not found and len(seen) <= self.REACH:
            current = pending.pop()
            if (
                self.order.get(current, -1) < self.first
                or (g.packet(current) or current.target) not in _KNOWN
            ):
                continue
            for source in current.all_input_nodes:
                found |= self._reaches.get(source, False)
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
        self._reaches[node] = found
        return found

    def operand(self, argument: Any, layout: Layout) -> Poly | None:
        """An argument of an elementwise operator whose result has this layout: lifted or opaque."""
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return number(argument)
        if not isinstance(argument, fx.Node):
            return None
        lifted = self.value_of(argument)
        if isinstance(lifted, Lifted):
            return lifted.poly
        constant = literal(argument)
        if constant is not None:
            return number(constant)
        held = g.value(argument)
        if isinstance(held, torch.SymFloat):
            self.floats[Operand(argument, ())] = held
            return self.ring.opaque(Operand(argument, ()))
        if isinstance(held, torch.SymInt):
            return self.quantity(plain(held))
        sizes = g.shape(argument)
        if sizes is None or not (held.is_floating_point() or (not sizes and not held.is_complex())):
            return None
        offset = len(layout) - len(sizes)
        mine = tuple(() if is_one(s) else layout[offset + i] for i, s in enumerate(sizes))
        if offset < 0 or not all(dim or is_one(s) for dim, s in zip(mine, sizes, strict=True)):
            return None
        return self.ring.opaque(Operand(argument, mine), (axis for dim in mine for axis in dim))

    def quantity(self, size: Any) -> Poly:
        """A number of elements: a number, or a product of opaque positive sizes."""
        if isinstance(size, int):
            return number(size)
        result = number(1)
        for factor in size.args if getattr(size, "is_Mul", False) else (size,):
            if factor.is_Integer:
                result = result.scaled(Fraction(int(factor)))
            else:
                size = bool(factor.is_Symbol)  # a size less a number may be negative
                symbol = self.ring.opaque(("symbol", str(factor)), nonnegative=size)
                result = self.ring.mul(result, symbol)
        return result

    def settled(self, p: Poly) -> Poly | None:
        """Replaces symbolic floats by numbers, which makes them constants of the compiled graph.

        An eps that dynamo made symbolic is a constant of the model. None if a number is not known
        when compiling.
        """
        total = Poly()
        for monomial, coefficient in p.terms.items():
            term = number(coefficient)
            for index, exponent in monomial:
                factor: Poly | None = Poly({((index, exponent),): Fraction(1)})
                held = self.floats.get(self.ring.atoms[index].key)
                if held is not None:
                    if not held.node.has_hint():
                        return None
                    factor = self.ring.power(number(float(held)), exponent)
                if factor is None:
                    return None
                term = self.ring.mul(term, factor)
            total = total + term
        return total

    def count(self, axes: Iterable[int]) -> Poly:
        """How many elements there are along some axes of x."""
        return self.quantity(self.axes.size(axes))

    def seen_as(self, layout: Layout, shape: Any) -> fx.Node | None:
        """The first node that holds x itself, not rounded, with this layout and shape.

        A layout alone does not say how often a value is repeated.
        """
        found = [
            node
            for node, value in self.values.items()
            if isinstance(value, Lifted)
            and value.layout == layout
            and value.poly.terms == self.ring.x.terms
            and str(g.shape(node)) == str(shape)
            and self._is_as_exact(node)
        ]
        return min(found, key=self.order.__getitem__, default=None)

    def _is_as_exact(self, node: Any) -> bool:
        """Whether every cast between x and a view of it is to a dtype at least as exact."""
        exact = g.dtype(self.x)
        while isinstance(node, fx.Node) and node is not self.x:
            held = g.dtype(node)
            if held is None or torch.finfo(held).eps > torch.finfo(exact or held).eps:
                return False
            node = node.args[0] if node.args else None
        return node is self.x

    # -- building blocks of the rules ------------------------------------------------------------

    def elementwise(
        self, node: fx.Node, arguments: Sequence[Any]
    ) -> tuple[list[Poly], Layout] | None:
        """The operands of an elementwise operator and the layout of its result, if they agree."""
        sizes = g.shape(node)
        if sizes is None:
            return None
        dims: list[tuple[int, ...]] = [()] * len(sizes)
        for argument in arguments:
            value = self.value_of(argument) if isinstance(argument, fx.Node) else None
            if not isinstance(value, Lifted):
                continue
            offset = len(sizes) - len(value.layout)
            for i, dim in enumerate(value.layout):
                if dim and dims[offset + i] not in ((), dim):
                    self.stuck = Stuck("broadcast-axis-differs", node)
                    return None
                dims[offset + i] = dim or dims[offset + i]
        layout: Layout | None = tuple(dims)
        if any(self._is_opaque_along(a, dims, sizes) for a in arguments):
            layout = next(self.placed(dims, sizes), None)
        if layout is None:
            return None
        named = [axis for dim in layout for axis in dim]
        if len(set(named)) != len(named):  # one axis along two dims: m[i] and m[j] in one value
            self.stuck = Stuck("broadcast-axis-differs", node)
            return None
        operands = [self.operand(a, layout) for a in arguments]
        found = [p for p in operands if p is not None]
        return (found, layout) if len(found) == len(operands) else None

    def _is_opaque_along(
        self, argument: Any, dims: Sequence[tuple[int, ...]], sizes: Sequence[Any]
    ) -> bool:
        """Whether an opaque operand varies along a dim of a result that has no axes there."""
        if not isinstance(argument, fx.Node) or isinstance(self.value_of(argument), Lifted):
            return False
        own = g.shape(argument) or ()
        offset = len(sizes) - len(own)
        return any(not is_one(s) and not dims[offset + i] for i, s in enumerate(own))

    def placed(self, dims: Sequence[tuple[int, ...]], sizes: Sequence[Any]) -> Iterator[Layout]:
        """Layouts with axes for every dim of size above one: those of x there, where that fits."""
        if all(dim or is_one(size) for dim, size in zip(dims, sizes, strict=True)):
            yield tuple(dims)
            return
        for layout in self.layouts:
            if len(layout) == len(dims) and all(
                dim == axes if dim else is_one(size) or self.axes.size(axes) == plain(size)
                for dim, axes, size in zip(dims, layout, sizes, strict=True)
            ):
                yield tuple(
                    () if is_one(size) else axes for axes, size in zip(layout, sizes, strict=True)
                )

    def reduce(self, source: Any, dims: Any, keepdim: bool) -> Reduced | None:
        """A reduction of a lifted value over some of its dims, before what it does there."""
        value = self.value_of(source) if isinstance(source, fx.Node) else None
        sizes = g.shape(source)
        if not isinstance(value, Lifted) or sizes is None:
            return None
        reduced = normal_dims(dims, len(sizes))
        count = number(1)
        for d in sorted(reduced):
            count = self.ring.mul(count, self.quantity(plain(sizes[d])))
        layout = tuple(
            () if d in reduced else axes
            for d, axes in enumerate(value.layout)
            if keepdim or d not in reduced
        )
        over = frozenset(axis for d in reduced for axis in value.layout[d])
        return Reduced(value.poly, over, count, layout)


def _cut(axes: Axes, path: Sequence[fx.Node]) -> list[Layout]:
    """Cuts the axes of x where views between x and a statistic cut a dim; returns the layouts.

    A view of a slice says nothing of x.
    """
    steps: list[fx.Node] = []
    shape = [axes.size(dim) for dim in axes.whole]
    for node in path:
        packet = g.packet(node)
        after = [plain(size) for size in g.shape(node) or ()]
        if packet not in VIEWS and packet not in ARRANGEMENTS:
            if after != shape:
                break
            continue
        shape = after
        steps.append(node)
        if not _walked(axes, steps, split=True):
            steps.pop()
            break
    return _walked(axes, steps, split=False)


def _walked(axes: Axes, steps: Sequence[fx.Node], *, split: bool) -> list[Layout]:
    """The layouts of x and of each view on the way; none if one of them has none."""
    layouts = [axes.whole]
    for node in steps:
        shape = g.shape(node) or ()
        if g.packet(node) in ARRANGEMENTS:
            after = arranged(g.permutation(node, len(shape)), layouts[-1])
        else:
            after = axes.view(layouts[-1], shape, split=split)
        if after is None:
            return []
        layouts.append(after)
    return layouts
