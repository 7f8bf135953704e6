"""Polynomial normal form: the algebra in which normfx proves what a region of a graph computes.

A value is a sum of monomials with exact rational coefficients. A monomial is a product of *atoms*
with rational exponents. The atoms of one site are the normalized tensor x, its moments E_D[x^k]
over any axes D, one atom per opaque operand (a weight, a gate, an eps that is a tensor), one
*compound* atom per distinct polynomial that a root or a reciprocal was taken of, and one per
function (a sigmoid) of a polynomial. Compounds are made monic first, so `1/sqrt(v + eps)`,
`(v + eps)**-0.5` and `sqrt(c)/sqrt(c*v + c*eps)` share one atom; the constant in front becomes a
root of a constant.

The laws: addition, multiplication, (ab)^q = a^q b^q where that holds over the reals, Q^1 = Q for a
compound Q, E_D[p c] = E_D[p] c for c constant along D, and E_D[E_F[p]] = E_{D+F}[p]. There is no
search and no simplification: equal values have equal normal forms, or are refused. Written here
rather than with sympy's rings because exponents are rational and atoms appear as a region is read;
the identities themselves are checked with sympy in the tests.

This file knows no operator and no graph: `laws.py` translates operators, `classify.py` reads the
result.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

Exponent: TypeAlias = "int | Fraction"
Monomial: TypeAlias = tuple[tuple[int, Exponent], ...]

# Literals such as 1/768 arrive rounded to float64, so equal values may differ by a few units of
# 2^-53 in a coefficient. Coefficients closer than this (relative) are the same: far above 2^-53
# times the terms of a site, far below the 6e-8 at which a float32-rounded literal would be a
# different number.
COEFFICIENT_TOLERANCE = 1e-12

ONE: Monomial = ()


def close(a: Fraction | float, b: Fraction | float) -> bool:
    """Whether two coefficients are the same number up to the rounding of literals."""
    a, b = float(a), float(b)
    return abs(a - b) <= COEFFICIENT_TOLERANCE * max(abs(a), abs(b))


def _sum(a: Fraction, b: Fraction) -> Fraction:
    """A + b, where what the rounding of literals leaves of a difference is zero."""
    total = a + b
    return total if abs(total) > COEFFICIENT_TOLERANCE * max(abs(a), abs(b)) else Fraction(0)


class Poly:
    """A polynomial: monomial -> coefficient, without zero coefficients. Immutable by convention."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[Monomial, Fraction] | None = None) -> None:
        self.terms = {} if terms is None else {m: c for m, c in terms.items() if c}

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __add__(self, other: Poly) -> Poly:
        terms = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            have = terms.get(monomial)
            terms[monomial] = coefficient if have is None else _sum(have, coefficient)
        return Poly(terms)

    def scaled(self, factor: Fraction) -> Poly:
        """This polynomial times a number."""
        return Poly({m: c * factor for m, c in self.terms.items()})

    def __neg__(self) -> Poly:
        return self.scaled(Fraction(-1))

    def __sub__(self, other: Poly) -> Poly:
        return self + (-other)

    def is_close(self, other: Poly) -> bool:
        """Equality up to the rounding of literals; a term that the other lacks must be zero."""
        return self.terms.keys() == other.terms.keys() and all(
            close(c, other.terms[m]) for m, c in self.terms.items()
        )

    def constant(self) -> Fraction | None:
        """The number this is, or None if it has atoms."""
        if not self.terms:
            return Fraction(0)
        return self.terms.get(ONE) if len(self.terms) == 1 else None

    def atoms(self) -> set[int]:
        """The atoms that occur, not looking into compounds."""
        return {atom for monomial in self.terms for atom, _ in monomial}


def number(value: Fraction | float) -> Poly:
    """A constant, as the exact rational of the literal."""
    return Poly({ONE: Fraction(value)})


