"""Norm of norm: a norm of the result of a norm is one norm, with another eps and scale.

Let T be the mean square of x, or its biased variance, let the two roots be made from p T and q T,
and let a and b stand in front. The second norm sees u = a x / root, whose T is a^2 T / root^2:

    inside     b u / sqrt(q T(u) + e2)   =  a b x / sqrt((q a^2 + p e2) T + e1 e2)
    outside    b u / (sqrt(q T(u)) + e2) =  a b x / ((sqrt(q) |a| + sqrt(p) e2) sqrt(T) + e1 e2)

and with a floor the sums are maxima. These are identities for all x. A centred x has the variance
as its mean square, so an RMSNorm of a LayerNorm is a LayerNorm.

Two norms that both subtract a mean stay: the second takes off what rounding left of the mean in the
first, which on rows with a large mean is most of the error of one alone.

The rounding between the two goes. So it must be no coarser than that of the result, which has it
still. A row with an infinite element, or whose squares overflow, need not be NaN as a whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.bounds import count, multiple, of_norm
from normfx.laws import EXACT_DTYPES
from normfx.naming import name_of
from normfx.ops import NormSpec, norm
from normfx.options import Options
from normfx.passes.facts import Facts
from normfx.passes.verdict import Refused, allows, change, refuse
from normfx.record import Refusal

aten = torch.ops.aten

RULE = "norm-of-norm"

_STATISTICS = frozenset({"variance", "mean-square", "sum-square"})
_CASTS = frozenset({aten.to, aten._to_copy, aten.type_as})


def norm_of_norm(gm: fx.GraphModule, options: Options, *, grad: bool) -> None:
    """Makes one norm of each two that follow each other, where that is an identity.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
        grad: whether gradients flow through the graph.

    Every norm of a norm gets one record, and a norm that went into the next one more.

    Refuses:
        rule-off, extra-user, mutation-between, grad-mode-differs, affine-between,
        reduction-over-other-dims, statistics-not-combined, cancellation, range-too-small.
    """
    facts: Facts | None = None
    for node in list(gm.graph.find_nodes(op="call_function", target=norm)):
        chain = _before(node)
        if chain is None:
            continue
        facts = facts or Facts(gm, grad=grad)
        plan = _check(facts, node, chain, options)
        if isinstance(plan, Refused):
            refuse(node, "rewrite", RULE, plan)
            continue
        change(chain[-1], "rewrite", RULE, f"into {node.name}")
        change(node, "rewrite", RULE, f"with {chain[-1].name}")
        _replace(gm.graph, node, chain, plan)


def _before(node: fx.Node) -> list[fx.Node] | None:
    """The casts before a norm and the norm before these, last first, or None.

    Norms whose statistics are given, or are those of a batch or a family, are not looked at.
    """
    chain = []
    source: Any = node.args[0]
    while g.packet(source) in _CASTS and g.dtype(source) in EXACT_DTYPES:
        chain.append(source)
        source = source.args[0]
    looked_at = _of_itself(node) and _of_itself(source)
    return [*chain, source] if looked_at else None


def _of_itself(node: Any) -> bool:
    return g.is_call(node, norm) and node.kwargs["spec"].statistic in _STATISTICS


def _check(
    facts: Facts, node: fx.Node, chain: list[fx.Node], options: Options
) -> NormSpec | Refused:
    first = chain[-1]
    x: Any = first.args[0]
    if not (allows(options, RULE, node) and allows(options, RULE, first)):
        return Refused(Refusal.RULE_OFF, node)
    for inner in chain:
        if len(inner.users) > 1:
            others = [user for user in inner.users if user not in (node, *chain)]
            return Refused(Refusal.EXTRA_USER, others[0] if others else node)
    unsafe = facts.unsafe(node, [x], chain)
    if unsafe is not None:
        return Refused(*unsafe)
    if first.args[1] is not None or first.args[2] is not None:
        return Refused(Refusal.AFFINE_BETWEEN, first)
    a, b = first.kwargs["spec"], node.kwargs["spec"]
    assert isinstance(a, NormSpec)
    assert isinstance(b, NormSpec)
    if any(operand is not None for operand in (*first.args[3:], *node.args[3:])):
        return Refused(Refusal.NOT_COMBINED, node)
    one = a.eps_place == b.eps_place and a.stats_dtype == b.stats_dtype
    if not one or _device(x) != _device(node):
        return Refused(Refusal.NOT_COMBINED, node)
    if _places(a) != _places(b) or a.prefix or b.prefix:
        return Refused(Refusal.OTHER_DIMS, node)
    if a.centre and b.centre:
        return Refused(Refusal.CANCELS, node)
    centred = a.statistic == "variance"
    if (b.statistic == "variance" or a.centre) != centred:
        return Refused(Refusal.NOT_COMBINED, node)
    between = [a.norm_dtype, *(g.dtype(inner) or a.out_dtype for inner in chain)]
    if any(torch.finfo(d).eps > torch.finfo(b.out_dtype).eps for d in between):
        return Refused(Refusal.NOT_COMBINED, first)  # rounding that the result would show
    if not _fits(first, between):
        return Refused(Refusal.RANGE, first)
    return _combined(a, b, count(first)) or Refused(Refusal.NOT_COMBINED, node)


def _device(node: fx.Node) -> Any:
    held = g.tensor(node)
    return None if held is None else held.device


def _places(spec: NormSpec) -> tuple[Any, ...]:
    return spec.dims, spec.groups, spec.group_dim if spec.groups else None


def _fits(first: fx.Node, dtypes: list[torch.dtype]) -> bool:
    """Whether the first result is in the range of what it is rounded to: beyond, it is infinite."""
    spec: Any = first.kwargs["spec"]
    largest = min(torch.finfo(d).max for d in dtypes)
    if largest > 1e30 and abs(spec.scale) < 1e9:
        return True  # n is less than 2 ** 63, so a number is less than 2 ** 32 times the scale
    limit = of_norm(first)
    return limit is not None and 2 * limit < largest


def _combined(a: NormSpec, b: NormSpec, n: int | None) -> NormSpec | None:
    """The spec of the norm b of the norm a, or None."""
    same = (a.statistic, a.correction) == (b.statistic, b.correction)
    p, q = (1.0, 1.0) if same else (multiple(a, n), multiple(b, n))
    if p is None or q is None or a.eps is None or b.eps is None:
        return None
    if not (0 <= a.eps < math.inf and 0 <= b.eps < math.inf):
        return None
    ratio, squared = q / p, a.eps_place in ("inside", "floor-inside")  # of b's statistic to a's
    own = ratio * a.scale**2 if squared else math.sqrt(ratio) * abs(a.scale)
    factor = own + b.eps if a.eps_place in ("inside", "outside") else max(own, b.eps)
    if not 0 < factor < math.inf:
        return None
    eps = a.eps * b.eps / factor
    scale = a.scale * b.scale / (math.sqrt(factor) if squared else factor)
    info = torch.finfo(a.stats_dtype)
    # an eps near the smallest number of the dtype would be rounded, or be zero
    small = min(a.eps, b.eps) > 0 and eps < info.tiny / info.eps
    if small or not (math.isfinite(scale) and scale):
        return None
    return b._replace(
        kind="",
        statistic=a.statistic,
        centre=a.centre or b.centre,
        correction=a.correction,
        eps=eps,
        scale=scale,
        origin="algebra",
    )


def _replace(graph: fx.Graph, node: fx.Node, chain: list[fx.Node], spec: NormSpec) -> None:
    x: Any = chain[-1].args[0]
    kind = name_of(
        spec,
        g.shape(x) or (),
        g.shape(node.args[1]),
        None,
        on_weight=node.meta["normfx_site"].on_weight,
    )
    given, made = g.tensor(x), g.tensor(node)
    assert given is not None
    assert made is not None
    moved = str(given.stride()) != str(made.stride())
    spec = spec._replace(kind=kind, contiguous=moved and made.is_contiguous())
    node.args = (x, *node.args[1:])
    node.kwargs = {**node.kwargs, "spec": spec}
    for inner in chain:
        graph.erase_node(inner)
