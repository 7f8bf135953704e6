"""Open clamp: a clamp whose bounds are infinite now, which leaves every number as it is.

    clamp(x, -inf, inf) = x

Models that may be quantized clamp around every linear operator, with bounds in buffers that stay
infinite until somebody measures ranges. Such a clamp stands between a norm and what could take its
weight over. The bounds are read when the graph is compiled, and may change after: what is returned
are conditions, which `live.LiveWeights` checks whenever a parameter or buffer has changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.options import Options
from normfx.passes.emit import Emitter
from normfx.passes.values import Values
from normfx.record import Refusal

aten = torch.ops.aten

RULE = "drop-open-clamp"

# The names of an operator's bounds, and the bound that leaves every number as it is.
_BOUNDS: dict[Any, dict[str, float]] = {
    aten.clamp: {"min": -math.inf, "max": math.inf},
    aten.clamp_min: {"min": -math.inf},
    aten.clamp_max: {"max": math.inf},
}


def open_clamp(
    gm: fx.GraphModule, options: Options, *, blocked: Refusal | None, values: Values
) -> list[fx.Node]:
    """Takes clamps out that have no effect.

    Args:
        gm: a graph of ATen operators; changed in place.
        options: says whether the rule may run.
        blocked: why nothing may be folded in this graph (gradients flow, say), or None.
        values: of the parameters and buffers, as they are now.

    Returns:
        Conditions: nodes that read the bounds, and must be true whenever the graph runs.
    """
    allowed = options.allows(RULE) and options.allows("hoist")  # which checks the conditions
    clamps = [node for node in gm.graph.nodes if g.packet(node) in _BOUNDS]
    if blocked is not None or not allowed or not clamps:
        return []
    constant = g.parameter_only(gm.graph)
    # one tensor in place of two: no write to one of them may be seen in the other
    own = g.written_storages(gm.graph)
    own |= {g.storage(node) for node in gm.graph.output_node().all_input_nodes} | {None}
    open_bounds: dict[tuple[fx.Node, float], None] = {}
    for node in clamps:
        source: Any = node.args[0]
        bounds = _bounds_of(node)
        if g.storage(node) in own or g.storage(source) in own or not _is_alike(node, source):
            continue
        if all(_is_open(bound, limit, constant, values) for bound, limit in bounds):
            open_bounds.update({(b, x): None for b, x in bounds if isinstance(b, fx.Node)})
            node.replace_all_uses_with(source, propagate_meta=False)
            gm.graph.erase_node(node)
    return [_condition(gm.graph, bound, limit) for bound, limit in open_bounds]


def _bounds_of(node: fx.Node) -> list[tuple[Any, float]]:
    """The bounds of a clamp, each with the one that has no effect."""
    named = g.arguments(node)
    return [
        (named[name], limit)
        for name, limit in _BOUNDS[g.packet(node)].items()
        if named[name] is not None
    ]


def _is_alike(node: fx.Node, source: fx.Node) -> bool:
    """Whether a clamp leaves shape, dtype and layout as they are: its bounds may be wider."""
    made, given = g.tensor(node), g.tensor(source)
    if made is None or given is None or made.dtype != given.dtype:
        return False
    return str((made.shape, made.stride())) == str((given.shape, given.stride()))


def _is_open(bound: Any, limit: float, constant: set[fx.Node], values: Values) -> bool:
    if not isinstance(bound, fx.Node):
        return bound == limit
    held = values.of(bound) if bound in constant else None
    return held is not None and bool((held == limit).all())


def _condition(graph: fx.Graph, bound: fx.Node, limit: float) -> fx.Node:
    """Whether a bound is the one that has no effect."""
    with graph.inserting_after(bound):
        compared = Emitter(graph, bound, RULE)(aten.eq.Scalar, bound, limit)
    with graph.inserting_after(compared):
        return Emitter(graph, bound, RULE)(aten.all.default, compared)
