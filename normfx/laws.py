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
from normfx.layout import arranged, is_one, plain
from normfx.lifted import Lifted, Reduced, Stuck, literal
from normfx.torch_internals import fused_multiply_add

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
        (a, b), layout = found
        alpha = named.get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            return None
        result = combine(lift.ring, a, b.scaled(Fraction(alpha)))
        return None if result is None else Lifted(result, layout)

    return rule


def _unary(apply: Callable[[Ring, Poly], Poly | None]) -> Rule:
    def rule(lift: Lift, node: fx.Node) -> Any:
        found = lift.elementwise(node, [node.args[0]])
        if found is None:
            return None
        (a,), layout = found
        result = apply(lift.ring, a)
        return None if result is None else Lifted(result, layout)

    return rule


def _divide(ring: Ring, a: Poly, b: Poly) -> Poly | None:
    inverse = ring.power(b, -1)
    return None if inverse is None else ring.mul(a, inverse)


def _reverse_subtract(lift: Lift, node: fx.Node) -> Any:
    found = lift.elementwise(node, [node.args[0], node.args[1]])
    alpha = g.arguments(node).get("alpha", 1)
    if found is None or not isinstance(alpha, (int, float)):
        return None
    (a, b), layout = found
    return Lifted(b - a.scaled(Fraction(alpha)), layout)


def _power(lift: Lift, node: fx.Node) -> Any:
    exponent = node.args[1]
    if isinstance(exponent, fx.Node):
        exponent = literal(exponent)
    found = lift.elementwise(node, [node.args[0]])
    if found is None or not isinstance(exponent, (int, float)) or isinstance(exponent, bool):
        return None
    exact = Fraction(exponent)
    if abs(exact) > 4:
        return None
    (a,), layout = found
    result = lift.ring.power(a, exact)
    return None if result is None else Lifted(result, layout)


def _clamp(lift: Lift, node: fx.Node) -> Any:
    named = g.arguments(node)
    low = named.get("min", named.get("other"))
    if named.get("max") is not None or low is None:
        return None
    found = lift.elementwise(node, [named.get("self", named.get("input")), low])
    if found is None:
        return None
    (a, b), layout = found
    return Lifted(lift.ring.maximum(a, b), layout)


def _function(name: str, *, nonnegative: bool = False, times_argument: bool = False) -> Rule:
    """A function of a value, times the value itself: silu(a) = a * sigmoid(a)."""

    def apply(ring: Ring, a: Poly) -> Poly | None:
        result = ring.function(name, a, nonnegative=nonnegative)
        return ring.mul(a, result) if times_argument else result

    return _unary(apply)


def _addcmul(lift: Lift, node: fx.Node) -> Any:
    found = lift.elementwise(node, list(node.args[:3]))
    scale = g.arguments(node).get("value", 1)
    if found is None or not isinstance(scale, (int, float)):
        return None
    (a, b, c), layout = found
    product: Poly | None = (
        lift.ring.mul(b, c) if g.packet(node) is aten.addcmul else _divide(lift.ring, b, c)
    )
    return None if product is None else Lifted(a + product.scaled(Fraction(scale)), layout)


def _fma(lift: Lift, node: fx.Node) -> Any:
    found = lift.elementwise(node, node.args[:3])
    if found is None:
        return None
    (a, b, c), layout = found
    return Lifted(lift.ring.mul(a, b) + c, layout)


def _copy(lift: Lift, node: fx.Node) -> Any:
    """What is written over something else, in its place and its dtype."""
    found = lift.elementwise(node, node.args[1:2]) if g.dtype(node) in EXACT_DTYPES else None
    return None if found is None else Lifted(found[0][0], found[1])


def _lerp(lift: Lift, node: fx.Node) -> Any:
    found = lift.elementwise(node, list(node.args[:3]))
    if found is None:
        return None
    (a, b, t), layout = found
    return Lifted(a + lift.ring.mul(t, b - a), layout)


# A cast to one of these is rounding; to float8 it is quantisation, which is meant to change the
# numbers.
EXACT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _same(lift: Lift, node: fx.Node) -> Any:
    """A cast, a copy, an inactive dropout: the same numbers."""
    if g.packet(node) is aten.dropout and node.args[2]:
        return None
    if g.packet(node) is aten.detach and lift.grad:
        return None
    if g.dtype(node) not in EXACT_DTYPES or not isinstance(node.args[0], fx.Node):
        return None
    return lift.value_of(node.args[0])


