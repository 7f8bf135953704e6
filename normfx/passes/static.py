"""Statistics that are parameters: x * A + B, where A is made with the root of a given variance.

A frozen BatchNorm written out, UN and PowerNorm in eval mode. There is no reduction to begin with,
so these begin at the root of `variance + eps`, where the variance is a parameter or buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Atom, Poly
from normfx.lift import Lift
from normfx.lifted import Lifted, Operand, literal
from normfx.ops import NormSpec
from normfx.passes.composites import Core, wide
from normfx.passes.facts import Facts
from normfx.passes.materialise import can_be_made, materialise

aten = torch.ops.aten


# Another look at the same numbers.
_LOOKS = frozenset(
    {
        aten.view,
        aten.reshape,
        aten.unsqueeze,
        aten.squeeze,
        aten.expand,
        aten.to,
        aten._to_copy,
        aten.alias,
        aten.detach,
    }
)


def static_norms(facts: Facts) -> Iterator[tuple[fx.Node, Core, list[fx.Node]]]:
    """Every x * A + B where A is made with the root of a given variance (a frozen BatchNorm)."""
    for root in [
        n for n in facts.graph.nodes if n in facts.constant and _is_root_of_given_variance(n)
    ]:
        pending, seen = [root], {root}
        while pending:
            for user in list(pending.pop().users):
                if user in seen:
                    continue
                seen.add(user)
                if user in facts.constant:
                    pending.append(user)
                elif user in facts.order and g.packet(user) in (
                    aten.mul,
                    aten.div,
                    aten.addcmul,
                ):
                    found = _static(facts, user, root)
                    if found is not None:
                        yield found


def _static(
    facts: Facts, node: fx.Node, root: fx.Node
) -> tuple[fx.Node, Core, list[fx.Node]] | None:
    dynamic = [i for i in node.all_input_nodes if i not in facts.constant]
    if len(dynamic) != 1 or not _is_real(dynamic[0]):
        return None
    x, mean = dynamic[0], None
    lift = Lift(x, facts.order, grad=facts.grad)
    last, form = None, None
    current: fx.Node | None = node
    while current is not None:
        value = lift.value_of(current)
        same = [str(s) for s in g.shape(current) or ()] == [str(s) for s in g.shape(x) or ()]
        if not isinstance(value, Lifted) or value.layout != lift.axes.whole or not same:
            break
        inside, outside = lift.ring.split(value.poly, ("x",))
        linear = all(dict(m).get(0) == 1 for m in inside.terms)
        opaque = [lift.ring.atoms[i] for i in inside.atoms() | outside.atoms() if i]
        if not linear or not all(_is_constant(facts, atom) for atom in opaque):
            break
        last = current
        form = (
            Poly({tuple((i, e) for i, e in m if i): c for m, c in inside.terms.items()}),
            outside,
        )
        (current,) = current.users if len(current.users) == 1 else (None,)
        if current is not None and (current.op != "call_function" or current not in facts.order):
            break
    if last is None or form is None or not _is_real(last):
        return None
    subtracted = []
    read: Any = x.args
    if (
        g.packet(x) is aten.sub
        and len(x.users) == 1
        and x.args[1] in facts.constant
        and not x.kwargs
    ):
        if _is_real(read[0]) and str(g.shape(read[0])) == str(g.shape(x)):
            subtracted = [x]
            x, mean = read[0], read[1]
    out = g.dtype(last)
    assert out is not None
    stats = wide(torch.promote_types(g.dtype(x) or out, out))
    layout = lift.axes.whole
    if not all(can_be_made(lift, p, layout) for p in form):
        return None
    weight = materialise(facts, lift, form[0], layout, last, stats)
    bias = materialise(facts, lift, form[1], layout, last, stats) if form[1] else None
    if not isinstance(weight, fx.Node) or not (bias is None or isinstance(bias, fx.Node)):
        return None
    spec = NormSpec(
        "UnifiedNorm" if mean is None and not _reads(facts, bias, root) else "FrozenBatchNorm",
        (),
        "static",
        eps=_given_eps(root),
        stats_dtype=stats,
        norm_dtype=stats,
        out_dtype=out,
    )
    region = [
        n for n, v in lift.values.items() if v is not None and facts.order[n] <= facts.order[last]
    ]
    return last, Core(spec, x, weight, bias, None, mean), [*region, *subtracted]


def _is_real(node: Any) -> bool:
    """Whether a value is a tensor of real numbers: a complex one would lose its imaginary part."""
    held = g.tensor(node)
    return held is not None and held.is_floating_point()


def _is_root_of_given_variance(node: fx.Node) -> bool:
    """sqrt(p + eps) or its inverse, of a given p and a positive number eps."""
    packet = g.packet(node)
    half = packet is aten.pow and node.args[1] in (0.5, -0.5)
    return (packet in (aten.rsqrt, aten.sqrt) or half) and _given_eps(node) is not None


def _given_eps(root: fx.Node) -> float | None:
    """The eps of sqrt(p + eps) where p is a parameter or buffer behind views, else None."""
    given, eps = root.args[0], 0.0
    if g.packet(given) is aten.add and isinstance(given, fx.Node) and len(given.args) == 2:
        given, eps = given.args
    elif g.packet(root) is not aten.rsqrt:
        return None
    eps = literal(eps) if isinstance(eps, fx.Node) else eps
    while isinstance(given, fx.Node) and g.packet(given) in _LOOKS:
        given = given.args[0]
    plain = isinstance(given, fx.Node) and given.op in ("placeholder", "get_attr")
    return float(eps) if plain and isinstance(eps, (int, float)) and eps >= 0 else None


def _reads(facts: Facts, node: fx.Node | None, root: fx.Node) -> bool:
    """Whether a constant is made with a root: a bias that is, has the mean in it."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is root:
            return True
        for source in [] if current is None else current.all_input_nodes:
            if source not in seen and source in facts.constant:
                seen.add(source)
                pending.append(source)
    return False


def _is_constant(facts: Facts, atom: Atom) -> bool:
    return isinstance(atom.key, Operand) and atom.key.node in facts.constant
