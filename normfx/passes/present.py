"""Present: a form, which is an identity of polynomials, as a spec and operands.

The operands are made where they are not nodes yet, and the numbers are put as people write them:
an unbiased variance, a sum of squares, eps in the units in which it was written.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly, close
from normfx.classify import Form, evaluate
from normfx.families import FAMILIES
from normfx.layout import Layout
from normfx.lift import Lift
from normfx.lifted import Operand
from normfx.ops import NormSpec
from normfx.passes.composites import Core, wide
from normfx.passes.facts import Facts
from normfx.passes.materialise import can_be_made, materialise


def present(
    facts: Facts, lift: Lift, node: fx.Node, form: Form, region: list[fx.Node]
) -> Core | None:
    """A form as a spec and operands, or None if an operand cannot be made.

    Args:
        facts: of the graph; operands are put into it.
        lift: of the site.
        node: the value that has the form.
        form: what it is.
        region: the nodes that were read for it.
    """
    value = lift.values[node]
    layout: Layout = value.layout
    x, out = lift.seen_as(layout, g.shape(node)), g.dtype(node)
    placed, beyond = lift.axes.placed(layout, form.dims), lift.axes.placed(layout, form.beyond)
    if x is None or out is None or placed is None or beyond is None:
        return None
    if form.statistic in FAMILIES and (placed.groups or placed.prefix or beyond.groups):
        return None
    stats = wide(g.dtype(x) or out)
    if any(g.dtype(inner) is torch.float64 for inner in region):
        stats = torch.float64
    if x in facts.constant and not facts.grad:  # made once, as exact as it can be
        stats = torch.float64
    spec = NormSpec(
        kind="",
        dims=placed.dims,
        statistic=form.statistic,
        centre=form.centre,
        eps_place=form.place,
        scale=form.scale,
        groups=placed.groups,
        group_dim=placed.group_dim,
        prefix=placed.prefix,
        beyond=beyond.dims,
        window=form.window,
        power=form.power,
        stats_dtype=stats,
        norm_dtype=out,
        out_dtype=out,
    )
    eps = lift.settled(form.eps or Poly())
    if eps is None or not _is_given(facts, lift, eps):
        return None
    if form.statistic == "bilinear" and x not in facts.constant:
        return None
    weight = None if form.weight.constant() == 1 else form.weight
    number = evaluate(lift.ring, eps)
    given = None if number is not None else eps
    polys = [weight, form.bias or None, given, None, form.given, form.gate]
    if not all(p is None or can_be_made(lift, p, layout) for p in polys):
        return None
    operands = [
        None if p is None else materialise(facts, lift, p, layout, node, stats) for p in polys
    ]
    if weight is not None or form.bias:
        spec = spec._replace(norm_dtype=stats)
    spec = spec._replace(eps=None if form.eps is None else number)
    presented = _presented(spec, form, lift.count(form.dims).constant())
    if presented is None:
        return None
    return Core(presented, x, *operands, lift=lift, over=form.dims)


def _is_given(facts: Facts, lift: Lift, eps: Poly) -> bool:
    """Whether an eps is one: numbers, parameters, single numbers, but nothing made from x."""
    for atom in (lift.ring.atoms[i] for i in eps.atoms()):
        inner = [p for p in (atom.base, atom.other) if p is not None]
        if not all(_is_given(facts, lift, p) for p in inner):
            return False
        if atom.kind != "opaque":
            continue
        if not isinstance(atom.key, Operand):
            return False
        given = atom.key.node
        if given in facts.constant:
            continue
        if str(g.shape(given)) != "()" or lift.depends(given):
            return False
    return True


def _presented(spec: NormSpec, form: Form, n: Fraction | None) -> NormSpec | None:
    """The same function with the numbers as people write them: unbiased variances, sums.

    None for a statistic whose meaning depends on n, where n is not the one that it needs.
    """
    if close(spec.scale, 1.0):
        spec = spec._replace(scale=1.0)
    if spec.eps == 0 and spec.statistic not in FAMILIES:
        # a root without eps: torch's norm and deviation know its slope at zero
        spec = spec._replace(eps_place="outside")
    if spec.statistic == "compressed":
        if n is None or not close(n, form.ratio):
            return None
        share = float(n / (n + 1))
        spec = spec._replace(scale=spec.scale * math.sqrt(share))
        return _scaled_eps(spec, _by_place(spec, share))
    if spec.statistic == "bilinear":  # of a sum, as n cancels
        return None if n is None else spec._replace(scale=_tidy(spec.scale * float(n)))
    if spec.statistic == "global-response":
        return None if n is None else _scaled_eps(spec, math.sqrt(n))
    if spec.statistic == "local-response" and spec.eps is not None and spec.scale > 0:
        alpha = spec.scale ** (-1 / spec.power)  # as its eps is in units of the statistic
        return _scaled_eps(spec._replace(alpha=float(f"{alpha:.12g}"), scale=1.0), alpha)
    if n is None or n <= 1 or spec.eps is None or spec.statistic in FAMILIES:
        return _scaled_eps(spec, 1.0)
    count = float(n)
    if spec.statistic == "variance" and close(spec.scale, math.sqrt((count - 1) / count)):
        grown = count / (count - 1)
        return _scaled_eps(spec._replace(scale=1.0, correction=1), _by_place(spec, grown))
    summed = close(spec.scale, 1 / math.sqrt(count)) or (
        spec.eps_place in ("outside", "floor") and not (spec.scale == 1.0 and _is_round(spec.eps))
    )
    if spec.statistic == "mean-square" and summed:
        scale = spec.scale * math.sqrt(count)
        scale = 1.0 if close(scale, 1.0) else scale
        spec = spec._replace(statistic="sum-square", scale=scale)
        return _scaled_eps(spec, _by_place(spec, count))
    return _scaled_eps(spec, 1.0)


def _is_round(number: float) -> bool:
    """Whether a number is one that a person would write."""
    return close(number, float(f"{number:.3g}"))


def _by_place(spec: NormSpec, factor: float) -> float:
    return factor if spec.eps_place in ("inside", "floor-inside") else math.sqrt(factor)


def _scaled_eps(spec: NormSpec, factor: float) -> NormSpec | None:
    """The spec with its eps times a factor, less the last digits that scaling leaves behind."""
    if spec.eps is None:  # a tensor: it stays what it is
        return spec if factor == 1.0 else None
    return spec._replace(
        eps=_tidy(spec.eps * factor), scale=1.0 if close(spec.scale, 1.0) else spec.scale
    )


def _tidy(number: float) -> float:
    """A number without the last digits that scaling leaves behind."""
    return float(f"{number:.14g}")
