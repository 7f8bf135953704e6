"""The laws of the polynomial normal form, against numbers and against sympy."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, permutations
from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normfx.algebra import COEFFICIENT_TOLERANCE, Atom, Poly, Ring, close, number

LAWS = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

# x, a positive operand, m1 and m2 as sympy sees them.
X, M1 = sp.symbols("x m1", real=True)
M2, P = sp.symbols("m2 p", positive=True)
# A point that is consistent: m2 > m1^2, and x is neither.
POINT: dict[Any, Any] = {
    X: sp.Rational(-7, 5),
    M1: sp.Rational(3, 10),
    M2: sp.Rational(6, 5),
    P: sp.Rational(2, 3),
}


class Pair:
    """A value twice: in the normal form, and as a sympy expression."""

    def __init__(self, poly: Poly, expression: Any) -> None:
        self.poly, self.expression = poly, expression


def ring() -> tuple[Ring, list[Pair]]:
    r = Ring(range(2))
    operand = r.opaque("p", {1}, nonnegative=True)
    # The point is one of numbers: what a moment is taken over is for the tests below.
    return r, [
        Pair(r.x, X),
        Pair(r.moment(1), M1),
        Pair(r.moment(2), M2),
        Pair(operand, P),
    ]


def evaluate(r: Ring, p: Poly) -> float:
    moments = {1: POINT[M1], 2: POINT[M2]}

    def atom(index: int) -> Any:
        a = r.atoms[index]
        if a.kind == "x":
            return POINT[X]
        if a.kind == "moment":
            return moments[r.order_of(a) or 0]
        if a.kind == "opaque":
            return POINT[P]
        if a.kind == "constant":
            return sp.Rational(a.key.numerator, a.key.denominator)
        assert a.kind == "compound"
        assert a.base is not None
        return whole(a.base)

    def whole(q: Poly) -> Any:
        return sum(
            (
                sp.Rational(c.numerator, c.denominator)
                * sp.prod([atom(i) ** sp.Rational(e.numerator, e.denominator) for i, e in m])
                for m, c in q.terms.items()
            ),
            sp.Integer(0),
        )

    return float(sp.N(whole(p), 40))


@st.composite
def values(draw, count: int = 1):
    """A ring and values in it, each a random expression of sums, products, squares and numbers."""
    r, leaves = ring()

    def one(depth: int) -> Pair:
        kind = draw(st.integers(0, 5)) if depth else 0
        if kind <= 1:
            return draw(st.sampled_from(leaves))
        if kind == 2:
            c = draw(st.fractions(-3, 3, max_denominator=8))
            return Pair(number(c), sp.Rational(c.numerator, c.denominator))
        a, b = one(depth - 1), one(depth - 1)
        if kind == 3:
            return Pair(r.mul(a.poly, b.poly), a.expression * b.expression)
        if kind == 4:
            return Pair(a.poly - b.poly, a.expression - b.expression)
        return Pair(a.poly + b.poly, a.expression + b.expression)

    return r, [one(3) for _ in range(count)]


def same(a: Poly | None, b: Poly | None) -> bool:
    return a is not None and b is not None and a.terms == b.terms


@LAWS
@given(values())
def test_a_value_is_the_number_that_sympy_gives(drawn):
    r, (a,) = drawn
    wanted = float(sp.N(sp.sympify(a.expression).subs(POINT), 40))
    assert evaluate(r, a.poly) == pytest.approx(wanted, rel=1e-14, abs=1e-14)


@LAWS
@given(values(count=3))
def test_the_laws_of_a_commutative_ring(drawn):
    r, (a, b, c) = drawn
    a, b, c = a.poly, b.poly, c.poly
    assert same(a + b, b + a)
    assert same((a + b) + c, a + (b + c))
    assert same(r.mul(a, b), r.mul(b, a))
    assert same(r.mul(r.mul(a, b), c), r.mul(a, r.mul(b, c)))
    assert same(r.mul(a, b + c), r.mul(a, b) + r.mul(a, c))
    assert same(a + number(0), a)
    assert same(r.mul(a, number(1)), a)
    assert not a - a
    assert not r.mul(a, number(0))
    negated = -a
    assert same(-negated, a)


@LAWS
@given(values())
def test_equal_expressions_have_equal_normal_forms(drawn):
    r, (a,) = drawn
    expanded = sp.Poly(sp.expand(a.expression), X, M1, M2, P)
    generators = [r.x, r.moment(1), r.moment(2), r.opaque("p", {1}, nonnegative=True)]
    total = Poly()
    for exponents, coefficient in expanded.terms():
        term = number(Fraction(int(coefficient.p), int(coefficient.q)))
        for generator, exponent in zip(generators, exponents, strict=True):
            for _ in range(exponent):
                term = r.mul(term, generator)
        total = total + term
    assert same(total, a.poly)


ROOTS = [
    Fraction(1, 2),
    Fraction(-1, 2),
    Fraction(3, 2),
    Fraction(-3, 2),
    -1,
    -2,
    1,
    2,
    3,
    Fraction(1, 4),
]


@LAWS
@given(values(), st.sampled_from(ROOTS))
def test_a_power_is_the_number_that_sympy_gives_or_is_refused(drawn, exponent):
    r, (a,) = drawn
    base = sp.sympify(a.expression).subs(POINT)
    power = r.power(a.poly, exponent)
    if power is None or base == 0 or (base < 0 and isinstance(exponent, Fraction)):
        return  # refused; or outside of where the value is defined
    wanted = float(sp.N(base ** sp.Rational(exponent), 40))
    assert evaluate(r, power) == pytest.approx(wanted, rel=1e-12, abs=1e-14)


@LAWS
@given(
    st.fractions("1/8", 8, max_denominator=8),
    st.fractions("1/8", 8, max_denominator=8),
    st.sampled_from([Fraction(1, 2), Fraction(-1, 2), Fraction(-1)]),
)
def test_a_constant_in_a_root_goes_in_front_and_the_atom_is_shared(c, eps, exponent):
    r = Ring(range(1))
    variance = r.moment(2) - r.mul(r.moment(1), r.moment(1))
    plain = r.power(variance + number(eps), exponent)
    scaled = r.power((variance + number(eps)).scaled(c), exponent)
    front = r.power(number(c), exponent)
    assert plain is not None
    assert scaled is not None
    assert front is not None
    assert r.mul(front, plain).is_close(scaled)


def test_every_way_to_an_inverse_root_is_one_value():
    r = Ring(range(2))
    q = r.moment(2) - r.mul(r.moment(1), r.moment(1)) + number(Fraction(1, 1000))
    half, minus_half = Fraction(1, 2), Fraction(-1, 2)
    rsqrt = r.power(q, minus_half)
    assert rsqrt is not None
    root, inverse = r.power(q, half), r.power(q, -1)
    assert root is not None
    assert inverse is not None
    assert same(r.power(root, -1), rsqrt)
    assert same(r.power(inverse, half), rsqrt)
    assert same(r.mul(root, inverse), rsqrt)
    assert same(r.mul(r.mul(rsqrt, rsqrt), rsqrt), r.power(rsqrt, 3))
    assert same(r.mul(root, root), q)
    assert same(r.mul(r.mul(rsqrt, root), q), q)


def _variance(r: Ring) -> Poly:
    return r.moment(2) - r.mul(r.moment(1), r.moment(1))


@pytest.mark.parametrize(
    "base",
    [
        lambda r: r.x,
        lambda r: r.moment(1),
        lambda r: r.moment(3),
        lambda r: r.opaque("g"),
        lambda r: r.mul(r.moment(2), r.opaque("g")),
        lambda r: number(-1),
        lambda r: -r.moment(2),
        lambda r: -_variance(r),
        lambda r: r.mul(r.x, r.moment(2)),
        lambda r: r.mul(r.opaque("g"), r.mul(r.opaque("h"), r.opaque("h"))),
        lambda r: -r.mul(r.opaque("g"), r.opaque("g")),
    ],
    ids=["x", "m1", "m3", "g", "m2*g", "-1", "-m2", "-variance", "x*m2", "g*h^2", "-g^2"],
)
@pytest.mark.parametrize("exponent", [Fraction(1, 2), Fraction(-1, 2)])
def test_a_root_of_unknown_sign_is_refused(base, exponent):
    r = Ring(range(2))
    assert r.power(base(r), exponent) is None


@pytest.mark.parametrize("exponent", [-1, 1, 0, Fraction(1, 2)])
def test_a_power_of_zero_is_refused(exponent):
    assert Ring().power(number(0), exponent) is None


SIGNED = {
    "x": lambda r: r.x,
    "m1": lambda r: r.moment(1),
    "g": lambda r: r.opaque("g"),
    "m1*g": lambda r: r.mul(r.moment(1), r.opaque("g")),
}


@pytest.mark.parametrize("name", SIGNED)
def test_the_root_of_a_square_is_an_absolute_value(name):
    r = Ring(range(2))
    a = SIGNED[name](r)
    square = r.mul(a, a)
    absolute = r.power(square, Fraction(1, 2))
    assert absolute is not None
    assert not same(absolute, a)
    assert not same(absolute, -a)
    assert not r.is_nonnegative(a)
    assert r.is_nonnegative(absolute)
    assert same(r.mul(absolute, absolute), square)
    assert same(r.power(square, Fraction(3, 2)), r.mul(absolute, square))
    inverse = r.power(square, Fraction(-1, 2))
    assert inverse is not None
    assert same(r.mul(inverse, absolute), number(1))
    assert same(r.power(absolute, -1), inverse)
    assert same(r.absolute(a), absolute)
    assert same(r.absolute(-a), absolute)
    assert same(r.absolute(absolute), absolute)


def test_the_absolute_value_of_a_sum():
    r = Ring(range(2))
    a = r.x - r.moment(1)
    absolute = r.absolute(a)
    assert same(r.mul(absolute, absolute), r.mul(a, a))
    assert same(r.absolute(-a), absolute)
    assert same(r.absolute(_variance(r)), _variance(r))
    assert not r.absolute(Poly())


@pytest.mark.parametrize("other", [Fraction(1, 2), Fraction(-1, 2)])
def test_a_root_says_nothing_of_the_sign_of_its_base_elsewhere(other):
    r = Ring(range(2))
    q = r.moment(2) - number(Fraction(1, 2))
    assert r.power(q, other) is not None
    assert not r.is_nonnegative(q)
    inverse = r.power(q, -1)
    assert inverse is not None
    assert not same(r.absolute(inverse), inverse)
    assert not same(r.maximum(inverse, number(0)), inverse)
    square = r.mul(inverse, inverse)
    assert not same(r.power(square, Fraction(1, 2)), inverse)


def test_a_root_of_an_inverse_is_defined_only_where_its_base_is_positive():
    r = Ring(range(2))
    q = r.moment(2) + r.opaque("eps")
    inverse = r.power(q, -1)
    assert inverse is not None
    assert same(r.power(inverse, Fraction(1, 2)), r.power(q, Fraction(-1, 2)))
    assert r.power(r.mul(inverse, r.opaque("g")), Fraction(1, 2)) is None


def test_what_the_rounding_of_literals_leaves_of_a_difference_is_zero():
    r = Ring(range(2))
    square = r.mul(r.moment(1), r.moment(1))
    rounded = square.scaled(5 * Fraction(1 / 5))
    assert not same(rounded, square)
    assert not square - rounded
    assert square - square.scaled(Fraction(1 + 1e-11))


def test_a_variance_and_its_sums_are_nonnegative_and_their_neighbours_are_not():
    r = Ring(range(2))
    v, m1, m2 = _variance(r), r.moment(1), r.moment(2)
    g, p = r.opaque("g"), r.opaque("p", nonnegative=True)
    for good in (
        v,
        m2,
        r.mul(m1, m1),
        v.scaled(Fraction(3)),
        v + number(1),
        r.mul(g, g),
        p,
        m2 + v,
    ):
        assert r.is_nonnegative(good)
    for bad in (-v, m1, r.x, g, v - number(1), m2 - r.mul(m1, m1).scaled(Fraction(2)), r.moment(3)):
        assert not r.is_nonnegative(bad)


# -- maxima and functions ------------------------------------------------------------------------


def only_atom(r: Ring, p: Poly) -> Atom:
    """The atom that a polynomial is."""
    ((monomial, coefficient),) = p.terms.items()
    ((index, exponent),) = monomial
    assert coefficient == exponent == 1
    return r.atoms[index]


def test_a_floor_that_is_never_reached_is_no_floor():
    r = Ring(range(2))
    v = _variance(r)
    for low in (number(0), number(-1), Poly()):
        assert same(r.maximum(v, low), v)
        assert same(r.maximum(low, v), v)
    raised = r.maximum(v, number(1))
    assert not same(raised, v)
    assert r.is_nonnegative(raised)
    assert not same(r.maximum(r.moment(1), number(0)), r.moment(1))


def test_a_maximum_is_symmetric():
    r = Ring(range(2))
    parts = [r.x, r.moment(1), _variance(r), r.opaque("g"), number(1), r.moment(1, {0})]
    for a, b in combinations(parts, 2):
        assert same(r.maximum(a, b), r.maximum(b, a))
    made = [r.maximum(a, b) for a, b in combinations(parts, 2)]
    assert all(not same(a, b) for a, b in combinations(made, 2))


def test_a_maximum_has_x_before_moments_before_what_is_free_of_both():
    parts = [
        lambda r: r.x + r.moment(1),
        lambda r: r.moment(2) + r.opaque("h"),
        lambda r: r.opaque("g") + number(2) + r.opaque("h"),
    ]
    for a, b in combinations(parts, 2):
        for first, second in permutations((a, b)):
            r = Ring(range(2))
            atom = only_atom(r, r.maximum(first(r), second(r)))
            assert atom.kind == "maximum"
            assert same(atom.base, a(r))
            assert same(atom.other, b(r))


def test_a_maximum_is_nonnegative_where_one_of_its_parts_is():
    r = Ring(range(2))
    g = r.opaque("g")
    assert r.is_nonnegative(r.maximum(g, number(Fraction(1, 10))))
    assert r.is_nonnegative(r.maximum(r.x, _variance(r)))
    assert not r.is_nonnegative(r.maximum(g, r.x))
    assert not r.is_nonnegative(r.maximum(g, number(-1)))
    assert r.power(r.maximum(g, number(1)), Fraction(1, 2)) is not None
    assert r.power(r.maximum(g, r.x), Fraction(1, 2)) is None


def test_a_maximum_varies_along_what_its_parts_vary_along():
    r = Ring(range(3))
    low = only_atom(r, r.maximum(r.opaque("g", {1}), r.moment(2, {1, 2})))
    assert low.varies == {0, 1}
    assert (low.has_x, low.has_moment) == (False, True)
    high = only_atom(r, r.maximum(r.x, number(0)))
    assert high.varies == {0, 1, 2}
    assert (high.has_x, high.has_moment) == (True, False)


def test_functions_of_one_name_and_argument_are_one_atom():
    r = Ring(range(2))
    rounded = r.x.scaled(3 * Fraction(1 / 3))
    s = r.function("sigmoid", r.x, nonnegative=True)
    assert same(s, r.function("sigmoid", r.x, nonnegative=True))
    assert same(s, r.function("sigmoid", rounded, nonnegative=True))
    others = [
        r.function("tanh", r.x),
        r.function("sigmoid", r.x.scaled(Fraction(2))),
        r.function(("window", 0, 3), r.x),
        r.function(("window", 1, 3), r.x),
        r.function(("window", 0, 5), r.x),
    ]
    assert all(not same(a, b) for a, b in combinations([s, *others], 2))
    atom = only_atom(r, s)
    assert (atom.kind, atom.key, atom.has_x, atom.varies) == ("function", "sigmoid", True, {0, 1})
    assert atom.base is not None
    assert atom.base.is_close(r.x)
    assert r.is_nonnegative(s)
    assert not any(r.is_nonnegative(other) for other in others)


def test_a_function_is_a_factor_like_any_other():
    r = Ring(range(2))
    s = r.function("sigmoid", r.moment(1, {1}), nonnegative=True)
    assert only_atom(r, s).varies == {0}
    assert only_atom(r, s).has_moment
    assert same(r.power(r.mul(s, s), Fraction(1, 2)), s)
    inverse = r.power(s, -1)
    assert inverse is not None
    assert same(r.mul(s, inverse), number(1))
    t = r.function("tanh", r.x)
    assert r.power(t, Fraction(1, 2)) is None
    assert not same(r.power(r.mul(t, t), Fraction(1, 2)), t)


# -- moments over axes ---------------------------------------------------------------------------

SIZES = (2, 3, 2)
AXES = frozenset(range(3))
SOME = [frozenset(d) for n in range(1, 4) for d in combinations(AXES, n)]


def test_moments_over_other_axes_are_other_atoms():
    r = Ring(AXES)
    moments = [r.moment(k, dims) for k in (1, 2, 3) for dims in SOME]
    assert all(not same(a, b) for a, b in combinations(moments, 2))
    assert same(r.moment(2), r.moment(2, AXES))
    assert same(r.moment(0, {1}), number(1))
    for k in (1, 2, 3):
        for dims in SOME:
            atom = only_atom(r, r.moment(k, dims))
            assert (atom.kind, atom.key, atom.varies) == ("moment", dims, AXES - dims)
            assert (atom.has_x, atom.has_moment) == (False, True)
            assert r.order_of(atom) == k
            assert atom.nonnegative == (k == 2)


def test_only_moments_of_x_have_an_order():
    r = Ring(AXES)
    g = r.opaque("g", AXES)
    part = r.part({0, 1, 9})
    square = r.mul(part, part)
    assert r.order_of(only_atom(r, r.expectation(square, {9}))) == 2
    root = r.power(r.moment(2, {2}), Fraction(1, 2))
    assert root is not None
    for p in (
        r.x,
        g,
        r.expectation(r.mul(r.x, g), {0}),
        r.expectation(g, {0}),
        r.expectation(r.absolute(r.x), {0}),
        r.expectation(root, {0}),
        r.function("sigmoid", r.moment(1)),
    ):
        assert r.order_of(only_atom(r, p)) is None


@pytest.mark.parametrize("dims", SOME, ids=lambda d: "".join(map(str, sorted(d))))
def test_what_is_constant_along_the_axes_stands_in_front_of_a_mean(dims):
    r = Ring(AXES)
    rest = AXES - dims
    along, apart = r.opaque("along", dims), r.opaque("apart", rest)
    m1, m2 = r.moment(1, dims), r.moment(2, dims)
    x2 = r.mul(r.x, r.x)
    assert same(r.expectation(r.x, dims), m1)
    assert same(
        r.expectation(x2 + r.x.scaled(Fraction(3)) + number(5), dims),
        m2 + m1.scaled(Fraction(3)) + number(5),
    )
    centred = r.x - m1
    assert not r.expectation(centred, dims)
    assert same(r.expectation(r.mul(centred, centred), dims), m2 - r.mul(m1, m1))
    for constant in (number(7), apart, m1, r.moment(3, AXES), r.power(m2, Fraction(-1, 2))):
        assert constant is not None
        assert same(r.expectation(constant, dims), constant)
        assert same(r.expectation(r.mul(constant, r.x), dims), r.mul(constant, m1))
    masked = r.expectation(r.mul(along, r.x), dims)
    assert not same(masked, r.mul(along, m1))
    assert only_atom(r, masked).varies == rest
    assert same(r.expectation(masked, dims), masked)


def test_a_mean_of_a_value_that_is_constant_is_the_value_itself():
    r = Ring(AXES)
    for p in (r.x, r.moment(1, {0}), r.opaque("g", {1})):
        assert same(r.expectation(p, ()), p)


POWERS = [1, 2, 3, -1, -2, Fraction(1, 2), Fraction(-1, 2)]


@pytest.mark.parametrize("exponent", POWERS, ids=str)
def test_a_mean_of_a_power_is_one_atom(exponent):
    r = Ring(AXES)
    power = r.power(r.mul(r.x, r.x) + r.opaque("p", {1}, nonnegative=True), exponent)
    assert power is not None
    mean = r.expectation(power, {1})
    assert mean
    assert all(not r.atoms[i].varies & {1} for i in mean.atoms())
    assert all(not r.atoms[i].has_x for i in mean.atoms())


def test_nested_means_of_a_root():
    """E_C[sqrt(E_HW[x^2])], as in a global response norm."""
    r = Ring(AXES)
    root = r.power(r.moment(2, {1, 2}), Fraction(1, 2))
    assert root is not None
    mean = only_atom(r, r.expectation(root, {0}))
    assert (mean.kind, mean.key, mean.varies) == ("moment", {0}, set())
    assert mean.nonnegative
    assert same(mean.base, root)
    assert same(r.expectation(root, {1}), root)
    assert same(r.expectation(root, {0, 1}), r.expectation(root, {0}))
    assert not same(r.expectation(root, {0}), r.power(r.moment(2), Fraction(1, 2)))
    assert same(r.expectation(r.mul(root, root), {0}), r.moment(2))


@st.composite
def sums(draw):
    """A ring and a polynomial of x and of operands along some axes, x in each of its terms."""
    r = Ring(AXES)
    operands = [r.opaque(("g", dims), dims) for dims in SOME]
    total = Poly()
    for _ in range(draw(st.integers(1, 3))):
        term = r.x.scaled(draw(st.fractions(-3, 3, max_denominator=4)))
        for factor in draw(st.lists(st.sampled_from([r.x, *operands]), max_size=3)):
            term = r.mul(term, factor)
        total = total + term
    return r, total


@LAWS
@given(sums(), st.sampled_from(SOME), st.sampled_from(SOME))
def test_a_mean_of_means_is_a_mean_over_all_of_their_axes(drawn, first, second):
    r, p = drawn
    both = r.expectation(p, first | second)
    assert same(r.expectation(r.expectation(p, first), second), both)
    assert same(r.expectation(r.expectation(p, second), first), both)


@LAWS
@given(sums(), st.sampled_from(SOME), st.fractions(-3, 3, max_denominator=4))
def test_a_mean_is_linear(drawn, dims, c):
    r, p = drawn
    q = r.mul(p, r.x) + r.moment(1, {0})
    one, other = r.expectation(p, dims), r.expectation(q, dims)
    assert same(r.expectation(p + q, dims), one + other)
    assert same(r.expectation(p.scaled(c), dims), one.scaled(c))


QUANTITIES: dict[str, Callable[[Ring], Poly]] = {
    "x": lambda r: r.x,
    "2x": lambda r: r.x.scaled(Fraction(2)),
    "x^2": lambda r: r.mul(r.x, r.x),
    "x*g": lambda r: r.mul(r.x, r.opaque("g", AXES)),
    "g": lambda r: r.opaque("g", AXES),
    "x*sigmoid(x)": lambda r: r.mul(r.x, r.function("sigmoid", r.x, nonnegative=True)),
    "1/x": lambda r: r.power(r.x, -1) or Poly(),
}


@pytest.mark.parametrize("dims", SOME, ids=lambda d: "".join(map(str, sorted(d))))
@pytest.mark.parametrize("name", list(QUANTITIES))
def test_a_variance_over_any_axes_is_nonnegative_and_its_neighbours_are_not(name, dims):
    r = Ring(AXES)
    q = QUANTITIES[name](r)
    square, mean = r.expectation(r.mul(q, q), dims), r.expectation(q, dims)
    drop = r.mul(mean, mean)
    variance = square - drop
    if not variance:  # nothing varies along these axes
        return
    for good in (
        variance,
        variance.scaled(Fraction(3)) + number(1),
        square,
        drop,
        square.scaled(Fraction(3)) - drop.scaled(Fraction(2)),
        variance + r.mul(square, r.opaque("p", nonnegative=True)),
    ):
        assert r.is_nonnegative(good)
    for bad in (
        -variance,
        -square,
        variance - number(1),
        square - drop.scaled(Fraction(3, 2)),
        square - mean,
        r.mul(square, r.opaque("h")),
    ):
        assert not r.is_nonnegative(bad)
    for other in SOME:
        wrong = r.expectation(q, other)
        if not same(wrong, mean) and not other > dims:
            assert not r.is_nonnegative(square - r.mul(wrong, wrong))


def test_one_square_pays_for_one_square():
    r = Ring(AXES)
    m2, over_0, over_1 = r.moment(2), r.moment(1, {0}), r.moment(1, {1})
    assert not r.is_nonnegative(m2 - r.mul(over_0, over_0) - r.mul(over_1, over_1))
    m1 = r.moment(1)
    fourth = r.mul(r.mul(m1, m1), r.mul(m1, m1))
    assert not r.is_nonnegative(m2 - fourth)


def test_a_masked_variance_is_made_of_masked_moments():
    """E[m (x - mu)^2] / E[m] with mu = E[m x] / E[m], for any m."""
    r = Ring(AXES)
    dims = {1, 2}
    m = r.opaque("m", AXES)
    total = r.expectation(m, dims)
    count = r.power(total, -1)
    assert count is not None
    mu = r.mul(r.expectation(r.mul(m, r.x), dims), count)
    centred = r.x - mu
    variance = r.mul(r.expectation(r.mul(m, r.mul(centred, centred)), dims), count)
    square = r.mul(r.expectation(r.mul(m, r.mul(r.x, r.x)), dims), count)
    assert same(variance, square - r.mul(mu, mu))
    assert same(r.expectation(r.mul(m, centred), dims), Poly())


# -- slices --------------------------------------------------------------------------------------


def test_a_slice_of_x_is_x_along_another_axis():
    r = Ring(AXES)
    part = r.part({0, 1, 9})
    assert not same(part, r.x)
    assert same(r.sliced(r.x, 2, 9), part)
    assert same(r.part(AXES), r.x)
    atom = only_atom(r, part)
    assert (atom.kind, atom.varies, atom.has_x) == ("x", {0, 1, 9}, True)
    assert same(r.sliced(part, 0, 8), r.part({8, 1, 9}))
    assert not same(r.sliced(r.x, 2, 8), part)


def test_what_is_constant_along_the_axis_is_its_own_slice():
    r = Ring(AXES)
    for p in (number(3), r.moment(2), r.moment(1, {2}), r.opaque("g", {0, 1})):
        assert same(r.sliced(p, 2, 9), p)


def test_a_slice_of_a_sum_of_products_is_the_sum_of_products_of_slices():
    r = Ring(AXES)
    g, part = r.opaque("g", {0}), r.part({0, 1, 9})
    inverse = r.power(r.moment(2, {2}) + number(1), Fraction(-1, 2))
    assert inverse is not None
    p = r.mul(r.mul(r.x, r.x), g) - r.mul(r.x, inverse).scaled(Fraction(2)) + number(1)
    wanted = r.mul(r.mul(part, part), g) - r.mul(part, inverse).scaled(Fraction(2)) + number(1)
    assert same(r.sliced(p, 2, 9), wanted)
    assert same(r.sliced(r.power(r.x, -1) or Poly(), 2, 9), r.power(part, -1))


@pytest.mark.parametrize(
    "of",
    [
        lambda r: r.opaque("g", {2}),
        lambda r: r.mul(r.x, r.opaque("g", {1, 2})),
        lambda r: r.x - r.moment(1, {0, 1}),
        lambda r: r.absolute(r.x),
        lambda r: r.power(r.mul(r.x, r.x) + number(1), -1),
        lambda r: r.function("sigmoid", r.x),
        lambda r: r.maximum(r.x, number(0)),
        lambda r: r.expectation(r.mul(r.x, r.opaque("g", AXES)), {0}),
    ],
    ids=["g", "x*g", "m1", "|x|", "1/(x^2+1)", "sigmoid", "maximum", "E[x*g]"],
)
def test_a_slice_of_anything_else_that_varies_is_refused(of):
    r = Ring(AXES)
    assert r.sliced(of(r), 2, 9) is None


def test_moments_of_slices_are_atoms_of_their_own():
    r = Ring(AXES)
    first, second = r.part({0, 1, 8}), r.part({0, 1, 9})
    means = [
        r.expectation(p, d) for p in (r.x, first, second) for d in ({0}, {2}, {8}, {9}, {0, 9})
    ]
    made = [m for m in means if only_atom(r, m).kind == "moment"]
    assert len({next(iter(m.terms)) for m in made}) == 7
    assert same(r.expectation(first, {9}), first)
    assert same(r.expectation(r.x, {8}), r.x)


# -- against numbers -----------------------------------------------------------------------------


class Tensors:
    """The atoms of a ring as tensors: x, operands along their axes, and what is made of them."""

    def __init__(self, r: Ring, seed: int) -> None:
        self.r, self.generator = r, torch.Generator().manual_seed(seed)
        self.given: dict[int, torch.Tensor] = {}

    def atom(self, index: int) -> torch.Tensor:
        a = self.r.atoms[index]
        if a.kind in ("x", "opaque"):
            if index not in self.given:
                shape = [size if axis in a.varies else 1 for axis, size in enumerate(SIZES)]
                made = torch.randn(shape, generator=self.generator, dtype=torch.float64)
                self.given[index] = made.abs() + 0.1 if a.nonnegative else made
            return self.given[index]
        if a.kind == "constant":
            return torch.tensor([[[float(a.key)]]], dtype=torch.float64)
        assert a.base is not None
        base = self.poly(a.base)
        if a.kind == "moment":
            base = base.mean(sorted(a.key), keepdim=True)
        elif a.kind == "maximum":
            assert a.other is not None
            base = torch.maximum(base, self.poly(a.other))
        elif a.kind == "function":
            base = torch.sigmoid(base)
        assert all(size == 1 or axis in a.varies for axis, size in enumerate(base.shape))
        assert not a.nonnegative or (base >= -1e-12 * base.abs().max()).all()
        return base

    def poly(self, p: Poly) -> torch.Tensor:
        total = torch.zeros(1, 1, 1, dtype=torch.float64)
        for monomial, coefficient in p.terms.items():
            term = torch.full((1, 1, 1), float(coefficient), dtype=torch.float64)
            for index, exponent in monomial:
                term = term * self.atom(index) ** float(exponent)
            total = total + term
        return total


@st.composite
def programs(draw):
    """A ring, and a value in it twice: in the normal form, and computed step by step."""
    r = Ring(AXES)
    tensors = Tensors(r, draw(st.integers(0, 99)))
    leaves = [r.x, r.moment(1, {1}), r.moment(2, {0, 2}), number(Fraction(1, 2))]
    leaves += [r.opaque(("g", d), d, nonnegative=len(d) == 2) for d in SOME[::2]]

    def leaf() -> tuple[Poly, torch.Tensor]:
        p = draw(st.sampled_from(leaves))
        return p, tensors.poly(p)

    def one(depth: int) -> tuple[Poly, torch.Tensor]:
        if not depth:
            return leaf()
        p, value = one(depth - 1)
        kind = draw(st.integers(0, 9))
        if kind <= 2:
            dims = draw(st.sampled_from(SOME))
            apart = [size if axis in dims else -1 for axis, size in enumerate(SIZES)]
            return r.expectation(p, dims), value.expand(apart).mean(sorted(dims), keepdim=True)
        if kind == 3:
            return r.function("sigmoid", p, nonnegative=True), torch.sigmoid(value)
        if kind == 4:
            return r.absolute(p), value.abs()
        if kind == 5:
            root = r.power(r.mul(p, p) + number(1), Fraction(-1, 2))
            return (p, value) if root is None else (root, (value * value + 1).rsqrt())
        q, other = one(depth - 1) if depth < 3 else leaf()
        if kind == 6:
            return r.maximum(p, q), torch.maximum(value, other)
        if kind == 7:
            return p - q, value - other
        return r.mul(p, q), value * other

    p, value = one(4)
    return tensors, p, value


@LAWS
@given(programs())
def test_a_value_is_the_number_that_its_steps_give(drawn):
    tensors, p, value = drawn
    # A square of a difference is added up from its terms, and |a| is the root of a square.
    bound = 1e-6 * max(1.0, value.abs().max().item())
    assert ((tensors.poly(p) - value).abs() <= bound).all()


# -- coefficients --------------------------------------------------------------------------------


@LAWS
@given(st.floats(1e-30, 1e30), st.floats(-8, 8))
def test_coefficients_are_one_number_up_to_the_tolerance(a, shift):
    moved = a * (1 + shift * COEFFICIENT_TOLERANCE)
    if abs(shift) < 0.9:
        assert close(a, moved)
    if abs(shift) > 1.1:
        assert not close(a, moved)
    assert not close(a, -a)
    assert not close(a, 0)


def test_a_literal_rounded_to_float32_is_another_number():
    third = 1 / 3
    rounded = struct.unpack("f", struct.pack("f", third))[0]
    assert close(third, Fraction(1, 3))
    assert not close(rounded, third)


def test_closeness_of_polynomials_needs_the_same_terms():
    r = Ring(range(2))
    tiny = number(Fraction(1, 10**30))
    assert r.x.is_close(r.x.scaled(1 + Fraction(1, 10**13)))
    assert not r.x.is_close(r.x.scaled(1 + Fraction(1, 10**11)))
    assert not r.x.is_close(r.x + tiny)
    assert not r.x.is_close(r.moment(1))


def test_constants_and_atoms_are_read_off():
    r = Ring(range(2))
    assert number(3).constant() == 3
    assert Poly().constant() == 0
    assert r.x.constant() is None
    assert (r.x + number(1)).constant() is None
    assert len((r.x + r.moment(1)).atoms()) == 2
    inside, outside = r.split(r.mul(r.x, r.moment(2)) + r.moment(2), ("x",))
    assert same(inside, r.mul(r.x, r.moment(2)))
    assert same(outside, r.moment(2))
