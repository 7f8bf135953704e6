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


def materialise(facts: Facts, lift: Lift, poly: Poly, before: fx.Node) -> Any:
    """A polynomial of opaque operands as a node: an operand itself, or the sum that it is."""
    total = _sum_of(facts, lift, poly, before)
    return total if isinstance(total, fx.Node) else facts.number(total, before)


def _sum_of(facts: Facts, lift: Lift, poly: Poly, before: fx.Node) -> Any:
    total: Any = None
    for monomial, coefficient in poly.terms.items():
        term: Any = float(coefficient)
        for index, exponent in monomial:
            atom = lift.ring.atoms[index]
            factor = _atom_node(facts, lift, index, exponent, before)
            if atom.kind == "constant":
                term = term * factor
            else:
                term = factor if term == 1.0 else facts.emit(aten.mul.Tensor, factor, term, before)
        total = term if total is None else facts.emit(aten.add.Tensor, total, term, before)
    return total


def _atom_node(facts: Facts, lift: Lift, index: int, exponent: Any, before: fx.Node) -> Any:
    atom = lift.ring.atoms[index]
    if atom.kind == "constant":
        return float(atom.key) ** float(exponent)
    base = atom.key
    if atom.base is not None:
        base = materialise(facts, lift, atom.base, before)
    if atom.floor is not None:
        low = materialise(facts, lift, atom.floor, before)
        highest = aten.maximum if isinstance(low, fx.Node) else aten.clamp_min
        base = facts.emit(highest.default, base, low, before)
    return (
        base if exponent == 1 else facts.emit(aten.pow.Tensor_Scalar, base, float(exponent), before)
    )
