"""Shared: statistics of a norm that are read from outside of it, too, are computed once.

A region keeps what others read: its mean, its variance or a root of it. Where the canonical node
would compute the same from x once more, it is given these as operands.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Monomial, Poly, Ring
from normfx.classify import constants
from normfx.layout import is_one
from normfx.lifted import Lifted, Operand
from normfx.ops import NormSpec
from normfx.passes.composites import Core
from normfx.passes.facts import Facts
from normfx.passes.materialise import aligned, fits

aten = torch.ops.aten


def share(facts: Facts, made: fx.Node, core: Core) -> None:
    """Gives a canonical node the statistics that are left of its region.

    Args:
        facts: of the graph, from which the region was erased but for what others read.
        made: the canonical node.
        core: what it was made from.
    """
    lift, spec = core.lift, core.spec
    if lift is None or spec.groups or spec.prefix or core.mean is not None:
        return
    if spec.origin != "algebra" or spec.statistic not in ("variance", "mean-square", "sum-square"):
        return
    layout = lift.values[core.x].layout
    mean = square = None
    left = [
        node for node in lift.values if facts.order.get(node, facts.order[made]) < facts.order[made]
    ]
    for node in sorted(left, key=facts.order.__getitem__):
        value = lift.values[node]
        if not isinstance(value, Lifted) or g.dtype(node) != spec.stats_dtype or not node.users:
            continue
        repeated = not all(
            dim or is_one(size) for dim, size in zip(value.layout, g.shape(node) or (), strict=True)
        )
        if repeated or not fits(lift, Operand(node, value.layout), layout):
            continue
        if spec.centre and mean is None and _is_mean(lift.ring, value.poly, core.over):
            mean = aligned(facts, lift, Operand(node, value.layout), layout, made)
        factor = None if square is not None else _factor(core, value.poly)
        if factor is not None:
            square = aligned(facts, lift, Operand(node, value.layout), layout, made)
            square = _as_wanted(facts, made, spec, square, *factor)
    made.args = (*made.args[:4], mean, square, *made.args[6:])


def _is_mean(ring: Ring, p: Poly, over: frozenset[int]) -> bool:
    return p.terms == ring.moment(1, over).terms


def _as_wanted(
    facts: Facts, made: fx.Node, spec: NormSpec, node: fx.Node, power: int, times: float
) -> fx.Node:
    """S = times * node^power, or sqrt(S) for a norm whose eps stands outside of the root."""
    outside = spec.eps_place in ("outside", "floor")
    if outside and power == 2:
        times = math.sqrt(times)
    elif power == 2:
        node = facts.emit(aten.mul.Tensor, node, node, made)
    if times != 1.0:
        node = facts.emit(aten.mul.Tensor, node, times, made)
    return facts.emit(aten.pow.Tensor_Scalar, node, 0.5, made) if outside and power == 1 else node


def _factor(core: Core, p: Poly) -> tuple[int, float] | None:
    """(k, c) where S = c * p^k, with k one or two; p is not negative."""
    assert core.lift is not None
    ring, spec = core.lift.ring, core.spec
    second = ring.moment(2, core.over)
    first = ring.moment(1, core.over)
    wanted = second - ring.mul(first, first) if spec.statistic == "variance" else second
    n = core.lift.count(core.over).constant()
    scale = Fraction(1)
    if spec.statistic == "sum-square" or spec.correction:
        if n is None:
            return None
        scale = n if spec.statistic == "sum-square" else n / (n - spec.correction)
    if not ring.is_nonnegative(p):
        return None
    for exponent, value in ((1, p), (2, ring.mul(p, p))):
        times = _ratio(ring, wanted, value)
        if times is not None:
            return exponent, float(scale) * times
    return None


def _ratio(ring: Ring, a: Poly, b: Poly) -> float | None:
    """C where a = c * b."""
    lead: Monomial = max(a.terms)
    plain = {constants(ring, m)[1]: constants(ring, m)[0] * float(c) for m, c in b.terms.items()}
    if plain.keys() != a.terms.keys() or not plain[lead]:
        return None
    ratio = float(a.terms[lead]) / plain[lead]
    if any(abs(float(a.terms[m]) - ratio * c) > 1e-12 * abs(ratio * c) for m, c in plain.items()):
        return None
    return ratio
