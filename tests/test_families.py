"""Every row of `FAMILIES`: which polynomials it recognises, which it does not, and what its body computes.

A family without a case fails `test_every_family_has_cases`. The polynomials are made by hand with a ring, for an x
with axes 0 (batch), 1 (channels), 2 (height) and 3 (width). The formulas are written in the words of the papers,
element by element where that is short, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from normfx.algebra import Poly, Ring, number
from normfx.classify import Form, classify
from normfx.families import FAMILIES, match_family
from normfx.ops import NormSpec, norm

AXES = range(4)
IMAGE = {2, 3}
CHANNELS = {1}
BATCH = {0, 2, 3}  # all that BatchNorm takes its statistics over
EPS = Fraction(1e-5)
HALF = Fraction(1, 2)
COUNT = 30  # of the image

Made = Callable[[Ring], Poly]


def power(r: Ring, p: Poly, exponent: int | Fraction) -> Poly:
    made = r.power(p, exponent)
    assert made is not None
    return made


def quotient(r: Ring, a: Poly, b: Poly) -> Poly:
    return r.mul(a, power(r, b, -1))


def variance(r: Ring, dims: set[int]) -> Poly:
    return r.moment(2, dims) - r.mul(r.moment(1, dims), r.moment(1, dims))


def root(r: Ring, square: Poly, eps: Fraction = EPS) -> Poly:
    return power(r, square + number(eps), HALF)


def matched(made: Made) -> Form:
    r = Ring(AXES)
    form = match_family(r, made(r))
    assert form is not None
    return form


def free(form: Form) -> tuple[Any, ...]:
    """A form without its polynomials."""
    return form.statistic, form.dims, form.beyond, form.window, form.place


# -- the polynomials -----------------------------------------------------------------------------


def response(
    r: Ring,
    dims: Any = IMAGE,
    beyond: Any = CHANNELS,
    eps: Poly | None = None,
    count: int = COUNT,
    numerator: Poly | None = None,
) -> Poly:
    """X G / (mean G + eps), G the norm of x over `dims`."""
    g = power(r, r.moment(2, dims).scaled(Fraction(count)), HALF)
    divisor = r.expectation(g, beyond) + (number(EPS) if eps is None else eps)
    return quotient(r, r.mul(r.x, g if numerator is None else numerator), divisor)


def local(
    r: Ring,
    *,
    of: Poly | None = None,
    low: Poly | None = None,
    exponent: int | Fraction = Fraction(-3, 4),
    window: tuple[Any, ...] = ("window", 1, 5),
) -> Poly:
    """X (2 + mean of x^2 over five channels / 2)^(-3/4)."""
    square = r.mul(r.x, r.x) if of is None else of
    mean = r.function(window, square, nonnegative=True)
    low = number(2) if low is None else low
    return r.mul(r.x, power(r, mean.scaled(HALF) + low, exponent))


def gate(r: Ring) -> Poly:
    return r.opaque("v", CHANNELS)


def batch(r: Ring) -> Poly:
    """The deviation over the batch, of an EvoNorm in training."""
    return root(r, variance(r, BATCH))


def running(r: Ring) -> Poly:
    """A given deviation, of an EvoNorm in eval mode."""
    return power(r, r.opaque("running", CHANNELS, nonnegative=True) + number(EPS), HALF)


def b0(r: Ring, left: Poly, *, right: Poly | None = None, slope: Poly | None = None) -> Poly:
    right = root(r, variance(r, IMAGE)) if right is None else right
    slope = gate(r) if slope is None else slope
    return quotient(r, r.x, r.maximum(left, r.mul(slope, r.x) + right))


def b1(r: Ring, left: Poly, *, right: Poly | None = None, one: Poly | None = None) -> Poly:
    right = root(r, r.moment(2, IMAGE)) if right is None else right
    one = number(1) if one is None else one
    return quotient(r, r.x, r.maximum(left, r.mul(r.x + one, right)))


def b2(r: Ring, left: Poly, *, right: Poly | None = None, times: int = 1) -> Poly:
    right = root(r, r.moment(2, IMAGE)) if right is None else right
    return quotient(r, r.x, r.maximum(left, right - r.x.scaled(Fraction(times))))


def bilinear(r: Ring, u: Poly | None = None, v: Poly | None = None, dims: Any = AXES) -> Poly:
    u = r.opaque("u", {0, 1}) if u is None else u
    v = r.opaque("v", {2, 3}) if v is None else v
    return quotient(r, r.x, r.expectation(r.mul(r.mul(r.x, u), v), dims))


# family -> polynomials that are members of it, and the form of each without its polynomials
MEMBERS: dict[str, dict[str, tuple[Made, tuple[Any, ...]]]] = {
    "global-response": {
        "ConvNeXt": (response, (IMAGE, CHANNELS, 0, "outside")),
        "other axes": (lambda r: response(r, {1}, {2, 3}), ({1}, IMAGE, 0, "outside")),
        "mean over the batch too": (
            lambda r: response(r, {2}, {0, 1}),
            ({2}, {0, 1}, 0, "outside"),
        ),
        "eps that is an operand": (
            lambda r: response(r, eps=r.opaque("eps")),
            (IMAGE, CHANNELS, 0, "outside"),
        ),
        "root of a mean": (lambda r: response(r, count=1), (IMAGE, CHANNELS, 0, "outside")),
        "mean over what is constant too": (
            lambda r: response(r, beyond={1, 2}),
            (IMAGE, CHANNELS, 0, "outside"),
        ),
    },
    "local-response": {
        "AlexNet": (local, ({1}, set(), 5, "inside")),
        "even window": (
            lambda r: local(r, window=("window", 1, 4)),
            ({1}, set(), 4, "inside"),
        ),
        "another axis": (
            lambda r: local(r, window=("window", 3, 5)),
            ({3}, set(), 5, "inside"),
        ),
        "root": (lambda r: local(r, exponent=-HALF), ({1}, set(), 5, "inside")),
        "reciprocal": (lambda r: local(r, exponent=-1), ({1}, set(), 5, "inside")),
    },
    "evonorm-b0": {
        "training": (lambda r: b0(r, batch(r)), (IMAGE, BATCH, 0, "inside")),
        "eval": (lambda r: b0(r, running(r)), (IMAGE, set(), 0, "inside")),
        "gate that is a number": (
            lambda r: b0(r, batch(r), slope=number(2)),
            (IMAGE, BATCH, 0, "inside"),
        ),
    },
    "evonorm-b1": {
        "training": (lambda r: b1(r, batch(r)), (IMAGE, BATCH, 0, "inside")),
        "eval": (lambda r: b1(r, running(r)), (IMAGE, set(), 0, "inside")),
    },
    "evonorm-b2": {
        "training": (lambda r: b2(r, batch(r)), (IMAGE, BATCH, 0, "inside")),
        "eval": (lambda r: b2(r, running(r)), (IMAGE, set(), 0, "inside")),
    },
    "tanh": {
        "DyT": (
            lambda r: r.function("tanh", r.mul(r.x, r.opaque("alpha"))),
            (set(), set(), 0, "inside"),
        ),
        "number": (
            lambda r: r.function("tanh", r.x.scaled(HALF)),
            (set(), set(), 0, "inside"),
        ),
        "alpha along an axis": (
            lambda r: r.function("tanh", r.mul(r.x, gate(r) + number(1))),
            (set(), set(), 0, "inside"),
        ),
    },
    "bilinear": {
        "spectral norm": (bilinear, (set(AXES), set(), 0, "inside")),
        "as a sum": (
            lambda r: bilinear(r).scaled(Fraction(1, 360)),
            (set(AXES), set(), 0, "inside"),
        ),
        "the other way round": (
            lambda r: bilinear(r, r.opaque("v", {3}), r.opaque("u", {0, 1, 2})),
            (set(AXES), set(), 0, "inside"),
        ),
    },
}


def evonorm_misses(norm: Callable[..., Poly]) -> dict[str, Made]:
    """What no EvoNorm of the B series is, from the right part that it has."""
    return {
        "another eps under the left root": lambda r: norm(r, root(r, variance(r, BATCH), EPS * 2)),
        "no eps under the left root": lambda r: norm(r, power(r, variance(r, BATCH), HALF)),
        "mean square on the left": lambda r: norm(r, root(r, r.moment(2, BATCH))),
        "variance, not its root, on the left": lambda r: norm(r, variance(r, BATCH) + number(EPS)),
        "unbiased variance on the left": lambda r: norm(
            r, root(r, variance(r, BATCH).scaled(Fraction(90, 89)))
        ),
        "twice the left root": lambda r: norm(r, batch(r).scaled(Fraction(2))),
        "mean on the left": lambda r: norm(r, r.moment(1, BATCH)),
        "x on the left": lambda r: norm(r, r.mul(r.x, r.x)),
        "square of the divisor": lambda r: power(r, norm(r, batch(r)), 2),
        "multiplied by the divisor": lambda r: r.mul(
            r.mul(r.x, r.x), power(r, norm(r, batch(r)), -1)
        ),
        "x missing": lambda r: quotient(r, norm(r, batch(r)), r.x),
        "times x again": lambda r: r.mul(r.x, norm(r, batch(r))),
        "times a statistic": lambda r: r.mul(r.moment(2, IMAGE), norm(r, batch(r))),
        "plus x": lambda r: norm(r, batch(r)) + r.x,
        "centred": lambda r: (
            norm(r, batch(r)) - quotient(r, r.mul(r.moment(1, IMAGE), norm(r, batch(r))), r.x)
        ),
        "slice of x": lambda r: r.mul(r.part({0, 1, 2, 9}), quotient(r, norm(r, batch(r)), r.x)),
    }


# family -> polynomials that look like a member and are none
MISSES: dict[str, dict[str, Made]] = {
    "global-response": {
        "mean over the axes of the norm": lambda r: response(r, beyond=IMAGE),
        "no mean": lambda r: response(r, beyond=()),
        "another norm above": lambda r: response(r, numerator=power(r, r.moment(2, {3}), HALF)),
        "square above": lambda r: response(r, numerator=r.moment(2, IMAGE)),
        "nothing above": lambda r: response(r, numerator=number(1)),
        "x missing": lambda r: quotient(r, response(r), r.x),
        "x twice": lambda r: r.mul(r.x, response(r)),
        "slice of x": lambda r: r.mul(r.part({0, 1, 2, 9}), quotient(r, response(r), r.x)),
        "root of the mean square": lambda r: quotient(
            r,
            r.mul(r.x, power(r, r.moment(2, IMAGE), HALF)),
            power(r, r.moment(2, {1, 2, 3}), HALF) + number(EPS),
        ),
        "eps under the root": lambda r: quotient(
            r,
            r.mul(r.x, root(r, r.moment(2, IMAGE))),
            r.expectation(root(r, r.moment(2, IMAGE)), CHANNELS) + number(EPS),
        ),
        "deviation": lambda r: quotient(
            r,
            r.mul(r.x, power(r, variance(r, IMAGE), HALF)),
            r.expectation(power(r, variance(r, IMAGE), HALF), CHANNELS) + number(EPS),
        ),
        "one-norm": lambda r: quotient(
            r,
            r.mul(r.x, r.expectation(r.absolute(r.x), IMAGE)),
            r.expectation(r.absolute(r.x), {1, 2, 3}) + number(EPS),
        ),
        "fourth root": lambda r: quotient(
            r,
            r.mul(r.x, power(r, r.moment(2, IMAGE), Fraction(1, 4))),
            r.expectation(power(r, r.moment(2, IMAGE), Fraction(1, 4)), CHANNELS) + number(EPS),
        ),
        "root of a fourth moment": lambda r: quotient(
            r,
            r.mul(r.x, power(r, r.moment(4, IMAGE), HALF)),
            r.expectation(power(r, r.moment(4, IMAGE), HALF), CHANNELS) + number(EPS),
        ),
        "masked norm": lambda r: quotient(
            r,
            r.mul(r.x, power(r, masked(r), HALF)),
            r.expectation(power(r, masked(r), HALF), CHANNELS) + number(EPS),
        ),
        "weighted mean": lambda r: quotient(
            r,
            r.mul(r.x, power(r, r.moment(2, IMAGE), HALF)),
            r.expectation(r.mul(power(r, r.moment(2, IMAGE), HALF), gate(r)), CHANNELS)
            + number(EPS),
        ),
        "eps that is a mean": lambda r: response(r, eps=r.moment(1)),
        "eps that is x": lambda r: response(r, eps=r.x),
        "eps of a sigmoid of x": lambda r: response(r, eps=r.function("sigmoid", r.x)),
        "eps of a root of a moment": lambda r: response(r, eps=power(r, variance(r, {1}), HALF)),
        "divisor squared": lambda r: r.mul(
            response(r), quotient(r, response(r), response_above(r))
        ),
        "divisor's root": lambda r: r.mul(
            response_above(r), power(r, quotient(r, response(r), response_above(r)), HALF)
        ),
        "plus x": lambda r: response(r) + r.x,
    },
    "local-response": {
        "window of x": lambda r: local(r, of=r.x),
        "window of |x|": lambda r: local(r, of=r.absolute(r.x)),
        "window of x^4": lambda r: local(r, of=power(r, r.x, 4)),
        "window of a centred square": lambda r: local(r, of=power(r, r.x - r.moment(1), 2)),
        "window of a weighted square": lambda r: local(r, of=r.mul(r.mul(r.x, r.x), gate(r))),
        "window of an operand": lambda r: local(r, of=r.opaque("g")),
        "window of a slice": lambda r: local(r, of=power(r, r.part({0, 1, 2, 9}), 2)),
        "mean over all of them": lambda r: r.mul(
            r.x, power(r, r.moment(2, {1}) + number(2), Fraction(-3, 4))
        ),
        "a function of the square": lambda r: local(r, window=("tanh", 1, 5)),
        "multiplied": lambda r: local(r, exponent=Fraction(3, 4)),
        "root of it": lambda r: r.mul(r.x, power(r, power(r, local_mean(r), HALF) + number(2), -1)),
        "eps that is an operand": lambda r: local(r, low=r.opaque("eps")),
        "eps that is a mean": lambda r: local(r, low=r.moment(2)),
        "eps with x": lambda r: local(r, low=r.x + number(1)),
        "two windows": lambda r: local(r, low=r.function(("window", 1, 3), r.mul(r.x, r.x))),
        "square of the window": lambda r: local(r, low=power(r, local_mean(r), 2) + number(1)),
        "x missing": lambda r: quotient(r, local(r), r.x),
        "x squared": lambda r: r.mul(r.x, local(r)),
        "times a statistic": lambda r: r.mul(r.moment(2), local(r)),
        "plus x": lambda r: local(r) + r.x,
        "slice of x": lambda r: r.mul(r.part({0, 1, 2, 9}), quotient(r, local(r), r.x)),
    },
    "evonorm-b0": {
        **evonorm_misses(b0),
        "v missing": lambda r: quotient(r, r.x, r.maximum(batch(r), root(r, variance(r, IMAGE)))),
        "v that is a mean": lambda r: b0(r, batch(r), slope=r.moment(1)),
        "v that is x": lambda r: b0(r, batch(r), slope=r.x),
        "v with a sigmoid": lambda r: b0(r, batch(r), slope=r.function("sigmoid", r.x)),
        "mean square on the right": lambda r: b0(r, batch(r), right=root(r, r.moment(2, IMAGE))),
        "twice the right root": lambda r: b0(
            r, batch(r), right=root(r, variance(r, IMAGE)).scaled(Fraction(2))
        ),
        "variance, not its root, on the right": lambda r: b0(
            r, batch(r), right=variance(r, IMAGE) + number(EPS)
        ),
        "unbiased on the right": lambda r: b0(
            r, batch(r), right=root(r, variance(r, IMAGE).scaled(Fraction(30, 29)))
        ),
        "eps outside": lambda r: b0(
            r, batch(r), right=power(r, variance(r, IMAGE), HALF) + number(EPS)
        ),
        "right root negative": lambda r: b0(r, batch(r), right=-root(r, variance(r, IMAGE))),
        "means over other axes": lambda r: b0(
            r,
            batch(r),
            right=root(r, r.moment(2, IMAGE) - r.mul(r.moment(1, {3}), r.moment(1, {3}))),
        ),
    },
    "evonorm-b1": {
        **evonorm_misses(b1),
        "x + 2": lambda r: b1(r, batch(r), one=number(2)),
        "x - 1": lambda r: b1(r, batch(r), one=number(-1)),
        "x alone": lambda r: b1(r, batch(r), one=Poly()),
        "2x + 1": lambda r: quotient(
            r,
            r.x,
            r.maximum(
                batch(r),
                r.mul(r.x.scaled(Fraction(2)) + number(1), root(r, r.moment(2, IMAGE))),
            ),
        ),
        "x + v": lambda r: b1(r, batch(r), one=gate(r)),
        "x + mean": lambda r: b1(r, batch(r), one=r.moment(1, IMAGE)),
        "other roots": lambda r: quotient(
            r,
            r.x,
            r.maximum(
                batch(r),
                r.mul(r.x, root(r, r.moment(2, IMAGE))) + root(r, r.moment(2, {1})),
            ),
        ),
        "variance on the right": lambda r: b1(r, batch(r), right=root(r, variance(r, IMAGE))),
        "twice the right root": lambda r: b1(
            r, batch(r), right=root(r, r.moment(2, IMAGE)).scaled(Fraction(2))
        ),
    },
    "evonorm-b2": {
        **evonorm_misses(b2),
        "2x": lambda r: b2(r, batch(r), times=2),
        "plus x": lambda r: b2(r, batch(r), times=-1),
        "x less the root": lambda r: quotient(
            r, r.x, r.maximum(batch(r), r.x - root(r, r.moment(2, IMAGE)))
        ),
        "twice the right root": lambda r: b2(
            r, batch(r), right=root(r, r.moment(2, IMAGE)).scaled(Fraction(2))
        ),
        "eps outside": lambda r: b2(
            r, batch(r), right=power(r, r.moment(2, IMAGE), HALF) + number(EPS)
        ),
    },
    "tanh": {
        "with a shift": lambda r: r.function("tanh", r.x + number(1)),
        "with a shift that is an operand": lambda r: r.function("tanh", r.x + r.opaque("b")),
        "of an operand": lambda r: r.function("tanh", r.opaque("b")),
        "of a mean": lambda r: r.function("tanh", r.moment(1)),
        "of a centred x": lambda r: r.function("tanh", r.x - r.moment(1)),
        "of a normed x": lambda r: r.function(
            "tanh", r.mul(r.x, power(r, r.moment(2) + number(1), -HALF))
        ),
        "of x^2": lambda r: r.function("tanh", r.mul(r.x, r.x)),
        "of a slice": lambda r: r.function("tanh", r.part({0, 1, 2, 9})),
        "sigmoid": lambda r: r.function("sigmoid", r.x),
        "squared": lambda r: power(r, r.function("tanh", r.x), 2),
        "its inverse": lambda r: power(r, r.function("tanh", r.x), -1),
        "times x": lambda r: r.mul(r.x, r.function("tanh", r.x)),
        "times a statistic": lambda r: r.mul(r.moment(2), r.function("tanh", r.x)),
        "plus x": lambda r: r.function("tanh", r.x) + r.x,
    },
    "bilinear": {
        "along some axes": lambda r: bilinear(r, dims={0, 1, 2}),
        "without v": lambda r: bilinear(r, v=number(1)),
        "of vectors that share an axis": lambda r: bilinear(r, v=r.opaque("v", {1, 2, 3})),
        "of vectors that leave an axis out": lambda r: bilinear(r, v=r.opaque("v", {3})),
        "of three vectors": lambda r: bilinear(r, v=r.mul(r.opaque("v", {2}), r.opaque("w", {3}))),
        "of a square": lambda r: bilinear(r, v=power(r, r.opaque("v", {2, 3}), 2)),
        "of a sum": lambda r: bilinear(r, v=r.opaque("v", {2, 3}) + number(1)),
        "of a mean of x": lambda r: bilinear(r, v=r.moment(1, {0, 1})),
        "of a function": lambda r: bilinear(r, v=r.function("tanh", r.opaque("v", {2, 3}))),
        "of x^2": lambda r: bilinear(r, u=r.mul(r.x, r.opaque("u", {0, 1}))),
        "of a slice": lambda r: quotient(
            r,
            r.x,
            r.expectation(
                r.mul(r.mul(r.part({0, 1, 2, 9}), r.opaque("u", {0, 1})), r.opaque("v", {2, 9})),
                {0, 1, 2, 9},
            ),
        ),
        "with an eps": lambda r: quotient(r, r.x, quotient(r, r.x, bilinear(r)) + number(EPS)),
        "squared": lambda r: quotient(r, power(r, bilinear(r), 2), r.x),
        "multiplied": lambda r: quotient(r, r.mul(r.x, r.x), bilinear(r)),
        "x missing": lambda r: quotient(r, bilinear(r), r.x),
        "x twice": lambda r: r.mul(r.x, bilinear(r)),
        "plus x": lambda r: bilinear(r) + r.x,
    },
}


def masked(r: Ring) -> Poly:
    """A masked mean of squares: E[x^2 m^2]."""
    return r.expectation(power(r, r.mul(r.x, r.opaque("m", set(AXES))), 2), IMAGE)


def response_above(r: Ring) -> Poly:
    """X G."""
    return r.mul(r.x, power(r, r.moment(2, IMAGE).scaled(Fraction(COUNT)), HALF))


def local_mean(r: Ring) -> Poly:
    return r.function(("window", 1, 5), r.mul(r.x, r.x), nonnegative=True)


def every(cases: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(family, name) for family, of in cases.items() for name in of]


@pytest.mark.parametrize(("family", "name"), every(MEMBERS))
def test_a_family_recognises_its_members(family, name):
    made, wanted = MEMBERS[family][name]
    assert free(matched(made)) == (family, *wanted)


@pytest.mark.parametrize(("family", "name"), every(MEMBERS))
def test_a_member_is_of_one_family_and_of_no_other_form(family, name):
    made, _ = MEMBERS[family][name]
    r = Ring(AXES)
    value = made(r)
    assert classify(r, value) is None
    ((monomial, _),) = value.terms.items()
    ours = tuple((i, e) for i, e in monomial if r.atoms[i].kind != "constant")
    assert [n for n, f in FAMILIES.items() if f.match(r, 1.0, ours) is not None] == [family]


@pytest.mark.parametrize(("family", "name"), every(MISSES))
def test_a_family_refuses_what_it_does_not_compute(family, name):
    r = Ring(AXES)
    value = MISSES[family][name](r)
    form = match_family(r, value)
    assert form is None, f"taken for {form.statistic}"


@pytest.mark.parametrize("family", list(MEMBERS))
def test_a_member_times_a_number_has_it_in_front(family):
    for made, _ in MEMBERS[family].values():
        for factor in (Fraction(3), Fraction(-1, 2)):
            r = Ring(AXES)
            plain, scaled = match_family(r, made(r)), match_family(r, made(r).scaled(factor))
            assert plain is not None
            assert scaled is not None
            assert scaled.scale == pytest.approx(float(factor) * plain.scale, rel=1e-15)
            assert free(plain) == free(scaled)


@pytest.mark.parametrize("family", list(MEMBERS))
def test_a_member_times_operands_has_them_as_its_weight(family):
    for made, _ in MEMBERS[family].values():
        r = Ring(AXES)
        given = r.opaque("weight", CHANNELS)
        eps = r.opaque("p", nonnegative=True) + number(1)
        for weight in (given, r.mul(power(r, given, 2), power(r, eps, -HALF))):
            plain = match_family(r, made(r))
            weighted = match_family(r, r.mul(made(r), weight).scaled(Fraction(2)))
            assert plain is not None
            assert weighted is not None
            assert weighted.weight.terms == weight.terms
            assert plain.weight.constant() == 1
            assert weighted.scale == pytest.approx(2 * plain.scale, rel=1e-15)
            assert free(plain) == free(weighted)


# -- statistics of slices ------------------------------------------------------------------------

PART = {0, 1, 2, 9}  # a slice along the width


def square_of_slice(r: Ring, dims: set[int]) -> Poly:
    return r.expectation(power(r, r.part(PART), 2), dims)


SLICED: dict[str, Callable[[Ring, set[int]], Poly]] = {
    "mean square": lambda r, dims: r.mul(
        r.x, power(r, square_of_slice(r, dims) + number(EPS), -HALF)
    ),
    "variance": lambda r, dims: r.mul(
        r.x - r.expectation(r.part(PART), dims),
        power(
            r,
            square_of_slice(r, dims) + number(EPS) - power(r, r.expectation(r.part(PART), dims), 2),
            -HALF,
        ),
    ),
    "floor": lambda r, dims: quotient(
        r, r.x, r.maximum(power(r, square_of_slice(r, dims), HALF), number(EPS))
    ),
}


@pytest.mark.parametrize("name", list(SLICED))
def test_a_statistic_of_a_slice_is_one_over_the_axis_of_the_slice(name):
    r = Ring(AXES)
    form = classify(r, SLICED[name](r, {2, 9}))
    assert form is not None
    assert form.dims == {2, 9}


@pytest.mark.parametrize("name", [name for name in SLICED if name != "variance"])
def test_a_statistic_of_one_element_is_none_of_x(name):
    """E_D[x_1^2] for the first elements x_1 along another axis than D: no statistic of x over D."""
    r = Ring(AXES)
    assert classify(r, SLICED[name](r, {2})) is None


@pytest.mark.parametrize("made", [b1, b2], ids=["b1", "b2"])
def test_an_evonorm_with_the_root_of_one_element_is_none(made):
    r = Ring(AXES)
    right = power(r, square_of_slice(r, IMAGE - {3}) + number(EPS), HALF)
    assert match_family(r, made(r, running(r), right=right)) is None


def test_a_global_response_of_one_element_is_none():
    r = Ring(AXES)
    g = power(r, square_of_slice(r, {2}), HALF)
    value = quotient(r, r.mul(r.x, g), r.expectation(g, CHANNELS) + number(EPS))
    assert match_family(r, value) is None


# -- the numbers and operands of a form ----------------------------------------------------------


def float_of(p: Poly | None) -> float:
    assert p is not None
    held = p.constant()
    assert held is not None
    return float(held)


def test_the_eps_of_a_global_response_is_in_units_of_the_root_of_a_mean():
    """G is a root of a sum: mean(G) + eps = sqrt(n) (mean of sqrt(m2) + eps / sqrt(n))."""
    form = matched(response)
    assert float_of(form.eps) == pytest.approx(float(EPS) / math.sqrt(COUNT), rel=1e-14)
    assert form.scale == pytest.approx(1.0, rel=1e-15)
    plain = matched(lambda r: response(r, count=1))
    assert float_of(plain.eps) == float(EPS)
    assert plain.scale == 1.0
    r = Ring(AXES)
    given = match_family(r, response(r, eps=r.opaque("eps"), count=4))
    assert given is not None
    assert given.eps is not None
    assert given.eps.is_close(r.opaque("eps").scaled(HALF))


def test_the_numbers_of_a_local_response_are_in_units_of_its_mean():
    """(2 + s / 2)^(-3/4) = (1/2)^(-3/4) (s + 4)^(-3/4)."""
    form = matched(local)
    assert float_of(form.eps) == 4.0
    assert form.power == 0.75
    assert form.scale == pytest.approx(0.5**-0.75, rel=1e-15)
    assert matched(lambda r: local(r, exponent=-1)).power == 1.0
    assert matched(lambda r: local(r, exponent=-HALF)).power == 0.5
    third = matched(lambda r: local(r, exponent=Fraction(-1 / 3)))
    assert third.power == 1 / 3


@pytest.mark.parametrize("made", [b0, b1, b2], ids=["b0", "b1", "b2"])
def test_the_operands_of_an_evonorm(made):
    r = Ring(AXES)
    training, evaluated = match_family(r, made(r, batch(r))), match_family(r, made(r, running(r)))
    assert training is not None
    assert evaluated is not None
    for form in (training, evaluated):
        assert form.eps is not None
        assert form.eps.is_close(number(EPS))
        assert form.scale == 1.0
        slope = gate(r) if made is b0 else Poly()
        assert (form.gate or Poly()).terms == slope.terms
    assert training.given is None
    assert evaluated.given is not None
    assert evaluated.given.terms == running(r).terms


def test_a_deviation_less_x_is_the_first_of_the_series_with_a_gate_of_minus_one():
    form = matched(lambda r: b2(r, batch(r), right=root(r, variance(r, IMAGE))))
    assert form.statistic == "evonorm-b0"
    assert float_of(form.gate) == -1.0


def test_the_operands_of_the_others():
    r = Ring(AXES)
    slope = r.mul(gate(r), r.opaque("alpha")).scaled(Fraction(2)) + number(1)
    tanh = match_family(r, r.function("tanh", r.mul(slope, r.x)))
    assert tanh is not None
    assert tanh.gate is not None
    assert tanh.gate.terms == slope.terms
    assert tanh.eps is None
    r = Ring(AXES)
    u, v = r.opaque("u", {0, 1}), r.opaque("v", {2, 3})
    form = match_family(r, bilinear(r, u, v).scaled(Fraction(1, 360)))
    assert form is not None
    assert form.gate is not None
    assert form.given is not None
    assert {next(iter(form.gate.terms)), next(iter(form.given.terms))} == {
        next(iter(u.terms)),
        next(iter(v.terms)),
    }
    assert form.eps is None
    assert form.scale == pytest.approx(1 / 360, rel=1e-15)


# -- the bodies ----------------------------------------------------------------------------------


def spec_of(family: str, **how: Any) -> NormSpec:
    doubles = dict.fromkeys(("stats_dtype", "norm_dtype", "out_dtype"), torch.float64)
    return NormSpec(**{"kind": "", "dims": (), "statistic": family, "eps": 1e-3, **doubles, **how})


def _norm_of(x: Tensor, n: int, c: int) -> Tensor:
    """The length of one channel of one image."""
    return (x[n, c].flatten() @ x[n, c].flatten()).sqrt()


def plain_global_response(x: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        lengths = [_norm_of(x, n, c) for c in range(x.shape[1])]
        mean = sum(lengths, torch.zeros((), dtype=x.dtype)) / len(lengths)
        for c, length in enumerate(lengths):
            y[n, c] = x[n, c] * (length / (mean + eps))
    return y


def plain_local_response(
    x: Tensor, dim: int, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    """As torch documents it: a sum over the window, whatever of it there is, times alpha / size."""
    channels = x.unbind(dim)
    normed = []
    for c, channel in enumerate(channels):
        first, last = c - size // 2, c + (size - 1) // 2
        window = [a * a for i, a in enumerate(channels) if first <= i <= last]
        total = sum(window, torch.zeros_like(channel))
        normed.append(channel / (k + alpha / size * total) ** beta)
    return torch.stack(normed, dim)


def _deviation(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return ((centred**2).mean(dims, keepdim=True) + eps) ** 0.5


def _root(x: Tensor, eps: float) -> Tensor:
    return ((x**2).sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]) + eps) ** 0.5


def plain_evonorm(name: str, x: Tensor, v: Tensor, left: Tensor, eps: float) -> Tensor:
    right = {
        "evonorm-b0": lambda: v * x + _deviation(x, [2, 3], eps),
        "evonorm-b1": lambda: (x + 1) * _root(x, eps),
        "evonorm-b2": lambda: _root(x, eps) - x,
    }[name]()
    return x / torch.where(left > right, left, right)


def drawn(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.25


X = drawn(2, 6, 3, 5)
V, RUNNING = drawn(1, 6, 1, 1, seed=6), drawn(1, 6, 1, 1, seed=7).abs() + 0.1
LENGTH_U, LENGTH_V = drawn(7, 1, seed=8), drawn(1, 4, seed=9)
MATRIX = drawn(7, 4, seed=10)
_BATCH = _deviation(X, [0, 2, 3], 1e-3)


def _local(x: Tensor, dim: int, size: int, power: float) -> tuple[Any, ...]:
    spec = spec_of("local-response", dims=(dim,), window=size, alpha=0.5, power=power, eps=2.0)
    return x, spec, {}, lambda: plain_local_response(x, dim, size, 0.5, power, 2.0)


def _evonorm(name: str, *, training: bool) -> tuple[Any, ...]:
    spec = spec_of(name, dims=(2, 3), beyond=(0, 2, 3) if training else ())
    operands = {"gate": V if name == "evonorm-b0" else None}
    operands |= {} if training else {"given": RUNNING}
    left = _BATCH if training else RUNNING
    return X, spec, operands, lambda: plain_evonorm(name, X, V, left, 1e-3)


# family -> x, spec, operands, and the plain formula
BODIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "global-response": {
        "ConvNeXt": (
            X,
            spec_of("global-response", dims=(2, 3), beyond=(1,)),
            {},
            lambda: plain_global_response(X, 1e-3),
        ),
        "channels last": (
            X.permute(0, 2, 3, 1),
            spec_of("global-response", dims=(1, 2), beyond=(3,)),
            {},
            lambda: plain_global_response(X, 1e-3).permute(0, 2, 3, 1),
        ),
    },
    "local-response": {
        "odd window": _local(X, 1, 5, 0.75),
        "even window": _local(X, 1, 4, 0.75),
        "window of one": _local(X, 1, 1, 0.5),
        "window that is wider than x": _local(X, 1, 9, 0.75),
        "a matrix": _local(X[0, :, 0], 1, 3, 1.0),
        "rows of a matrix": _local(X[0, :, 0], 0, 3, 1.0),
        "a vector": _local(X[0, :, 0, 0], 0, 3, 2.0),
        "three dims": _local(X[0], 0, 3, 0.75),
        "the last dim": _local(X, 3, 3, 0.75),
        "the first dim": _local(X, 0, 2, 0.75),
        "five dims": _local(drawn(2, 4, 2, 3, 2), 1, 3, 0.75),
    },
    **{
        name: {
            "training": _evonorm(name, training=True),
            "eval": _evonorm(name, training=False),
        }
        for name in ("evonorm-b0", "evonorm-b1", "evonorm-b2")
    },
    "tanh": {
        "DyT": (
            X,
            spec_of("tanh", eps=None),
            {"gate": torch.full((1,), 0.75, dtype=torch.float64)},
            lambda: 1 - 2 / (torch.exp(1.5 * X) + 1),
        ),
    },
    "bilinear": {
        "spectral norm": (
            MATRIX,
            spec_of("bilinear", dims=(0, 1), eps=None),
            {"gate": LENGTH_U, "given": LENGTH_V},
            lambda: MATRIX / (LENGTH_U.T @ MATRIX @ LENGTH_V.T),
        ),
    },
}


def close(got: Tensor, wanted: Tensor) -> bool:
    bound = 1e-14 * wanted.abs().max().item()
    return got.shape == wanted.shape and (got - wanted).abs().max().item() <= bound


@pytest.mark.parametrize(("family", "name"), every(BODIES))
def test_a_body_is_the_plain_formula(family, name):
    x, spec, operands, plain = BODIES[family][name]
    given = {"gate": None, "given": None, **operands}
    assert close(FAMILIES[family].body(x, spec, eps=spec.eps, **given), plain())


@pytest.mark.parametrize(("family", "name"), every(BODIES))
def test_the_canonical_operation_is_the_body_times_weight_plus_bias(family, name):
    x, spec, operands, plain = BODIES[family][name]
    weight, bias = drawn(x.shape[-1], seed=11), drawn(*x.shape, seed=12)
    got = norm(
        x,
        weight,
        bias,
        gate=operands.get("gate"),
        square=operands.get("given"),
        spec=spec._replace(scale=-1.5),
        rank=x.dim(),
    )
    assert close(got, plain() * -1.5 * weight + bias)


def test_every_family_has_cases():
    assert set(MEMBERS) == set(MISSES) == set(BODIES) == set(FAMILIES)
    assert all(MEMBERS[name] and MISSES[name] and BODIES[name] for name in FAMILIES)
    assert len({family.kind for family in FAMILIES.values()}) == len(FAMILIES)
