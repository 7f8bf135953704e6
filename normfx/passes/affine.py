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
from normfx.laws import ARRANGEMENTS, VIEWS
from normfx.layout import Layout
from normfx.lift import Lift
from normfx.lifted import Lifted
from normfx.ops import NormSpec
from normfx.passes.composites import Core
from normfx.passes.facts import Facts
from normfx.passes.materialise import can_be_made, materialise

aten = torch.ops.aten

_CASTS = frozenset({aten.to, aten._to_copy, aten.type_as})


def extend(facts: Facts, node: fx.Node, core: Core) -> tuple[fx.Node, Core, list[fx.Node]]:
    """Takes in what follows a norm as long as it stays weight * norm + bias.

    Views among it are taken in where x is at hand in the layout after them: a GroupNorm by hand
    views x, normalizes, views back and then has its weight and bias.
    """
    taken: list[fx.Node] = []
    if core.spec.statistic in ("batch", "static"):
        return node, core, taken
    last, closed = node, False
    core = core if core.lift is not None else _in_views(facts, core)
    assert core.lift is not None
    layout: Layout = core.lift.values[core.x].layout
    lift = Lift(node, facts.order, grad=facts.grad, like=(core.lift.axes, layout))
    best = (node, core, taken)
    while len(last.users) == 1 and not closed:
        (user,) = last.users
        value = lift.value_of(user) if user in facts.order and user.op == "call_function" else None
        if not isinstance(value, Lifted):
            break
        base, committed = core, best[1]
        if value.layout != layout or str(g.shape(user)) != str(g.shape(core.x)):
            seen = _seen_in(core, value.layout, g.shape(user))
            if seen is not None and not _is_laid_out_like(user, seen.x):
                seen = None
            if seen is None:
                if g.packet(user) not in VIEWS | ARRANGEMENTS:
                    break
                taken, last = [*taken, user], user
                continue
            base = seen
        extended = _with_affine(facts, lift, user, value, base, committed)
        if extended is None:
            break
        taken = [*taken, user]
        last = user
        cast_after_affine = g.packet(user) in _CASTS and not _is_plain(extended)
        closed = cast_after_affine and g.dtype(user) != g.dtype(user.args[0])
        if base is core or not _is_plain(extended) or _is_home(core, value.layout):
            core, layout = base, value.layout
            best = (last, extended, taken)
    return best


def _in_views(facts: Facts, core: Core) -> Core:
    """An operator of ATen in a lift of what its x is a view of."""
    path = [core.x]
    while _is_plain(core) and g.packet(path[-1]) in VIEWS | ARRANGEMENTS:
        source = path[-1].args[0]
        if not isinstance(source, fx.Node):
            break
        path.append(source)
    path.reverse()
    lift = Lift(path[0], facts.order, grad=facts.grad, path=path[1:])
    if not isinstance(lift.value_of(core.x), Lifted):
        lift = Lift(core.x, facts.order, grad=facts.grad)
    layout: Layout = lift.values[core.x].layout
    dims = () if core.spec.groups else core.spec.dims
    return replace(core, lift=lift, over=frozenset(a for d in dims for a in layout[d]))


def _is_plain(core: Core) -> bool:
    return core.weight is None and core.bias is None


def _is_laid_out_like(result: fx.Node, x: fx.Node) -> bool:
    """Whether a norm of x lies in memory as a result does: later views may rely on it."""
    made, given = g.tensor(result), g.tensor(x)
    if made is None or given is None:
        return False
    return made.is_contiguous() or str(made.stride()) == str(given.stride())


def _is_home(core: Core, layout: Layout) -> bool:
    """Whether a layout is that of x before it was viewed for the norm."""
    return core.lift is not None and core.lift.axes.whole == layout


def _seen_in(core: Core, layout: Layout, shape: Any) -> Core | None:
    """The same norm of x in another view, if x is at hand in it."""
    lift = core.lift
    x = None if lift is None else lift.seen_as(layout, shape)
    placed = None if lift is None else lift.axes.placed(layout, core.over)
    # operands that were made for the view at hand stay with it
    operands = (core.weight, core.bias, core.eps, core.mean, core.square, core.gate)
    if x is None or placed is None or core.spec.beyond or any(o is not None for o in operands):
        return None
    if core.spec.affine_dim is not None:
        return None
    return replace(core, x=x, spec=core.spec._replace(kind="", **placed._asdict()))


def _with_affine(
    facts: Facts, lift: Lift, node: fx.Node, value: Lifted, core: Core, so_far: Core
) -> Core | None:
    inside, outside = lift.ring.split(value.poly, ("x",))
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
    if not all(can_be_made(lift, p, value.layout) for p in (factor, outside)):
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
        lift.ring.atoms[i].key.node in facts.constant for i in (factor.atoms() | outside.atoms())
    )
    if not static and not _broadcasts(lift, factor, outside):
        return None
    if (
        has_bias
        and static
        and not has_weight
        and core.weight is None
        and not _channel_like(core.over, lift, outside)
    ):
        return None
    if spec.affine_dim is not None and (core.weight is not None or core.bias is not None):
        return None
    made = replace(core, spec=_after(node, so_far, spec._replace(affine_dim=None)))
    with facts.graph.inserting_before(node):
        if has_weight:
            weight_node = materialise(facts, lift, factor, value.layout, node, spec.stats_dtype)
            made = replace(made, weight=weight_node)
        if has_bias:
            bias_node = materialise(facts, lift, outside, value.layout, node, spec.stats_dtype)
            made = replace(made, bias=bias_node)
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
    """Whether each operand is constant along some axis of x."""
    return all(
        not lift.ring.axes <= lift.ring.atoms[i].varies for poly in polys for i in poly.atoms()
    )


def _channel_like(over: frozenset[int], lift: Lift, bias: Poly) -> bool:
    return all(lift.ring.atoms[i].varies <= over for i in bias.atoms())