def _reduction(of: Callable[[Ring, Reduced], Poly | None]) -> Rule:
    def rule(lift: Lift, node: fx.Node) -> Any:
        named = g.arguments(node)
        if named.get("dtype") not in EXACT_DTYPES | {None}:
            return None
        found = lift.reduce(node.args[0], named.get("dim"), bool(named.get("keepdim")))
        result = None if found is None else of(lift.ring, found)
        return None if found is None or result is None else Lifted(result, found.layout)

    return rule


def _mean(ring: Ring, p: Reduced) -> Poly:
    return ring.expectation(p.poly, p.over)


def _sum(ring: Ring, p: Reduced) -> Poly:
    return ring.mul(_mean(ring, p), p.number)


def _root_of_sum_of_squares(ring: Ring, p: Reduced) -> Poly | None:
    square = ring.expectation(ring.mul(p.poly, p.poly), p.over)
    return ring.power(ring.mul(square, p.number), Fraction(1, 2))


def _norm(lift: Lift, node: fx.Node) -> Any:
    named = g.arguments(node)
    if named.get("ord", named.get("p", 2)) not in (None, 2):
        return None
    return _reduction(_root_of_sum_of_squares)(lift, node)


def _adaptive_mean(lift: Lift, node: fx.Node) -> Any:
    sizes = g.arguments(node)["output_size"]
    if any(size != 1 for size in sizes):
        return None
    found = lift.reduce(node.args[0], [-1 - i for i in range(len(sizes))], True)
    return None if found is None else Lifted(_mean(lift.ring, found), found.layout)


def _correction(node: fx.Node) -> Any:
    named = g.arguments(node)
    if "unbiased" in named:
        return 1 if named["unbiased"] else 0
    given = named.get("correction", 1)
    return 1 if given is None else given


_POOLED = {aten.avg_pool1d: 1, aten.avg_pool2d: 2, aten.avg_pool3d: 3}


