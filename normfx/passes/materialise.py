"""Materialise: polynomials of opaque operands as nodes, for a weight or eps that is none yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly
from normfx.lift import Lift
from normfx.passes.facts import Facts

aten = torch.ops.aten


def can_be_made(lift: Lift, poly: Poly) -> bool:
    """Whether a polynomial can be written with operators: symbolic sizes have no node to read."""
    atoms = [lift.ring.atoms[i] for i in poly.atoms()]
    return all(
        g.tensor(a.key) is not None
        if a.kind == "opaque"
        else a.base is None or can_be_made(lift, a.base)
        for a in atoms
    )


def materialise(
    facts: Facts, lift: Lift, poly: Poly, before: fx.Node, dtype: torch.dtype | None
) -> Any:
    """A polynomial of opaque operands as a node: an operand itself, or the sum that it is.

    A sum is computed in `dtype` (that of the statistics), since an operand may be narrower.
    """
    if len(poly.terms) == 1:
        ((monomial, coefficient),) = poly.terms.items()
        if coefficient == 1 and len(monomial) == 1 and monomial[0][1] == 1:
            dtype = None
    total = _sum_of(facts, lift, poly, before, dtype)
    return total if isinstance(total, fx.Node) else facts.number(total, before)


def _sum_of(
    facts: Facts, lift: Lift, poly: Poly, before: fx.Node, dtype: torch.dtype | None
) -> Any:
    total: Any = None
    for monomial, coefficient in poly.terms.items():
        number: float = float(coefficient)
        term: Any = None
        for index, exponent in monomial:
            factor = _power(facts, lift, index, exponent, before, dtype)
            if not isinstance(factor, fx.Node):
                number *= factor
            else:
                term = factor if term is None else facts.emit(aten.mul.Tensor, term, factor, before)
        if term is None:
            term = number
        elif number != 1.0:
            term = facts.emit(aten.mul.Tensor, term, number, before)
        total = term if total is None else facts.emit(aten.add.Tensor, total, term, before)
    return total


def _power(
    facts: Facts,
    lift: Lift,
    index: int,
    exponent: Any,
    before: fx.Node,
    dtype: torch.dtype | None,
) -> Any:
    atom = lift.ring.atoms[index]
    if atom.kind == "constant":
        return float(atom.key) ** float(exponent)
    base = atom.key
    if atom.base is not None:
        base = _sum_of(facts, lift, atom.base, before, dtype)
    if atom.floor is not None:
        low = _sum_of(facts, lift, atom.floor, before, dtype)
        highest = aten.maximum if isinstance(low, fx.Node) else aten.clamp_min
        base = facts.emit(highest.default, base, low, before)
    held = g.tensor(base)
    if dtype is not None and held is not None and held.dtype != dtype:
        base = facts.emit(aten.to.dtype, base, dtype, before)
    return (
        base if exponent == 1 else facts.emit(aten.pow.Tensor_Scalar, base, float(exponent), before)
    )
