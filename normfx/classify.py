"""Classify: which normalization a polynomial of a site is, as an identity of polynomials.

    value = scale * (x - m1) * r * A + B        centred; without m1: not centred
    1/r   = sqrt(S + eps) | sqrt(S) + eps | max(sqrt(S), eps) | sqrt(max(S, eps))
    S     = m2 - m1^2 (variance) | m2 (mean square)

with A, B and eps free of x and of its moments. Every coefficient is compared; whatever does not fit
is None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from normfx.algebra import Exponent, Monomial, Poly, Ring, close

EpsPlace = Literal["inside", "outside", "floor", "floor-inside"]


@dataclass(frozen=True, slots=True)
class Denominator:
    """1/r of a norm: `factor * sqrt(S)`, with eps in one of four places.

    Attributes:
        variance: whether S is m2 - m1^2; else m2.
        eps: the number or opaque polynomial added to, or put under, what stands at `place`, where S
            counts once.
        place: where eps stands.
        factor: what multiplies sqrt(S) (a positive number).
    """

    variance: bool
    eps: Poly
    place: EpsPlace
    factor: float


@dataclass(frozen=True, slots=True)
class Form:
    """A value as scale * (x - centre*m1) * r * A + B, with no number in front of A."""

    centre: bool
    denominator: Denominator
    scale: float
    weight: Poly
    bias: Poly


def classify(ring: Ring, value: Poly) -> Form | None:
    """The normalization a polynomial is, or None."""
    bias: dict[Monomial, Fraction] = {}
    grouped: dict[tuple[int, Exponent], dict[str, dict[Monomial, Fraction]]] = {}
    for monomial, coefficient in value.terms.items():
        if not any(ring.atoms[i].has_x or ring.atoms[i].has_moment for i, _ in monomial):
            bias[monomial] = coefficient
            continue
        part = _split_term(ring, monomial)
        if part is None:
            return None
        numerator, divisor, rest = part
        grouped.setdefault(divisor, {}).setdefault(numerator, {})[rest] = coefficient
    if len(grouped) != 1:
        return None
    ((divisor, parts),) = grouped.items()
    times_x = Poly(parts.get("x"))
    if not times_x:
        return None
    centre = "m1" in parts
    if centre and not (-Poly(parts["m1"])).is_close(times_x):
        return None
    denominator = _denominator(ring, *divisor)
    if denominator is None:
        return None
    scale, weight = _content(ring, times_x)
    if math.isnan(scale):
        return None
    return Form(centre, denominator, scale / denominator.factor, weight, Poly(bias))


def _split_term(
    ring: Ring, monomial: Monomial
) -> tuple[str, tuple[int, Exponent], Monomial] | None:
    """A term x*d*rest or m1*d*rest as (numerator, d, rest): no other factor has moments."""
    numerator, divisor, rest = None, None, []
    for index, exponent in monomial:
        atom = ring.atoms[index]
        if atom.kind == "x" and exponent == 1 and numerator is None:
            numerator = "x"
        elif atom.kind == "moment" and atom.key == 1 and exponent == 1 and numerator is None:
            numerator = "m1"
        elif atom.has_x:
            return None
        elif atom.has_moment and divisor is None:
            divisor = (index, exponent)
        elif atom.has_moment:
            return None
        else:
            rest.append((index, exponent))
    if numerator is None or divisor is None:
        return None
    return numerator, divisor, tuple(rest)


def _denominator(ring: Ring, index: int, exponent: Exponent) -> Denominator | None:
    atom = ring.atoms[index]
    if exponent == Fraction(-1, 2):
        if atom.kind == "moment":
            return Denominator(False, Poly(), "inside", 1.0) if atom.key == 2 else None
        if atom.kind == "compound" and atom.base is not None:
            return _of_square(ring, atom.base, "inside")
        if atom.kind == "floor" and atom.base is not None and atom.floor is not None:
            return _floored(_of_square(ring, atom.base, "floor-inside"), atom.floor, square=True)
    if exponent == -1:
        if atom.kind == "compound" and atom.base is not None:
            root, eps = ring.split(atom.base, ("moment", "compound"))
            return _with_eps(_of_root(ring, root, "outside"), eps)
        if atom.kind == "floor" and atom.base is not None and atom.floor is not None:
            return _floored(_of_root(ring, atom.base, "floor"), atom.floor, square=False)
    return None


def _of_square(ring: Ring, square: Poly, place: EpsPlace) -> Denominator | None:
    """a*(S + eps) under a root."""
    statistic, eps = {}, {}
    for monomial, coefficient in square.terms.items():
        kinds = [(ring.atoms[i].kind, ring.atoms[i].key, e) for i, e in monomial]
        if kinds == [("moment", 2, 1)]:
            statistic["m2"] = coefficient
        elif kinds == [("moment", 1, 2)]:
            statistic["m1"] = coefficient
        elif any(ring.atoms[i].has_moment or ring.atoms[i].has_x for i, _ in monomial):
            return None
        else:
            eps[monomial] = coefficient
    lead = statistic.get("m2")
    if lead is None or lead <= 0 or ("m1" in statistic and not close(-statistic["m1"], lead)):
        return None
    return Denominator("m1" in statistic, Poly(eps).scaled(1 / lead), place, math.sqrt(lead))


def _of_root(ring: Ring, root: Poly, place: EpsPlace) -> Denominator | None:
    """a*sqrt(S), without an eps under the root."""
    if len(root.terms) != 1:
        return None
    ((monomial, coefficient),) = root.terms.items()
    found, factor = None, float(coefficient)
    for index, exponent in monomial:
        atom = ring.atoms[index]
        if atom.kind == "constant":
            factor *= float(atom.key) ** float(exponent)
        elif (
            exponent == Fraction(1, 2) and found is None and atom.kind == "moment" and atom.key == 2
        ):
            found = Denominator(False, Poly(), place, 1.0)
        elif (
            exponent == Fraction(1, 2)
            and found is None
            and atom.kind == "compound"
            and atom.base is not None
        ):
            found = _of_square(ring, atom.base, place)
        else:
            return None
    if found is None or found.eps or factor <= 0:
        return None
    return Denominator(found.variance, Poly(), place, found.factor * factor)


def _with_eps(found: Denominator | None, eps: Poly) -> Denominator | None:
    if found is None:
        return None
    return Denominator(
        found.variance, eps.scaled(1 / Fraction(found.factor)), found.place, found.factor
    )


def _floored(found: Denominator | None, low: Poly, *, square: bool) -> Denominator | None:
    if found is None or found.eps:
        return None
    factor = Fraction(found.factor) ** (2 if square else 1)
    return Denominator(found.variance, low.scaled(1 / factor), found.place, found.factor)


def evaluate(ring: Ring, p: Poly) -> float | None:
    """The number a polynomial is, with roots of constants evaluated; None if it has other atoms."""
    total = 0.0
    for monomial, coefficient in p.terms.items():
        term = float(coefficient)
        for index, exponent in monomial:
            if ring.atoms[index].kind != "constant":
                return None
            term *= float(ring.atoms[index].key) ** float(exponent)
        total += term
    return total


def _content(ring: Ring, weight: Poly) -> tuple[float, Poly]:
    """The number in front of A (roots of constants, one coefficient), and the rest of A."""
    terms: dict[Monomial, Fraction] = {}
    numbers = set()
    for monomial, coefficient in weight.terms.items():
        front, rest = 1.0, []
        for index, exponent in monomial:
            if ring.atoms[index].kind == "constant":
                front *= float(ring.atoms[index].key) ** float(exponent)
            else:
                rest.append((index, exponent))
        numbers.add(front)
        terms[tuple(rest)] = terms.get(tuple(rest), Fraction(0)) + coefficient
    front = numbers.pop() if len(numbers) == 1 else math.nan
    if len(terms) == 1:
        ((monomial, coefficient),) = terms.items()
        return front * float(coefficient), Poly({monomial: Fraction(1)})
    return front, Poly(terms)
