"""Laws: what each ATen operator does to polynomials. One row of `RULES` is one operator.

A rule takes the lift of a site and a node, and returns the lifted result (a tuple for an operator
with several), or None where no law applies. Adding an operator is one row and one test; there are
no spellings here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly, Ring
from normfx.lifted import Lifted, Stuck, is_one, literal

if TYPE_CHECKING:
    from normfx.lift import Lift

aten = torch.ops.aten

Rule = Callable[["Lift", fx.Node], Any]


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
    kept = [(s, a) for s, a in zip(old, value.axes, strict=True) if not is_one(s)]
    wanted = [s for s in new if not is_one(s)]
    if len(kept) != len(wanted) or any(
        str(s) != str(w) for (s, _), w in zip(kept, wanted, strict=True)
    ):
        lift.stuck = Stuck("view-mixes-dims", node)
        return None
    axes_of = iter(a for _, a in kept)
    return Lifted(value.poly, tuple(None if is_one(s) else next(axes_of) for s in new))


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
    operator.getitem: _getitem,
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
