"""Sketch: a part of a graph, drawn again, for a rule to try its replacement on.

    before = sketch.cost();  replace(sketch.graph, ...);  after = sketch.cost()

So the cost model judges the very nodes that a rule would make, and nothing is described twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from normfx.cost import Cost, cost_of, is_free, maker_of


class Sketch:
    """Some nodes with all that may be one kernel with them, in a graph of their own.

    Args:
        nodes: what a rewrite changes.
        constant: the nodes that depend on parameters alone, which cost nothing in a call.

    Attributes:
        graph: the copy; what else reads its values is its output.
        of: each node's copy.
    """

    def __init__(self, nodes: Iterable[fx.Node], constant: set[fx.Node]) -> None:
        inside = _surroundings(list(nodes), constant)
        self.graph = fx.Graph()
        self.of: dict[fx.Node, fx.Node] = {}
        self._constant: set[fx.Node] = set()
        for node in sorted(inside):
            for source in node.all_input_nodes:
                if source not in self.of:
                    self._input(source, constant)
            if node.op == "call_function":
                self.of[node] = self.graph.node_copy(node, self.of.__getitem__)
            elif node not in self.of:
                self._input(node, constant)
        read = [self.of[n] for n in self.of if any(user not in inside for user in n.users)]
        self.graph.output(tuple(read))

    def _input(self, node: fx.Node, constant: set[fx.Node]) -> None:
        made = self.graph.placeholder(node.name)
        made.meta = dict(node.meta)
        self.of[node] = made
        if node in constant:
            self._constant.add(made)

    def cost(self) -> Cost:
        """What a call of it costs now."""
        constant = set(self._constant)
        computed: list[fx.Node] = []
        for node in self.graph.nodes:
            if node.op == "call_function" and constant.issuperset(node.all_input_nodes):
                constant.add(node)
            elif node.op == "call_function":
                computed.append(node)
        return cost_of(computed)


def _surroundings(nodes: list[fx.Node], constant: set[fx.Node]) -> set[fx.Node]:
    """These nodes, what makes their operands, and what reads their results, each one kernel far.

    A reader belongs to them only if it could run right then: what it reads beside them is known.
    """
    first = min(nodes)
    inside = set(nodes)
    for node in nodes:
        for source in node.all_input_nodes if node.op == "call_function" else ():
            _add_maker(source, inside, constant)
    readers: dict[fx.Node, None] = {}
    pending = list(nodes)
    for node in pending:  # which grows
        for user in node.users:
            if user.op == "call_function" and user not in inside:
                if is_free(user):
                    inside.add(user)
                    pending.append(user)
                else:
                    readers[user] = None
    for reader in sorted(readers):
        others = set(reader.all_input_nodes) - inside - constant
        if all(n < first or maker_of(n).op == "placeholder" for n in others):
            inside.add(reader)
    return inside


def _add_maker(node: fx.Node, inside: set[fx.Node], constant: set[fx.Node]) -> None:
    """Adds what computes a value, and the views of that which it is."""
    if node.op != "call_function" or node in inside or node in constant:
        return
    inside.add(node)
    if is_free(node) and node.all_input_nodes:
        _add_maker(node.all_input_nodes[0], inside, constant)


def between(node: fx.Node, readers: Iterable[Any]) -> list[fx.Node]:
    """A node, these readers of what becomes of its result, and all that lies on the way."""
    ends = set(readers)
    found = dict.fromkeys((node, *ends))
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user not in found and user.op == "call_function":
                found[user] = None
                pending.append(user)
    return list(found)