def _window_mean(lift: Lift, node: fx.Node) -> Any:
    """A mean over neighbours along one axis of what has zeros around it: an average pool."""
    named = g.arguments(node)
    padded = named["self"]
    pooled: Any = g.packet(node)
    rank, spatial = len(g.shape(node) or ()), _POOLED[pooled]

    def for_each(sizes: Any) -> list[Any]:  # one number stands for all dims
        return list(sizes) * spatial if len(sizes) == 1 else list(sizes)

    kernel = for_each(named["kernel_size"])
    wide = [i for i, size in enumerate(kernel) if size != 1]
    if len(wide) != 1 or named.get("divisor_override") is not None:
        return None
    if any(size != 1 for size in for_each(named["stride"] or kernel)):
        return None
    around = [(0, 0)] * rank
    for i, size in enumerate(for_each(named["padding"])):
        around[rank - spatial + i] = (size, size)
    source = padded
    if g.packet(padded) in PADS:
        pads = g.arguments(padded)
        if pads.get("mode", "constant") != "constant" or pads.get("value") not in (None, 0):
            return None
        flat = pads["pad"]
        source = pads["self"]
        for i in range(len(flat) // 2):
            before, after = around[rank - 1 - i]
            around[rank - 1 - i] = (before + flat[2 * i], after + flat[2 * i + 1])
        if any(named["padding"]):
            return None
    elif not named.get("count_include_pad", True):
        return None
    dim, window = rank - spatial + wide[0], kernel[wide[0]]
    if any(pair != (0, 0) for i, pair in enumerate(around) if i != dim):
        return None
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    if around[dim] != (window // 2, (window - 1) // 2) or not isinstance(value, Lifted):
        return None
    if len(value.layout[dim]) != 1 or not lift.ring.varies(value.poly) & set(value.layout[dim]):
        return None  # what is constant varies near the ends, where zeros are
    nonnegative = lift.ring.is_nonnegative(value.poly)
    key = ("window", value.layout[dim][0], window)
    return Lifted(lift.ring.function(key, value.poly, nonnegative=nonnegative), value.layout)


def _variance(*, root: bool, with_mean: bool) -> Rule:
    def rule(lift: Lift, node: fx.Node) -> Any:
        named = g.arguments(node)
        correction = _correction(node)
        found = lift.reduce(node.args[0], named.get("dim"), bool(named.get("keepdim")))
        if found is None or not isinstance(correction, (int, float)):
            return None
        ring, mean = lift.ring, _mean(lift.ring, found)
        square = ring.expectation(ring.mul(found.poly, found.poly), found.over)
        variance: Poly | None = square - ring.mul(mean, mean)
        if correction:
            n = found.number.constant()
            if n is None or n <= correction:
                lift.stuck = Stuck("symbolic-correction", node)
                return None
            variance = variance.scaled(n / (n - Fraction(correction)))
        if root:
            variance = ring.power(variance, Fraction(1, 2))
        if variance is None:
            return None
        first = Lifted(variance, found.layout)
        return (first, Lifted(mean, found.layout)) if with_mean else first

    return rule


def _contraction(equation: str | Callable[[fx.Node], str | None]) -> Rule:
    """A sum of products, as an einsum of two operands: sum p*q = n * E[p*q]."""

    def rule(lift: Lift, node: fx.Node) -> Any:
        text = equation if isinstance(equation, str) else equation(node)
        if text is None:
            return None
        operands: Any = node.args[:2] if isinstance(node.args[0], fx.Node) else node.args[1]
        inputs, _, output = text.partition("->")
        words = inputs.split(",")
        if len(operands) != 2 or len(words) != 2:
            return None
        axes: dict[str, tuple[int, ...]] = {}
        sizes: dict[str, Any] = {}
        for word, operand in zip(words, operands, strict=True):
            shape = g.shape(operand)
            if shape is None or len(set(word)) != len(word) or len(word) != len(shape):
                return None
            value = lift.value_of(operand)
            for letter, size, i in zip(word, shape, range(len(word)), strict=True):
                if str(sizes.setdefault(letter, size)) != str(size):
                    return None
                if isinstance(value, Lifted) and value.layout[i]:
                    if axes.setdefault(letter, value.layout[i]) != value.layout[i]:
                        return None
        named = [axis for dim in axes.values() for axis in dim]
        if len(set(named)) != len(named):
            return None  # one axis under two letters: a matrix of products
        layouts = [tuple(axes.get(letter, ()) for letter in word) for word in words]
        factors = [lift.operand(o, w) for o, w in zip(operands, layouts, strict=True)]
        if factors[0] is None or factors[1] is None:
            return None
        over = frozenset(a for letter, dim in axes.items() if letter not in output for a in dim)
        total = lift.ring.expectation(lift.ring.mul(factors[0], factors[1]), over)
        for letter, size in sizes.items():
            if letter not in output:
                total = lift.ring.mul(total, lift.quantity(plain(size)))
        return Lifted(total, tuple(axes.get(letter, ()) for letter in output))

    return rule


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def einsum_equation(node: fx.Node) -> str | None:
    """The equation of an einsum, with letters for an ellipsis that is the same for both."""
    text: Any = node.args[0]
    operands: Any = node.args[1]
    text = text.replace(" ", "")
    if "->" not in text or not text.replace(".", "").replace(",", "").replace("->", "").isalpha():
        return None
    words = text.partition("->")[0].split(",")
    ranks = [len(g.shape(operand) or ()) for operand in operands]
    dots = {r - len(w) + 3 for w, r in zip(words, ranks, strict=True) if "..." in w}
    if len(dots) > 1:
        return None
    free = [letter for letter in _LETTERS.upper() if letter not in text]
    return text.replace("...", "".join(free[: dots.pop()])) if dots else text


def _matmul(node: fx.Node) -> str | None:
    a, b = (len(g.shape(operand) or ()) for operand in node.args[:2])
    if a == b == 1:
        return "i,i->"
    if (a, b) == (2, 1):
        return "ij,j->i"
    if a != b:
        return None
    batch = _LETTERS[: a - 2]
    return f"{batch}xy,{batch}yz->{batch}xz"


def _vecdot(node: fx.Node) -> str | None:
    ranks = [len(g.shape(operand) or ()) for operand in node.args[:2]]
    if ranks[0] != ranks[1]:
        return None
    word, dim = _LETTERS[: ranks[0]], g.arguments(node)["dim"] % ranks[0]
    return f"{word},{word}->{word[:dim]}{word[dim + 1 :]}"


def _slice(lift: Lift, node: fx.Node) -> Any:
    """A slice of x along one dim, where everything else is constant along it."""
    named = g.arguments(node)
    start, step = named.get("start") or 0, named.get("step", 1)
    if not isinstance(start, int) or start < 0 or step != 1:
        return None
    return _sliced(lift, node.args[0], named["dim"], start, g.shape(node))


def _select(lift: Lift, node: fx.Node) -> Any:
    """The only element along a dim of size one."""
    source: Any = node.args[0]
    dim = g.arguments(node)["dim"]
    value, sizes = lift.value_of(source), g.shape(source)
    if not isinstance(value, Lifted) or sizes is None or not is_one(sizes[dim]):
        return None
    dim %= len(sizes)
    return Lifted(value.poly, value.layout[:dim] + value.layout[dim + 1 :])


def _split(lift: Lift, node: fx.Node) -> Any:
    held, start, parts = g.value(node), 0, []
    dim = g.arguments(node).get("dim", 0)
    if not isinstance(held, (tuple, list)):
        return None
    for part in held:
        parts.append(_sliced(lift, node.args[0], dim, start, tuple(part.shape)))
        if not isinstance(part.shape[dim], int):
            return None
        start += part.shape[dim]
    return tuple(parts)


def _sliced(lift: Lift, source: Any, dim: int, start: int, shape: Any) -> Lifted | None:
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Lifted) or shape is None:
        return None
    if str(tuple(shape)) == str(g.shape(source)):
        return value
    dim %= len(shape)
    if not value.layout[dim]:
        return value
    if len(value.layout[dim]) != 1:
        return None
    if is_one(shape[dim]):
        return None  # one element has no axis: it broadcasts against the others
    (axis,) = value.layout[dim]
    part = lift.axes.slice(axis, start, shape[dim])
    poly = lift.ring.sliced(value.poly, axis, part)
    layout = tuple((part,) if i == dim else axes for i, axes in enumerate(value.layout))
    return None if poly is None else Lifted(poly, layout)


def _getitem(lift: Lift, node: fx.Node) -> Any:
    source, index = node.args
    values = lift.value_of(source) if isinstance(source, fx.Node) else None
    return values[index] if isinstance(values, tuple) and isinstance(index, int) else None


def _view(lift: Lift, node: fx.Node) -> Any:
    """A view groups the same axes into other dims; one that would cut an axis has no layout."""
    source, shape = node.args[0], g.shape(node)
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Lifted) or shape is None:
        return None
    if g.dtype(node) != g.dtype(source):
        return None  # the bits, read as another dtype
    placed = lift.placed(value.layout, g.shape(source) or ())
    found = [layout for p in placed if (layout := lift.axes.view(p, shape)) is not None]
    if not found:
        lift.stuck = Stuck("view-mixes-dims", node)
        return None
    # where sizes leave open what was expanded: what x may be met in
    return Lifted(value.poly, next((p for p in found if p in lift.layouts), found[0]))


