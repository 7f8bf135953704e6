"""Lift: ATen operators to polynomials of one site (a tensor x and the dims of its statistics).

`RULES` is the table of the operators the lift knows: one row each, a function from lifted operands
to the lifted result. What is not in the table is opaque, and so are values that do not depend on x.
Adding an operator is one row and one test; there are no spellings here.

A lifted value carries, beside its polynomial, which axis of x each of its dims stands for. So a
statistic that is broadcast along the wrong axis (a square matrix hides that from shapes) is not
mistaken for one that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly, Ring, number

aten = torch.ops.aten

Axes = tuple["int | None", ...]


@dataclass(frozen=True, slots=True)
class Lifted:
    """A polynomial, and the axis of x behind each dim of the value (None: constant along it)."""

    poly: Poly
    axes: Axes


@dataclass(frozen=True, slots=True)
class Stuck:
    """Why an operator could not be lifted: the law that failed, at this node."""

    law: str
    node: fx.Node


Result = "Lifted | tuple[Lifted, ...] | None"


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
        axes = tuple(None if _is_one(s) else offset + i for i, s in enumerate(sizes))
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


def normal_dims(dims: Any, rank: int) -> set[int]:
    """The dims of a reduction as non-negative numbers; None and the empty list are all dims."""
    if dims is None or dims == []:
        return set(range(rank))
    return {d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def literal(node: fx.Node) -> float | int | None:
    """The number behind a constant of the graph: a filled 0-d tensor or a 0-d attribute."""
    if node.op == "get_attr":
        held: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            held = getattr(held, part, None)
        if (
            isinstance(held, torch.Tensor)
            and held.dim() == 0
            and not isinstance(held, torch.nn.Parameter)
        ):
            from torch._subclasses.fake_tensor import FakeTensor

            return None if isinstance(held, FakeTensor) else held.item()
        return None
    packet = g.packet(node)
    if packet in (aten.neg, aten.negative):
        negated = literal(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        return None if negated is None else -negated
    if packet in (
        aten.lift_fresh,
        aten.lift_fresh_copy,
        aten.detach,
        aten.clone,
        aten.to,
        aten.alias,
    ):
        source = node.args[0]
        return literal(source) if isinstance(source, fx.Node) else None
    if packet in (aten.full, aten.scalar_tensor, aten.full_like, aten.new_full):
        named = g.arguments(node)
        fill = named.get("fill_value", named.get("s"))
        return fill if isinstance(fill, (int, float)) and not isinstance(fill, bool) else None
    if packet in (aten.ones, aten.ones_like, aten.zeros, aten.zeros_like):
        return 1 if "ones" in str(packet) else 0
    return None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


# -- the operators the lift knows ----------------------------------------------------------------

Rule = Callable[[Lift, fx.Node], Any]


def _binary(combine: Callable[[Ring, Poly, Poly], Poly | None]) -> Rule:
    def rule(lift: Lift, node: fx.Node) -> Any:
        named = g.arguments(node)
        if named.get("rounding_mode") is not None:
            return None
        found = lift.elementwise(node, [node.args[0], node.args[1]])
        if found is None:
            return None
        (a, b), axes = found
        alpha = named.get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            return None
        result = combine(lift.ring, a, b.scaled(Fraction(alpha)))
        return None if result is None else Lifted(result, axes)

    return rule


def _unary(apply: Callable[[Ring, Poly], Poly | None]) -> Rule:
    def rule(lift: Lift, node: fx.Node) -> Any:
        found = lift.elementwise(node, [node.args[0]])
        if found is None:
            return None
        (a,), axes = found
        result = apply(lift.ring, a)
        return None if result is None else Lifted(result, axes)

    return rule


def _divide(ring: Ring, a: Poly, b: Poly) -> Poly | None:
    inverse = ring.power(b, -1)
    return None if inverse is None else ring.mul(a, inverse)


def _reverse_subtract(lift: Lift, node: fx.Node) -> Any:
    found = lift.elementwise(node, [node.args[0], node.args[1]])
    alpha = g.arguments(node).get("alpha", 1)
    if found is None or not isinstance(alpha, (int, float)):
        return None
    (a, b), axes = found
    return Lifted(b - a.scaled(Fraction(alpha)), axes)


def _power(lift: Lift, node: fx.Node) -> Any:
    exponent = node.args[1]
    if isinstance(exponent, fx.Node):
        exponent = literal(exponent)
    found = lift.elementwise(node, [node.args[0]])
    if found is None or not isinstance(exponent, (int, float)) or isinstance(exponent, bool):
        return None
    exact = Fraction(exponent)
    if exact.denominator not in (1, 2) or abs(exact) > 4:
        return None
    (a,), axes = found
    result = lift.ring.power(a, exact)
    return None if result is None else Lifted(result, axes)


def _clamp(lift: Lift, node: fx.Node) -> Any:
    named = g.arguments(node)
    low = named.get("min", named.get("other"))
    if named.get("max") is not None or low is None:
        return None
    first = named.get("self", named.get("input"))
    a_value = lift.value_of(first) if isinstance(first, fx.Node) else None
    if not isinstance(a_value, Lifted):  # maximum(floor, statistic)
        first, low = low, first
    found = lift.elementwise(node, [first, low])
    if found is None:
        return None
    (a, b), axes = found
    result = lift.ring.floor(a, b)
    return None if result is None else Lifted(result, axes)


def _addcmul(lift: Lift, node: fx.Node) -> Any:
    found = lift.elementwise(node, list(node.args[:3]))
    scale = g.arguments(node).get("value", 1)
    if found is None or not isinstance(scale, (int, float)):
        return None
    (a, b, c), axes = found
    product: Poly | None = (
        lift.ring.mul(b, c) if g.packet(node) is aten.addcmul else _divide(lift.ring, b, c)
    )
    return None if product is None else Lifted(a + product.scaled(Fraction(scale)), axes)


def _lerp(lift: Lift, node: fx.Node) -> Any:
    found = lift.elementwise(node, list(node.args[:3]))
    if found is None:
        return None
    (a, b, t), axes = found
    return Lifted(a + lift.ring.mul(t, b - a), axes)


# A cast to one of these is rounding; to float8 it is quantisation, which is meant to change the
# numbers.
_EXACT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _same(lift: Lift, node: fx.Node) -> Any:
    """A cast, a copy, an inactive dropout: the same numbers."""
    if g.packet(node) is aten.dropout and node.args[2]:
        return None
    if g.packet(node) is aten.detach and lift.grad:
        return None
    if g.dtype(node) not in _EXACT_DTYPES or not isinstance(node.args[0], fx.Node):
        return None
    return lift.value_of(node.args[0])


def _mean(lift: Lift, node: fx.Node) -> Any:
    named = g.arguments(node)
    found = lift.reduce(node, node.args[0], named.get("dim"), bool(named.get("keepdim")))
    return None if found is None else Lifted(*found)


def _sum(lift: Lift, node: fx.Node) -> Any:
    found = _mean(lift, node)
    return None if found is None else Lifted(lift.ring.mul(found.poly, lift.count()), found.axes)


def _adaptive_mean(lift: Lift, node: fx.Node) -> Any:
    sizes = node.args[1]
    if not isinstance(sizes, (list, tuple)) or any(s != 1 for s in sizes):
        return None
    found = lift.reduce(node, node.args[0], [-1 - i for i in range(len(sizes))], True)
    return None if found is None else Lifted(*found)


def _correction(node: fx.Node) -> Any:
    named = g.arguments(node)
    if "unbiased" in named:
        return 1 if named["unbiased"] else 0
    given = named.get("correction", 1)
    return 1 if given is None else given


def _variance(*, root: bool, with_mean: bool) -> Rule:
    def rule(lift: Lift, node: fx.Node) -> Any:
        named = g.arguments(node)
        correction = _correction(node)
        if not isinstance(correction, (int, float)):
            return None
        found = lift.moments(node, named.get("dim"), correction, bool(named.get("keepdim")))
        if found is None:
            return None
        variance, mean = found
        if root:
            deviation = lift.ring.power(variance.poly, Fraction(1, 2))
            if deviation is None:
                return None
            variance = Lifted(deviation, variance.axes)
        return (variance, mean) if with_mean else variance

    return rule


def _norm(lift: Lift, node: fx.Node) -> Any:
    named = g.arguments(node)
    order = named.get("ord", named.get("p", 2))
    value = lift.value_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if order not in (None, 2) or not isinstance(value, Lifted):
        return None
    mean = lift.reduce(node, node.args[0], named.get("dim"), bool(named.get("keepdim")))
    square = lift.ring.expectation(lift.ring.mul(value.poly, value.poly))
    if mean is None or square is None:
        return None
    root = lift.ring.power(lift.ring.mul(square, lift.count()), Fraction(1, 2))
    return None if root is None else Lifted(root, mean[1])


def _getitem(lift: Lift, node: fx.Node) -> Any:
    source, index = node.args
    values = lift.value_of(source) if isinstance(source, fx.Node) else None
    return values[index] if isinstance(values, tuple) and isinstance(index, int) else None


def _view(lift: Lift, node: fx.Node) -> Any:
    """A view that only adds or drops dims of size one."""
    source = node.args[0]
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    old, new = g.shape(source) if isinstance(source, fx.Node) else None, g.shape(node)
    if not isinstance(value, Lifted) or old is None or new is None:
        return None
    kept = [(s, a) for s, a in zip(old, value.axes, strict=True) if not _is_one(s)]
    wanted = [s for s in new if not _is_one(s)]
    if len(kept) != len(wanted) or any(
        str(s) != str(w) for (s, _), w in zip(kept, wanted, strict=True)
    ):
        lift.stuck = Stuck("view-mixes-dims", node)
        return None
    axes_of = iter(a for _, a in kept)
    return Lifted(value.poly, tuple(None if _is_one(s) else next(axes_of) for s in new))


def _expand(lift: Lift, node: fx.Node) -> Any:
    source = node.args[0]
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    new = g.shape(node)
    if not isinstance(value, Lifted) or new is None:
        return None
    axes: list[int | None] = [None] * (len(new) - len(value.axes)) + list(value.axes)
    if (
        len(new) == lift.rank
    ):  # constant along an expanded dim, which then stands for the axis of x there
        taken = set(axes)
        axes = [i if a is None and i not in taken else a for i, a in enumerate(axes)]
    return Lifted(value.poly, tuple(axes))


def _permute(lift: Lift, node: fx.Node) -> Any:
    source = node.args[0]
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Lifted):
        return None
    order = g.permutation(node, len(value.axes))
    return Lifted(value.poly, tuple(value.axes[d] for d in order))


def _getter() -> Any:
    import operator

    return operator.getitem


RULES: dict[Any, Rule] = {
    # law                           a, b -> result
    aten.add: _binary(lambda r, a, b: a + b),
    aten.sub: _binary(lambda r, a, b: a - b),
    aten.subtract: _binary(lambda r, a, b: a - b),
    aten.rsub: _reverse_subtract,
    aten.mul: _binary(lambda r, a, b: r.mul(a, b)),
    aten.multiply: _binary(lambda r, a, b: r.mul(a, b)),
    aten.div: _binary(_divide),
    aten.divide: _binary(_divide),
    aten.true_divide: _binary(_divide),
    aten.neg: _unary(lambda r, a: -a),
    aten.negative: _unary(lambda r, a: -a),
    aten.reciprocal: _unary(lambda r, a: r.power(a, -1)),
    aten.sqrt: _unary(lambda r, a: r.power(a, Fraction(1, 2))),
    aten.rsqrt: _unary(lambda r, a: r.power(a, Fraction(-1, 2))),
    aten.square: _unary(lambda r, a: r.mul(a, a)),
    aten.abs: _unary(lambda r, a: r.absolute(a)),
    aten.absolute: _unary(lambda r, a: r.absolute(a)),
    aten.pow: _power,
    aten.float_power: _power,
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.clip: _clamp,
    aten.maximum: _clamp,
    aten.addcmul: _addcmul,
    aten.addcdiv: _addcmul,
    aten.lerp: _lerp,
    # the same numbers
    aten.to: _same,
    aten._to_copy: _same,
    aten.type_as: _same,
    aten.clone: _same,
    aten.contiguous: _same,
    aten.alias: _same,
    aten.detach: _same,
    aten.dropout: _same,
    # statistics
    aten.mean: _mean,
    aten.sum: _sum,
    aten.adaptive_avg_pool1d: _adaptive_mean,
    aten.adaptive_avg_pool2d: _adaptive_mean,
    aten.var: _variance(root=False, with_mean=False),
    aten.std: _variance(root=True, with_mean=False),
    aten.var_mean: _variance(root=False, with_mean=True),
    aten.std_mean: _variance(root=True, with_mean=True),
    aten.norm: _norm,
    aten.linalg_vector_norm: _norm,
    aten.frobenius_norm: _norm,
    _getter(): _getitem,
    # views of a statistic
    aten.view: _view,
    aten.reshape: _view,
    aten.unsqueeze: _view,
    aten.squeeze: _view,
    aten.flatten: _view,
    aten.unflatten: _view,
    aten.expand: _expand,
    aten.expand_as: _expand,
    aten.permute: _permute,
    aten.transpose: _permute,
}
