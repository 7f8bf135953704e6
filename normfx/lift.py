"""Lift: ATen operators to polynomials of one site (a tensor x and the dims of its statistics).

The operators it knows are the table `RULES` in `laws.py`. What is not in the table is opaque, and
so are values that do not depend on x.

A lifted value carries, beside its polynomial, which axis of x each of its dims stands for. So a
statistic that is broadcast along the wrong axis (a square matrix hides that from shapes) is not
mistaken for one that is not.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly, Ring, number
from normfx.laws import RULES
from normfx.lifted import Axes, Lifted, Stuck, is_one, literal, normal_dims


class Lift:
    """The lift of one site. `value_of` answers for any node; None: opaque, or not provable."""

    # How many operators behind an operand are searched for x: a spelled-out norm has about ten in
    # all.
    REACH = 48

    def __init__(
        self, x: fx.Node, dims: frozenset[int], order: dict[fx.Node, int], *, grad: bool
    ) -> None:
        self.x, self.dims, self.order, self.grad = x, dims, order, grad
        self.rank = len(g.shape(x) or ())
        self.ring = Ring(range(self.rank), dims)
        self.stuck: Stuck | None = None
        self.first = order[x]
        self.floats: dict[fx.Node, torch.SymFloat] = {}
        self.values: dict[fx.Node, Any] = {x: Lifted(self.ring.x, tuple(range(self.rank)))}
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
            result = rule(self, node)
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
                or (g.packet(current) or current.target) not in RULES
            ):
                continue
            for source in current.all_input_nodes:
                found |= self._reaches.get(source, False)
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
        self._reaches[node] = found
        return found

    def operand(self, argument: Any, rank: int) -> Lifted | None:
        """An argument of an elementwise operator with a result of this rank: lifted or opaque."""
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return Lifted(number(argument), ())
        if not isinstance(argument, fx.Node):
            return None
        lifted = self.value_of(argument)
        if isinstance(lifted, Lifted):
            return lifted
        constant = literal(argument)
        if constant is not None:
            return Lifted(number(constant), ())
        held = g.value(argument)
        if isinstance(held, torch.SymFloat):
            self.floats[argument] = held
            return Lifted(self.ring.opaque(argument), ())
        if isinstance(held, torch.SymInt):
            return Lifted(self.symbol(held), ())
        sizes = g.shape(argument)
        if sizes is None or not (held.is_floating_point() or (not sizes and not held.is_complex())):
            return None
        if len(sizes) > rank:
            return None
        if rank != self.rank and any(s != 1 for s in sizes):
            return None  # an operand that meets a reduced value: its axes would be a guess
        offset = rank - len(sizes)
        axes = tuple(None if is_one(s) else offset + i for i, s in enumerate(sizes))
        return Lifted(self.ring.opaque(argument, (a for a in axes if a is not None)), axes)

    def symbol(self, held: Any) -> Poly:
        """A symbolic number: a product of opaque positive sizes, or one opaque number."""
        expression = getattr(getattr(held, "node", None), "expr", None)
        if expression is None:
            return number(held)
        result = number(1)
        for factor in expression.args if getattr(expression, "is_Mul", False) else (expression,):
            if factor.is_Integer:
                result = result.scaled(Fraction(int(factor)))
            else:
                result = self.ring.mul(
                    result, self.ring.opaque(("symbol", str(factor)), nonnegative=True)
                )
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

    def count(self) -> Poly:
        """n: how many elements a statistic is taken over."""
        sizes = g.shape(self.x)
        assert sizes is not None
        total = number(1)
        for dim in sorted(self.dims):
            size = sizes[dim]
            total = self.ring.mul(
                total, number(size) if isinstance(size, int) else self.symbol(size)
            )
        return total

    # -- building blocks of the rules ------------------------------------------------------------

    def elementwise(self, node: fx.Node, arguments: list[Any]) -> tuple[list[Poly], Axes] | None:
        """The operands of an elementwise operator and the axes of its result, if these agree."""
        sizes = g.shape(node)
        if sizes is None:
            return None
        rank = len(sizes)
        lifted = [self.operand(a, rank) for a in arguments]
        axes: list[int | None] = [None] * rank
        for value in lifted:
            if value is None:
                return None
            offset = rank - len(value.axes)
            for i, axis in enumerate(value.axes):
                if axis is None:
                    continue
                if axes[offset + i] not in (None, axis):
                    self.stuck = Stuck("broadcast-axis-differs", node)
                    return None
                axes[offset + i] = axis
        return [value.poly for value in lifted if value is not None], tuple(axes)

    def reduce(
        self, node: fx.Node, source: Any, dims: Any, keepdim: bool
    ) -> tuple[Poly, Axes] | None:
        """E over dims of a lifted value, if these are the dims of the site."""
        value = self.value_of(source) if isinstance(source, fx.Node) else None
        if not isinstance(value, Lifted):
            return None
        reduced = normal_dims(dims, len(value.axes))
        if {value.axes[d] for d in reduced} != set(self.dims):
            self.stuck = Stuck("reduction-over-other-dims", node)
            return None
        mean = self.ring.expectation(value.poly)
        if mean is None:
            self.stuck = Stuck("statistic-of-another-tensor", node)
            return None
        axes = tuple(None if i in reduced else a for i, a in enumerate(value.axes))
        if not keepdim:
            axes = tuple(a for i, a in enumerate(axes) if i not in reduced)
        return mean, axes

    def moments(
        self, node: fx.Node, dims: Any, correction: Any, keepdim: bool
    ) -> tuple[Lifted, Lifted] | None:
        """(variance, mean) of a lifted value of degree one."""
        source = node.args[0]
        value = self.value_of(source) if isinstance(source, fx.Node) else None
        first = self.reduce(node, source, dims, keepdim)
        if first is None or not isinstance(value, Lifted):
            return None
        mean, axes = first
        square = self.ring.expectation(self.ring.mul(value.poly, value.poly))
        if square is None:
            return None
        variance = square - self.ring.mul(mean, mean)
        if correction:
            n = self.count().constant()
            if n is None or n <= correction:
                self.stuck = Stuck("symbolic-correction", node)
                return None
            variance = variance.scaled(n / (n - Fraction(correction)))
        return Lifted(variance, axes), Lifted(mean, axes)
