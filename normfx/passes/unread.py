"""Unread: a norm whose result nothing reads is left out.

Nothing reads it either where all that reads it only computes, and is not read itself. A batch norm
that updates its statistics does more than compute, and so does an assertion: they stay.
"""

from __future__ import annotations

from torch import fx

from normfx import graph as g
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.verdict import allows, change

RULE = "drop-unread"


def unread(gm: fx.GraphModule, options: Options) -> None:
    """Erases the canonical norms that nothing reads, and what only reads these.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
    """
    dead: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        computes = g.is_pure(node) and not node.is_impure()
        if computes and all(user in dead for user in node.users):
            dead.add(node)
    for node in reversed(list(gm.graph.find_nodes(op="call_function", target=norm))):
        if node in dead and allows(options, RULE, node):
            change(node, "rewrite", RULE, "nothing reads it")
            _erase(node)


def _erase(node: fx.Node) -> None:
    for user in list(node.users):
        _erase(user)
    if not node._erased:
        node.graph.erase_node(node)