def _expand(lift: Lift, node: fx.Node) -> Any:
    """Constant along an expanded dim.

    It gets the axes that x has there, as a view may follow; where sizes leave open which, none.
    """
    source, shape = node.args[0], g.shape(node)
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Lifted) or shape is None:
        return None
    layout = ((),) * (len(shape) - len(value.layout)) + value.layout
    placed = set(lift.placed(layout, shape))
    return Lifted(value.poly, placed.pop() if len(placed) == 1 else layout)


def _repeat(lift: Lift, node: fx.Node) -> Any:
    """A repetition of dims of size one is an expansion; of others it is not."""
    sizes = g.shape(node.args[0])
    if sizes is None:
        return None
    times: Any = node.args[1]
    offset = len(times) - len(sizes)
    repeated = [sizes[i - offset] for i, n in enumerate(times) if n != 1 and i >= offset]
    return _expand(lift, node) if all(size == 1 for size in repeated) else None


def _repeat_interleave(lift: Lift, node: fx.Node) -> Any:
    """Each element several times: constant along the inner axes of a dim that x is cut along."""
    named = g.arguments(node)
    source, dim, shape = node.args[0], named.get("dim"), g.shape(node)
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Lifted) or shape is None or not isinstance(named["repeats"], int):
        return None
    if not isinstance(dim, int):
        return None
    dim %= len(shape)
    outer = value.layout[dim]
    for axes in dict.fromkeys(axes for layout in lift.layouts for axes in layout):
        if axes[: len(outer)] != outer or lift.axes.size(axes) != plain(shape[dim]):
            continue
        result = tuple(axes if i == dim else own for i, own in enumerate(value.layout))
        named_axes = [axis for own in result for axis in own]
        if len(set(named_axes)) == len(named_axes):
            return Lifted(value.poly, result)
    return None


