"""Explicit sizes and dtypes: `reshape_as(x, y)` reads y, but none of its numbers.

A rule that asks who reads a value would take that for a reader. So operators that do as another
tensor is get its sizes, or its dtype, as arguments:

    reshape_as(x, y) = reshape(x, sizes of y)        type_as(x, y) = to(x, dtype of y)

A symbolic size is the input of the graph that holds it; where there is none, the operator stays.
"""

from __future__ import annotations

import torch
from torch import fx

from normfx import graph as g

aten = torch.ops.aten

_SIZED = {
    aten.reshape_as.default: aten.reshape.default,
    aten.view_as.default: aten.view.default,
    aten.expand_as.default: aten.expand.default,
}


def explicit(gm: fx.GraphModule) -> None:
    """Gives these operators their sizes or dtype as arguments; changes the graph in place."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    # a SymInt is shown as its expression
    symbols = {str(g.value(n)): n for n in placeholders if isinstance(g.value(n), torch.SymInt)}
    for node in gm.graph.nodes:
        if not g.is_call(node, *_SIZED, aten.type_as.default):
            continue
        x, like = g.arguments(node).values()
        held, other = g.tensor(x), g.tensor(like)
        if held is None or other is None:
            continue
        if node.target is aten.type_as.default:
            if held.device == other.device and held.layout == other.layout:
                node.target, node.args = aten.to.dtype, (x, other.dtype)
            continue
        sizes = [n if isinstance(n, int) else symbols.get(str(n)) for n in other.shape]
        if None not in sizes:
            node.target, node.args = _SIZED[node.target], (x, sizes)
