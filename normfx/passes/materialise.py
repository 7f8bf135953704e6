"""Materialise: polynomials of opaque operands as nodes, for a weight or eps that is none yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly
from normfx.layout import Layout
from normfx.lift import Lift
from normfx.lifted import Operand
from normfx.passes.facts import Facts

aten = torch.ops.aten


def can_be_made(lift: Lift, poly: Poly, layout: Layout) -> bool:
    """Whether a polynomial can be written with operators, as a tensor for x in this layout.

    Symbolic sizes have no node to read, and an operand must have its axes where x has them.
    """
    for atom in (lift.ring.atoms[i] for i in poly.atoms()):
        if atom.kind == "opaque":
            if not isinstance(atom.key, Operand) or g.tensor(atom.key.node) is None:
                return False
            if not fits(lift, atom.key, layout):
                return False
        elif atom.kind not in ("compound", "maximum", "constant"):
            return False
        inner = [p for p in (atom.base, atom.other) if p is not None]
        if not all(can_be_made(lift, p, layout) for p in inner):
            return False
    return True


def fits(lift: Lift, operand: Operand, layout: Layout) -> bool:
    """Whether an operand, or a view of it, broadcasts against x in a layout."""
    return _broadcasts(operand, layout) or _shape_in(lift, operand, layout) is not None


def _broadcasts(operand: Operand, layout: Layout) -> bool:
    """Whether an operand broadcasts against x in a layout as it is."""
    offset = len(layout) - len(operand.layout)
    return offset >= 0 and all(
        not dim or dim == layout[offset + i] for i, dim in enumerate(operand.layout)
    )


def _shape_in(lift: Lift, operand: Operand, layout: Layout) -> list[int] | None:
    """The shape to view an operand in, so that it broadcasts, or None if there is none."""
    axes = [axis for dim in operand.layout for axis in dim]
    shape: list[int] = []
    for dim in layout:
        inside = [axis for axis in dim if axis in axes]
        if inside and (tuple(inside) != dim or axes[: len(dim)] != inside):
            return None
        axes = axes[len(inside) :]
        size = lift.axes.size(dim) if inside else 1
        shape.append(size if isinstance(size, int) else -1)
    return None if axes or shape.count(-1) > 1 else shape


def aligned(facts: Facts, lift: Lift, operand: Operand, layout: Layout, before: fx.Node) -> Any:
    """The operand itself where it broadcasts against x as it is, else a view of it that does."""
    if _broadcasts(operand, layout):
        return operand.node
    shape = _shape_in(lift, operand, layout)
    assert shape is not None  # can_be_made was asked first
    return facts.emit(aten.reshape.default, operand.node, shape, before)


def materialise(
    facts: Facts,
    lift: Lift,
    poly: Poly,
    layout: Layout,
    before: fx.Node,
    dtype: torch.dtype | None,
) -> Any:
    """A polynomial of opaque operands as a node: an operand itself, or the sum that it is.

    The node broadcasts against x in this layout. A sum is computed in `dtype` (that of the
    statistics), since an operand may be narrower.
    """
    if len(poly.terms) == 1:
        ((monomial, coefficient),) = poly.terms.items()
        if coefficient == 1 and len(monomial) == 1 and monomial[0][1] == 1:
            dtype = None
    total = _sum_of(facts, lift, poly, layout, before, dtype)
    return total if isinstance(total, fx.Node) else facts.number(total, before)


def _sum_of(
    facts: Facts,
    lift: Lift,
    poly: Poly,
    layout: Layout,
    before: fx.Node,
    dtype: torch.dtype | None,
) -> Any:
    total: Any = None
    for monomial, coefficient in poly.terms.items():
        number: float = float(coefficient)
        term: Any = None
        for index, exponent in monomial:
            factor = _power(facts, lift, index, exponent, layout, before, dtype)
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
    layout: Layout,
    before: fx.Node,
    dtype: torch.dtype | None,
) -> Any:
    atom = lift.ring.atoms[index]
    if atom.kind == "constant":
        return float(atom.key) ** float(exponent)
    base: Any
    if atom.base is None:
        base = aligned(facts, lift, atom.key, layout, before)
    else:
        base = _sum_of(facts, lift, atom.base, layout, before, dtype)
    if atom.other is not None:
        low = _sum_of(facts, lift, atom.other, layout, before, dtype)
        highest = aten.maximum if isinstance(low, fx.Node) else aten.clamp_min
        base = facts.emit(highest.default, base, low, before)
    held = g.tensor(base)
    if dtype is not None and held is not None and held.dtype != dtype:
        base = facts.emit(aten.to.dtype, base, dtype, before)
    return (
        base if exponent == 1 else facts.emit(aten.pow.Tensor_Scalar, base, float(exponent), before)
    )