def _arranged(lift: Lift, node: fx.Node) -> Any:
    source = node.args[0]
    value = lift.value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Lifted):
        return None
    order = g.permutation(node, len(value.layout))
    return Lifted(value.poly, arranged(order, value.layout))


# What is read as a part of the average pool after it.
PADS = frozenset({aten.pad, aten.constant_pad_nd})
# What reads of its first operand only how it looks: its shape, dtype and device.
ASKS = frozenset(
    {
        aten.sym_size,
        aten.sym_stride,
        aten.sym_numel,
        aten._assert_tensor_metadata,
        aten.zeros_like,
        aten.ones_like,
        aten.full_like,
        aten.empty_like,
        aten.new_zeros,
        aten.new_ones,
        aten.new_full,
        aten.new_empty,
    }
)
# Operators that group the same elements into other dims, and such as put dims in another order.
VIEWS = frozenset(
    {
        aten.view,
        aten.reshape,
        aten._unsafe_view,
        aten.unsqueeze,
        aten.squeeze,
        aten.flatten,
        aten.unflatten,
        aten.view_as,
        aten.reshape_as,
    }
)
ARRANGEMENTS = frozenset(
    {
        aten.permute,
        aten.transpose,
        aten.t,
        aten.movedim,
        aten.moveaxis,
        aten.swapaxes,
        aten.swapdims,
        aten.numpy_T,
        aten.mT,
        aten.adjoint,
    }
)

# Sums of products, of two operands.
PRODUCTS: dict[Any, Rule] = {
    aten.dot: _contraction("i,i->"),
    aten.vdot: _contraction("i,i->"),
    aten.mv: _contraction("ij,j->i"),
    aten.bmm: _contraction("bij,bjk->bik"),
    aten.matmul: _contraction(_matmul),
    aten.inner: _contraction("i,i->"),
    aten.linalg_vecdot: _contraction(_vecdot),
    aten.einsum: _contraction(einsum_equation),
}
# What a norm may begin with.
STATISTICS: dict[Any, Rule] = {
    aten.mean: _reduction(_mean),
    aten.sum: _reduction(_sum),
    aten.adaptive_avg_pool1d: _adaptive_mean,
    aten.adaptive_avg_pool2d: _adaptive_mean,
    aten.var: _variance(root=False, with_mean=False),
    aten.std: _variance(root=True, with_mean=False),
    aten.var_mean: _variance(root=False, with_mean=True),
    aten.std_mean: _variance(root=True, with_mean=True),
    aten.norm: _norm,
    aten.linalg_vector_norm: _norm,
    aten.frobenius_norm: _norm,
    aten.avg_pool1d: _window_mean,
    aten.avg_pool2d: _window_mean,
    aten.avg_pool3d: _window_mean,
    **PRODUCTS,
}
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
    aten.max: _clamp,
    aten.addcmul: _addcmul,
    aten.addcdiv: _addcmul,
    aten.lerp: _lerp,
    fused_multiply_add(): _fma,
    # the same numbers
    aten.to: _same,
    aten._to_copy: _same,
    aten.type_as: _same,
    aten.clone: _same,
    aten.contiguous: _same,
    aten.alias: _same,
    aten.detach: _same,
    aten.copy: _copy,
    aten.dropout: _same,
    **STATISTICS,
    operator.getitem: _getitem,
    # functions of which only the name is known
    aten.sigmoid: _function("sigmoid", nonnegative=True),
    aten.silu: _function("sigmoid", nonnegative=True, times_argument=True),
    aten.tanh: _function("tanh"),
    # other looks at the same numbers
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(ARRANGEMENTS, _arranged),
    aten.expand: _expand,
    aten.expand_as: _expand,
    aten.repeat: _repeat,
    aten.tile: _repeat,
    aten.repeat_interleave: _repeat_interleave,
    aten.slice: _slice,
    aten.narrow: _slice,
    aten.select: _select,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.chunk: _split,
    aten.tensor_split: _split,
}
