"""The affine part: what follows a norm, as long as the value stays weight * norm + bias.

Read one reader at a time with a second lift, in which the norm itself is x. Taken in are
parameters, and operands that are constant along some dim that statistics are not taken over (the
scale and shift of AdaLN, one for each sample).
A residual or a gate as large as the value itself is no affine part: it stays outside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly
from normfx.lift import Lift
from normfx.lifted import Lifted
from normfx.ops import NormSpec
from normfx.passes.composites import Core
from normfx.passes.facts import Facts
from normfx.passes.materialise import can_be_made, materialise

aten = torch.ops.aten

_CASTS = frozenset({aten.to, aten._to_copy, aten.type_as})


def extend(facts: Facts, node: fx.Node, core: Core) -> tuple[fx.Node, Core, list[fx.Node]]:
    """Takes in what follows a norm as long as it stays weight * norm + bias."""
    taken: list[fx.Node] = []
    if core.spec.statistic in ("batch", "static"):
        return node, core, taken
    last, closed = node, False
    lift = Lift(node, frozenset(core.spec.dims), facts.order, grad=facts.grad)
    best = (node, core, taken)
    while len(last.users) == 1 and not closed:
        (user,) = last.users
        value = lift.value_of(user) if user in facts.order and user.op == "call_function" else None
        if not isinstance(value, Lifted) or value.axes != tuple(range(lift.rank)):
            break
        if [str(s) for s in g.shape(user) or ()] != [str(s) for s in g.shape(node) or ()]:
            break
        extended = _with_affine(facts, lift, user, value.poly, core, best[1])
        if extended is None:
            break
        taken = [*taken, user]
        last = user
        cast_after_affine = g.packet(user) in (aten.to, aten._to_copy, aten.type_as) and (
            extended.weight is not None or extended.bias is not None
        )
        closed = cast_after_affine and g.dtype(user) != g.dtype(user.args[0])
        best = (last, extended, taken)
    return best


def _with_affine(
    facts: Facts, lift: Lift, node: fx.Node, poly: Poly, core: Core, so_far: Core
) -> Core | None:
    inside, outside = lift.ring.split(poly, ("x",))
    weight: dict[Any, Any] = {}
    for monomial, coefficient in inside.terms.items():
        rest = tuple((i, e) for i, e in monomial if i != 0)
        if dict(monomial).get(0) != 1 or any(lift.ring.atoms[i].kind != "opaque" for i, _ in rest):
            return None
        weight[rest] = coefficient
    factor = Poly(weight)
    number = factor.constant()
    spec = core.spec
    if number is not None and number != 1:
        if core.weight is not None or core.bias is not None or outside:
            return None
        return replace(
            core, spec=_after(node, so_far, spec._replace(scale=spec.scale * float(number)))
        )
    has_weight, has_bias = number is None, bool(outside)
    if not can_be_made(lift, factor) or not can_be_made(lift, outside):
        return None
    if (has_weight and (core.weight is not None or core.bias is not None)) or (
        has_bias and core.bias is not None
    ):
        return None
    if (
        len(factor.terms) > 2
        or len(outside.terms) > 1
        or any(lift.ring.atoms[i].kind != "opaque" for i in outside.atoms())
    ):
        return None
    if has_bias and not outside.atoms():
        return None  # a number is no bias
    static = all(
        lift.ring.atoms[i].key in facts.constant for i in (factor.atoms() | outside.atoms())
    )
    if not static and not _broadcasts(lift, factor, outside):
        return None
    if (
        has_bias
        and static
        and not has_weight
        and core.weight is None
        and not _channel_like(lift, outside)
    ):
        return None
    if spec.affine_dim is not None and (core.weight is not None or core.bias is not None):
        return None
    made = replace(core, spec=_after(node, so_far, spec._replace(affine_dim=None)))
    with facts.graph.inserting_before(node):
        if has_weight:
            made = replace(made, weight=materialise(facts, lift, factor, node, spec.stats_dtype))
        if has_bias:
            made = replace(made, bias=materialise(facts, lift, outside, node, spec.stats_dtype))
    return made


def _after(node: fx.Node, so_far: Core, spec: NormSpec) -> NormSpec:
    """The spec with the dtypes of the value after one more operator."""
    out = g.dtype(node)
    assert out is not None
    if (
        so_far.weight is None and so_far.bias is None
    ):  # what the norm is rounded to before its affine part
        is_cast = g.packet(node) in _CASTS
        return spec._replace(norm_dtype=out if is_cast else so_far.spec.out_dtype, out_dtype=out)
    return spec._replace(norm_dtype=so_far.spec.norm_dtype, out_dtype=out)


def _broadcasts(lift: Lift, *polys: Poly) -> bool:
    """Whether each operand is constant along some dim that statistics are not taken over."""
    sizes = g.shape(lift.x) or ()
    others = {i for i, s in enumerate(sizes) if i not in lift.dims and str(s) != "1"}
    return all(
        not others <= lift.ring.atoms[i].varies for poly in polys for i in poly.atoms() if others
    ) and bool(others)


def _channel_like(lift: Lift, bias: Poly) -> bool:
    return all(lift.ring.atoms[i].varies <= lift.dims for i in bias.atoms())
