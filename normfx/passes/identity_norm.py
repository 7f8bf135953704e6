"""Identity norm: a norm whose eps outweighs every statistic that it can have is a scale.

    1 / sqrt(S + eps)  =  (1 + S / eps)^(-1/2) / sqrt(eps)  >=  (1 - S / (2 eps)) / sqrt(eps)

Where |x| <= B by construction, S is at most B^2 (n B^2 for a sum). If that over eps is below half
of what the dtype of the statistic can tell from one, then the norm is x / sqrt(eps), and so is its
gradient: the term of S is at most B^2 / eps times the largest number that comes from above. Under a
floor the two are equal as soon as S is below it.

Checkpoints whose norms were trained away are stored so, with an eps of 1e6 or more; but their x is
a residual stream, which no bound is known of. Such a norm stays. So does a LayerNorm: without its
root it still subtracts a mean.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from normfx.analyses.bounds import Bounds, count, multiple
from normfx.ops import NormSpec, norm
from normfx.options import Options
from normfx.passes.verdict import Refused, allows, change, refuse
from normfx.record import Refusal

RULE = "identity-norm"

# Norms with a smaller eps are not looked at.
_LARGE = 1.0


def identity_norm(gm: fx.GraphModule, options: Options) -> None:
    """Makes a scale of every norm whose statistic cannot matter.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.

    Every norm that is not centred and has an eps of one or more gets one record.

    Refuses:
        rule-off, input-unbounded.
    """
    bounds = Bounds(gm.graph)
    for node in gm.graph.find_nodes(op="call_function", target=norm):
        spec: Any = node.kwargs["spec"]
        if spec.statistic not in ("mean-square", "sum-square", "variance") or spec.centre:
            continue
        if spec.eps is None or not _LARGE <= spec.eps < math.inf:
            continue
        plan = _check(bounds, node, options)
        if isinstance(plan, Refused):
            refuse(node, "rewrite", RULE, plan)
        else:
            node.kwargs = {**node.kwargs, "spec": plan}
            change(node, "rewrite", RULE, f"a scale of {plan.scale:g}")


def _check(bounds: Bounds, node: fx.Node, options: Options) -> NormSpec | Refused:
    spec: Any = node.kwargs["spec"]
    if not allows(options, RULE, node):
        return Refused(Refusal.RULE_OFF, node)
    source: Any = node.args[0]
    limit, times = bounds.of(source), multiple(spec, count(node))
    given = any(operand is not None for operand in node.args[3:])  # another statistic, or a gate
    if limit is None or times is None or given:
        return Refused(Refusal.UNBOUNDED, source)
    if not _is_without_effect(spec, times * limit**2):
        return Refused(Refusal.UNBOUNDED, source)
    squared = spec.eps_place in ("inside", "floor-inside")
    return spec._replace(
        statistic="static",
        dims=(),
        correction=0,
        groups=0,
        prefix=0,
        scale=spec.scale / (math.sqrt(spec.eps) if squared else spec.eps),
        origin="algebra",
    )


def _is_without_effect(spec: NormSpec, largest: float) -> bool:
    """Whether a root with a statistic up to this size is that of eps, as far as rounding goes."""
    eps, visible = spec.eps, torch.finfo(spec.stats_dtype).eps
    assert eps is not None
    largest *= 1 + 2**-6  # what rounding to bfloat16 and back adds to a bound and its square
    if spec.eps_place == "inside":
        return largest / eps < visible / 2
    if spec.eps_place == "outside":
        return math.sqrt(largest) / eps < visible / 4
    return (math.sqrt(largest) if spec.eps_place == "floor" else largest) < eps
