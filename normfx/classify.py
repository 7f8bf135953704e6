"""Classify: which normalization a polynomial of a site is, as an identity of polynomials.

    value = scale * (x - m1) * r * A + B        centred; without m1: not centred
    1/r   = sqrt(S + eps) | sqrt(S) + eps | max(sqrt(S), eps) | sqrt(max(S, eps))
    S     = m2 - m1^2 (variance) | m2 (mean square) | m2 + n*m1^2 (compressed)

with A, B and eps free of x and of its moments, and all moments over the same axes. In place of x
may stand x * sigmoid(v*x). Every coefficient is compared; whatever does not fit is None. Norms of
another form are in `families.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, NamedTuple

from normfx.algebra import Exponent, Monomial, Poly, Ring, close, number

EpsPlace = Literal["inside", "outside", "floor", "floor-inside"]
Statistic = Literal["variance", "mean-square", "compressed"]


@dataclass(frozen=True, slots=True)
class Root:
    """1/r of a norm: `factor * sqrt(S)`, with eps in one of four places.

    Attributes:
        statistic: which S.
        dims: the axes that its moments are taken over.
        eps: the number or opaque polynomial added to, or put under, what stands at `place`, where S
            counts once.
        place: where eps stands.
        factor: what multiplies sqrt(S) (a positive number).
        ratio: of the coefficients of m1^2 and m2.
    """

    statistic: Statistic
    dims: frozenset[int]
    eps: Poly
    place: EpsPlace
    factor: float
    ratio: Fraction


@dataclass(frozen=True, slots=True)
class Form:
    """A value as scale * (x - centre*m1) * r * A + B, with no number in front of A.

    Attributes:
        statistic: S, or the name of a family of `families.py`.
        dims: the axes of x that the statistic is taken over.
        centre: whether the mean is subtracted.
        eps: a number or an opaque polynomial; None for a norm that has none.
        place: where eps stands.
        scale: a number.
        weight: A.
        bias: B.
        gate: v where x * sigmoid(v*x) stands for x, or another operand inside of a family's body.
        given: a root that is no statistic of x but given, of families that have one.
        beyond: further axes, of families that take two statistics.
        window: how many neighbours a statistic over a window has.
        power: of the root, of families that have one.
        ratio: of the coefficients of m1^2 and m2 in S.
    """

    statistic: str
    dims: frozenset[int]
    centre: bool = False
    eps: Poly | None = field(default_factory=Poly)
    place: EpsPlace = "inside"
    scale: float = 1.0
    weight: Poly = field(default_factory=lambda: number(1))
    bias: Poly = field(default_factory=Poly)
    gate: Poly | None = None
    given: Poly | None = None
    beyond: frozenset[int] = frozenset()
    window: int = 0
    power: float = 1.0
    ratio: Fraction = Fraction(0)


class _Term(NamedTuple):
    """A term (x | m1) * d * rest: no other factor has moments or x, but for a gate."""

    mean: frozenset[int] | None  # the axes of m1, or None: the term has x
    divisor: tuple[int, Exponent]
    gate: int | None
    rest: Monomial


def classify(ring: Ring, value: Poly) -> Form | None:
    """The normalization a polynomial is, or None."""
    bias: dict[Monomial, Fraction] = {}
    times_x: dict[Monomial, Fraction] = {}
    times_mean: dict[Monomial, Fraction] = {}
    shared: set[tuple[tuple[int, Exponent], int | None]] = set()
    means: set[frozenset[int]] = set()
    for monomial, coefficient in value.terms.items():
        if free_of_x(ring, monomial):
            bias[monomial] = coefficient
            continue
        term = _split_term(ring, monomial)
        if term is None:
            return None
        shared.add((term.divisor, term.gate))
        if term.mean is None:
            times_x[term.rest] = coefficient
        else:
            times_mean[term.rest] = coefficient
            means.add(term.mean)
    if len(shared) != 1 or not times_x:
        return None
    ((divisor, gate),) = shared
    root = _root(ring, *divisor)
    if root is None:
        return None
    centre = bool(times_mean)
    if centre and (means != {root.dims} or not (-Poly(times_mean)).is_close(Poly(times_x))):
        return None
    swish = None if gate is None else _slope(ring, ring.atoms[gate].base)
    if gate is not None and (centre or swish is None):
        return None
    scale, weight = _content(ring, Poly(times_x))
    if math.isnan(scale):
        return None
    return Form(
        root.statistic,
        root.dims,
        centre,
        root.eps,
        root.place,
        scale / root.factor,
        weight,
        Poly(bias),
        gate=swish,
        ratio=root.ratio,
    )


def free_of_x(ring: Ring, monomial: Monomial) -> bool:
    """Whether neither x nor a moment of it occurs in a monomial."""
    return not any(ring.atoms[i].has_x or ring.atoms[i].has_moment for i, _ in monomial)


def is_x(ring: Ring, index: int) -> bool:
    """Whether an atom is x itself, not a slice of it."""
    return ring.atoms[index].kind == "x" and ring.atoms[index].varies == ring.axes


def _split_term(ring: Ring, monomial: Monomial) -> _Term | None:
    found, mean, divisor, gate = False, None, None, None
    rest: list[tuple[int, Exponent]] = []
    for index, exponent in monomial:
        atom = ring.atoms[index]
        if exponent == 1 and not found and is_x(ring, index):
            found = True
        elif exponent == 1 and not found and ring.order_of(atom) == 1:
            found, mean = True, atom.key
        elif exponent == 1 and gate is None and atom.kind == "function" and atom.key == "sigmoid":
            gate = index
        elif atom.has_x or (atom.has_moment and divisor is not None):
            return None
        elif atom.has_moment:
            divisor = (index, exponent)
        else:
            rest.append((index, exponent))
    if not found or divisor is None:
        return None
    return _Term(mean, divisor, gate, tuple(rest))


def _slope(ring: Ring, p: Poly | None) -> Poly | None:
    """V where p is v*x with v free of x."""
    terms: dict[Monomial, Fraction] = {}
    for monomial, coefficient in (p or Poly()).terms.items():
        rest = tuple((i, e) for i, e in monomial if not (is_x(ring, i) and e == 1))
        if len(rest) != len(monomial) - 1 or not free_of_x(ring, rest):
            return None
        terms[rest] = coefficient
    return Poly(terms) or None


def _root(ring: Ring, index: int, exponent: Exponent) -> Root | None:
    atom = ring.atoms[index]
    if exponent == Fraction(-1, 2):
        if atom.kind == "maximum":
            return _floored(ring, atom.base, atom.other, square=True)
        return root_of(ring, Poly({((index, 1),): Fraction(1)}))
    if exponent == -1 and atom.base is not None:
        if atom.kind == "compound":
            statistic, eps = ring.split(atom.base, ("moment", "compound"))
            return _with_eps(_plain_root(ring, statistic, "outside"), eps)
        if atom.kind == "maximum":
            return _floored(ring, atom.base, atom.other, square=False)
    return None


def root_of(ring: Ring, square: Poly, place: EpsPlace = "inside") -> Root | None:
    """The root of a*(S + eps)."""
    if len(square.terms) == 1:
        ((monomial, coefficient),) = square.terms.items()
        if len(monomial) == 1 and coefficient == 1 and monomial[0][1] == 1:
            atom = ring.atoms[monomial[0][0]]
            if atom.kind == "compound" and atom.base is not None:
                square = atom.base
    second: dict[frozenset[int], Fraction] = {}
    first: dict[frozenset[int], Fraction] = {}
    eps: dict[Monomial, Fraction] = {}
    for monomial, coefficient in square.terms.items():
        atom = ring.atoms[monomial[0][0]] if len(monomial) == 1 else None
        if atom is not None and ring.order_of(atom) == 2 and monomial[0][1] == 1:
            second[atom.key] = coefficient
        elif atom is not None and ring.order_of(atom) == 1 and monomial[0][1] == 2:
            first[atom.key] = coefficient
        elif free_of_x(ring, monomial):
            eps[monomial] = coefficient
        else:
            return None
    if len(second) != 1 or not first.keys() <= second.keys():
        return None
    ((dims, lead),) = second.items()
    if lead <= 0:
        return None
    statistic: Statistic = "mean-square"
    ratio = first.get(dims, Fraction(0)) / lead
    if first:
        statistic = "variance" if close(ratio, -1) else "compressed"
    if statistic == "compressed" and ratio <= 0:
        return None
    return Root(statistic, dims, Poly(eps).scaled(1 / lead), place, math.sqrt(lead), ratio)


def _plain_root(ring: Ring, root: Poly, place: EpsPlace) -> Root | None:
    """a*sqrt(S), without an eps under the root."""
    if len(root.terms) != 1:
        return None
    ((monomial, coefficient),) = root.terms.items()
    found, factor = None, float(coefficient)
    for index, exponent in monomial:
        atom = ring.atoms[index]
        if atom.kind == "constant":
            factor *= float(atom.key) ** float(exponent)
        elif exponent == Fraction(1, 2) and found is None:
            found = root_of(ring, Poly({((index, 1),): Fraction(1)}), place)
        else:
            return None
    if found is None or found.eps or factor <= 0:
        return None
    return replace(found, factor=found.factor * factor)


def _with_eps(found: Root | None, eps: Poly) -> Root | None:
    return found and replace(found, eps=eps.scaled(1 / Fraction(found.factor)))


def _floored(ring: Ring, base: Poly | None, low: Poly | None, *, square: bool) -> Root | None:
    if base is None or low is None or not all(free_of_x(ring, m) for m in low.terms):
        return None
    found = root_of(ring, base, "floor-inside") if square else _plain_root(ring, base, "floor")
    if found is None or found.eps:
        return None
    return replace(found, eps=low.scaled(1 / Fraction(found.factor) ** (2 if square else 1)))


def evaluate(ring: Ring, p: Poly) -> float | None:
    """The number a polynomial is, with roots of constants evaluated; None if it has other atoms."""
    total = 0.0
    for monomial, coefficient in p.terms.items():
        front, rest = constants(ring, monomial)
        if rest:
            return None
        total += float(coefficient) * front
    return total


def constants(ring: Ring, monomial: Monomial) -> tuple[float, Monomial]:
    """The roots of constants in a monomial as a number, and what is left of it."""
    front, rest = 1.0, []
    for index, exponent in monomial:
        atom = ring.atoms[index]
        if atom.kind == "constant":
            front *= float(atom.key) ** float(exponent)
        else:
            rest.append((index, exponent))
    return front, tuple(rest)


def _content(ring: Ring, weight: Poly) -> tuple[float, Poly]:
    """The number in front of A (roots of constants, one coefficient), and the rest of A."""
    terms: dict[Monomial, Fraction] = {}
    numbers = set()
    for monomial, coefficient in weight.terms.items():
        front, rest = constants(ring, monomial)
        numbers.add(front)
        terms[rest] = terms.get(rest, Fraction(0)) + coefficient
    front = numbers.pop() if len(numbers) == 1 else math.nan
    if len(terms) == 1:
        ((monomial, coefficient),) = terms.items()
        return front * float(coefficient), Poly({monomial: Fraction(1)})
    return front, Poly(terms)