@dataclass(frozen=True, slots=True)
class Atom:
    """What an atom stands for.

    Attributes:
        kind: "x", "moment", "opaque", "compound", "function", "maximum" or "constant".
        key: the axes that a moment is taken over; the caller's key of an opaque operand; the name
            of a function; the number of a constant; None otherwise.
        base: the monomial that a moment is of; the polynomial of a compound; the argument of a
            function; the first of the two polynomials of a maximum.
        other: the second polynomial of a maximum; where one is free of x, this is it.
        has_x: whether x occurs in it, outside of a moment.
        has_moment: whether a moment of x occurs in it.
        varies: the axes of x along which it is not constant.
        nonnegative: whether it is provably >= 0 wherever it is defined.
    """

    kind: str
    key: Any = None
    base: Poly | None = None
    other: Poly | None = None
    has_x: bool = False
    has_moment: bool = False
    varies: frozenset[int] = frozenset()
    nonnegative: bool = False


class Ring:
    """The atoms of one site, and the operations that need to know what an atom is.

    Args:
        axes: the axes of x.
    """

    def __init__(self, axes: Iterable[int] = (0,)) -> None:
        self.axes = frozenset(axes)
        self.atoms: list[Atom] = []
        self._index: dict[Hashable, int] = {}
        self.x = self.part(self.axes)

    def _generator(self, key: Hashable, atom: Atom, exponent: Exponent = 1) -> Poly:
        index = self._index.setdefault(key, len(self.atoms))
        if index == len(self.atoms):
            self.atoms.append(atom)
        elif atom.nonnegative:  # proved later than the atom was made
            self.atoms[index] = atom
        return Poly({((index, exponent),): Fraction(1)})

    def part(self, axes: Iterable[int]) -> Poly:
        """X itself, or a slice of it: the same elements along fewer of them."""
        varies = frozenset(axes)
        return self._generator(("x", varies), Atom("x", has_x=True, varies=varies))

    def moment(self, order: int, dims: Iterable[int] | None = None) -> Poly:
        """E_D[x^k] over these axes of x, or over all."""
        if order == 0:
            return number(1)
        ((monomial, _),) = self.x.terms.items()
        ((x, _),) = monomial
        return self._mean_of(((x, order),), self.axes if dims is None else frozenset(dims))

    def _mean_of(self, monomial: Monomial, dims: frozenset[int]) -> Poly:
        """E_D of a monomial in which every factor varies along D."""
        means = [pair for pair in monomial if self.atoms[pair[0]].kind == "moment"]
        if len(means) == 1 and means[0][1] == 1:
            inner = self.atoms[means[0][0]]
            rest = tuple(pair for pair in monomial if pair not in means)
            if inner.base is not None and not any(
                self.atoms[i].varies & inner.key for i, _ in rest
            ):
                # a mean of means is a mean: E_D[c E_F[p]] = E_{D+F}[c p]
                ((of, _),) = inner.base.terms.items()
                monomial = tuple(sorted(_merge(dict(rest), of).items()))
                dims = dims | inner.key
        parts = [self.atoms[i] for i, _ in monomial]
        varies = frozenset().union(*(a.varies for a in parts))
        dims = dims & varies
        atom = Atom(
            "moment",
            dims,
            base=Poly({monomial: Fraction(1)}),
            has_moment=any(a.has_x or a.has_moment for a in parts),
            varies=varies - dims,
            nonnegative=all(self._is_nonnegative_power(i, e) for i, e in monomial),
        )
        return self._generator(("m", monomial, dims), atom)

    def opaque(
        self, key: Hashable, varies: Iterable[int] = (), *, nonnegative: bool = False
    ) -> Poly:
        """An operand about which nothing is known but its identity and the axes it varies along."""
        return self._generator(
            ("o", key), Atom("opaque", key, varies=frozenset(varies), nonnegative=nonnegative)
        )

    # -- products and powers ---------------------------------------------------------------------

    def mul(self, a: Poly, b: Poly) -> Poly:
        """The product, with whole powers of compounds multiplied out."""
        total: dict[Monomial, Fraction] = {}
        pending: list[tuple[dict[int, Exponent], Fraction]] = []
        for ma, ca in a.terms.items():
            for mb, cb in b.terms.items():
                exponents = dict(ma)
                for atom, exponent in mb:
                    exponents[atom] = exponents.get(atom, 0) + exponent
                pending.append((exponents, ca * cb))
        while pending:
            exponents, coefficient = pending.pop()
            expanded = self._expand_one(exponents, coefficient)
            if expanded is not None:
                pending.extend(expanded)
                continue
            monomial = tuple(sorted((atom, _whole(e)) for atom, e in exponents.items() if e))
            total[monomial] = _sum(total.get(monomial, Fraction(0)), coefficient)
        return Poly(total)

    def _expand_one(
        self, exponents: dict[int, Exponent], coefficient: Fraction
    ) -> list[tuple[dict[int, Exponent], Fraction]] | None:
        """One use of Q^1 = Q, c^1 = c or |x|^2 = x^2 on a monomial; None when none applies."""
        for index, exponent in exponents.items():
            atom = self.atoms[index]
            if atom.kind == "constant" and (exponent >= 1 or exponent <= -1):
                whole = int(exponent)
                rest = {**exponents, index: exponent - whole}
                return [(rest, coefficient * Fraction(atom.key) ** whole)]
            if atom.kind == "compound" and exponent >= 1:
                assert atom.base is not None
                rest = {**exponents, index: exponent - 1}
                return [(_merge(rest, m), coefficient * c) for m, c in atom.base.terms.items()]
        return None

    def power(self, p: Poly, exponent: Exponent) -> Poly | None:
        """p^q, or None where it is not provable over the reals (a root of unknown sign)."""
        exponent = _whole(exponent)
        if not p.terms:
            return None
        if exponent == 0:
            return number(1)
        if isinstance(exponent, int) and 0 < exponent <= 4:
            result = p
            for _ in range(exponent - 1):
                result = self.mul(result, p)
            return result
        if len(p.terms) == 1:
            return self._power_of_term(*next(iter(p.terms.items())), exponent)
        return self._power_of_sum(p, exponent)

    def _power_of_term(
        self, monomial: Monomial, coefficient: Fraction, exponent: Exponent
    ) -> Poly | None:
        result = self._power_of_number(coefficient, exponent)
        unproved = sum(not self._is_nonnegative_power(i, e) for i, e in monomial)
        for index, e in monomial:
            factor: Poly | None = None
            if (
                isinstance(exponent, int)
                or self.atoms[index].nonnegative
                or isinstance(e, Fraction)
            ):
                factor = Poly({((index, _whole(e * exponent)),): Fraction(1)})
            elif e % 2 == 0:  # (a^2)^q = |a|^(2q)
                square = Poly({((index, 2),): Fraction(1)})
                factor = self._compound(square, Fraction(e, 2) * exponent, nonnegative=True)
            elif unproved == 1 and self.atoms[index].kind == "compound":
                # a root of 1/Q is defined only where Q is positive, and so is the power of Q
                factor = Poly({((index, _whole(e * exponent)),): Fraction(1)})
            if result is None or factor is None:
                return None
            result = self.mul(result, factor)
        return result

    def _power_of_number(self, c: Fraction, exponent: Exponent) -> Poly | None:
        if isinstance(exponent, int):
            return number(c**exponent)
        if c <= 0:
            return None
        if c == 1:
            return number(1)
        root = self._generator(("c", c), Atom("constant", c, nonnegative=True))
        return self.mul(Poly({((next(iter(root.atoms())), exponent),): Fraction(1)}), number(1))

    def _power_of_sum(self, p: Poly, exponent: Exponent) -> Poly | None:
        leading = p.terms[max(p.terms, key=self._rank)]
        if not isinstance(exponent, int) and leading < 0:
            return None
        front = self._power_of_number(leading, exponent)
        if front is None:
            return None
        nonnegative = self.is_nonnegative(p)
        return self.mul(
            front, self._compound(p.scaled(1 / leading), exponent, nonnegative=nonnegative)
        )

    def _compound(self, monic: Poly, exponent: Exponent, *, nonnegative: bool) -> Poly:
        """Q^q for a monic Q. What other values take a root of says nothing of the sign of Q."""
        parts = [self.atoms[i] for i in monic.atoms()]
        atom = self._atom("compound", None, monic, None, parts, nonnegative)
        made = self._generator(("q", _frozen(monic)), atom, _whole(exponent))
        return self.mul(made, number(1))

    def absolute(self, p: Poly) -> Poly:
        """|p|: p itself where p >= 0 is proved, else the root of p^2."""
        if self.is_nonnegative(p) or not p:
            return p
        square = self.mul(p, p)
        root = self.power(square, Fraction(1, 2)) if len(square.terms) == 1 else None
        return self._compound(square, Fraction(1, 2), nonnegative=True) if root is None else root

    def function(self, name: Hashable, p: Poly, *, nonnegative: bool = False) -> Poly:
        """A function of which nothing is known but its name and argument (and its sign)."""
        parts = [self.atoms[i] for i in p.atoms()]
        return self._generator(
            ("s", name, _frozen(p)), self._atom("function", name, p, None, parts, nonnegative)
        )

    def maximum(self, a: Poly, b: Poly) -> Poly:
        """max(a, b): a itself where a >= 0 >= b is proved (or the reverse), else one atom."""
        for p, low in ((a, b), (b, a)):
            constant = low.constant()
            if constant is not None and constant <= 0 and self.is_nonnegative(p):
                return p
        first, second = sorted((a, b), key=self._depth, reverse=True)
        parts = [self.atoms[i] for i in a.atoms() | b.atoms()]
        nonnegative = self.is_nonnegative(a) or self.is_nonnegative(b)
        key = ("f", frozenset((_frozen(a), _frozen(b))))
        return self._generator(key, self._atom("maximum", None, first, second, parts, nonnegative))

    def _depth(self, p: Poly) -> tuple[bool, bool, int]:
        """Where max(a, b) has a polynomial: with x before with moments before free of both."""
        atoms = [self.atoms[i] for i in p.atoms()]
        return any(a.has_x for a in atoms), any(a.has_moment for a in atoms), len(p.terms)

    def _atom(
        self,
        kind: str,
        key: Any,
        base: Poly,
        other: Poly | None,
        parts: list[Atom],
        nonnegative: bool,
    ) -> Atom:
        """An atom made of others: it varies along what they vary along."""
        return Atom(
            kind,
            key,
            base,
            other,
            has_x=any(a.has_x for a in parts),
            has_moment=any(a.has_moment for a in parts),
            varies=frozenset().union(*(a.varies for a in parts)),
            nonnegative=nonnegative,
        )

    # -- facts -----------------------------------------------------------------------------------

    def is_nonnegative(self, p: Poly) -> bool:
        """Whether p >= 0 is proved: a sum of nonnegative terms, E[q^2] - E[q]^2 among them."""
        rest = dict(p.terms)
        for monomial, drop in p.terms.items():
            square = self._square_of(monomial) if drop < 0 else None
            have = rest.get(square, Fraction(0)) if square is not None else Fraction(0)
            if square is not None and have >= -drop * (1 - Fraction(COEFFICIENT_TOLERANCE)):
                rest.pop(monomial)
                rest[square] = max(have + drop, Fraction(0))
        return all(
            c >= 0 and all(self._is_nonnegative_power(a, e) for a, e in m) for m, c in rest.items()
        )

    def _square_of(self, monomial: Monomial) -> Monomial | None:
        """The monomial E[q^2] for E[q]^2, if it has been met."""
        if len(monomial) != 1 or monomial[0][1] != 2:
            return None
        atom = self.atoms[monomial[0][0]]
        if atom.kind != "moment" or atom.base is None:
            return None
        ((inner, _),) = atom.base.terms.items()
        index = self._index.get(("m", tuple((i, _whole(2 * e)) for i, e in inner), atom.key))
        return None if index is None else ((index, 1),)

    def varies(self, p: Poly) -> frozenset[int]:
        """The axes along which a polynomial is not constant."""
        return frozenset().union(*(self.atoms[i].varies for i in p.atoms()))

    def order_of(self, atom: Atom) -> int | None:
        """K where an atom is E_D[x^k] of x or of a slice of x, else None."""
        if atom.kind != "moment" or atom.base is None:
            return None
        ((monomial, _),) = atom.base.terms.items()
        x = self.atoms[monomial[0][0]]
        if len(monomial) != 1 or x.kind != "x" or not x.varies - atom.key <= self.axes:
            return None  # of a slice, all of which must be reduced
        return monomial[0][1] if isinstance(monomial[0][1], int) else None

    def _is_nonnegative_power(self, index: int, exponent: Exponent) -> bool:
        return self.atoms[index].nonnegative or (isinstance(exponent, int) and exponent % 2 == 0)

    def expectation(self, p: Poly, dims: Iterable[int] | None = None) -> Poly:
        """E_D[p] over these axes of x (or over all): what is constant along D stands in front."""
        over = self.axes if dims is None else frozenset(dims)
        total = Poly()
        for monomial, coefficient in p.terms.items():
            inside = tuple((i, e) for i, e in monomial if self.atoms[i].varies & over)
            outside = tuple((i, e) for i, e in monomial if not self.atoms[i].varies & over)
            term = Poly({outside: coefficient})
            total = total + (self.mul(term, self._mean_of(inside, over)) if inside else term)
        return total

    def sliced(self, p: Poly, axis: int, part: int) -> Poly | None:
        """P along a slice of one axis of x; None if anything but x itself varies along it."""
        total = Poly()
        for monomial, coefficient in p.terms.items():
            term = number(coefficient)
            for index, exponent in monomial:
                atom = self.atoms[index]
                factor: Poly | None = Poly({((index, exponent),): Fraction(1)})
                if axis in atom.varies:
                    if atom.kind != "x":
                        return None
                    factor = self.power(self.part(atom.varies - {axis} | {part}), exponent)
                if factor is None:
                    return None
                term = self.mul(term, factor)
            total = total + term
        return total

    def split(self, p: Poly, keep: Iterable[str]) -> tuple[Poly, Poly]:
        """The terms in which an atom of these kinds occurs, and the others."""
        kinds = set(keep)
        inside, outside = {}, {}
        for monomial, coefficient in p.terms.items():
            hit = any(self.atoms[i].kind in kinds for i, _ in monomial)
            (inside if hit else outside)[monomial] = coefficient
        return Poly(inside), Poly(outside)

    def _rank(self, monomial: Monomial) -> tuple[int, ...]:
        """The order in which a leading term is looked for: E[x^2] first, then any with a moment."""
        atoms = [self.atoms[i] for i, _ in monomial]
        return (
            any(self.order_of(a) == 2 for a in atoms),
            any(a.has_moment for a in atoms),
            any(a.has_x for a in atoms),
            *(-i for i, _ in monomial),
        )


def _merge(exponents: dict[int, Exponent], monomial: Monomial) -> dict[int, Exponent]:
    merged = dict(exponents)
    for atom, exponent in monomial:
        merged[atom] = merged.get(atom, 0) + exponent
    return merged


def _whole(exponent: Exponent) -> Exponent:
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return int(exponent)
    return exponent


def _frozen(p: Poly) -> Hashable:
    """A polynomial as a key: coefficients that differ by the rounding of literals are one."""
    return frozenset((m, f"{float(c):.11e}") for m, c in p.terms.items())
