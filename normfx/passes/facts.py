"""Facts about a captured graph: its order, what is constant, what is written to and when."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.record import Refusal


class Facts:
    """The graph as recognition sees it. A new node takes the place in the order that it serves."""

    def __init__(self, gm: fx.GraphModule, *, grad: bool) -> None:
        self.graph, self.grad = gm.graph, grad
        self.order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self.constant = g.parameter_only(gm.graph)
        self._writes = [
            (self.order[node], node, {g.storage(a) for a in g.mutated_arguments(node)})
            for node in gm.graph.nodes
            if g.mutated_arguments(node)
        ]
        self._grad_switches = [
            (self.order[node], node.args[0])
            for node in gm.graph.nodes
            if getattr(node.target, "__name__", "") == "_set_grad_enabled"
        ]
        self._grad_at_start = torch.is_grad_enabled()

    def emit(self, target: Any, a: Any, b: Any, before: fx.Node) -> fx.Node:
        """A call of a binary operator before a node; at least one operand is a node."""
        if not isinstance(a, fx.Node):
            a, b = b, a
        with self.graph.inserting_before(before):
            made = self.graph.call_function(target, (a, b))
        with g.fake_mode(a), torch.no_grad():
            made.meta["val"] = target(g.tensor(a), g.tensor(b) if isinstance(b, fx.Node) else b)
        g.inherit_provenance(made, before)
        self.order[made] = self.order[before]
        if all(i in self.constant for i in made.all_input_nodes):
            self.constant.add(made)
        return made

    def number(self, number: float, like: fx.Node) -> fx.Node:
        """A 0-d constant before a node, in that node's dtype and on its device."""
        held = g.tensor(like)
        assert held is not None
        settings = {"dtype": held.dtype, "device": held.device}
        with self.graph.inserting_before(like):
            made = self.graph.call_function(torch.ops.aten.full.default, ([], number), settings)
        with g.fake_mode(like), torch.no_grad():
            made.meta["val"] = torch.ops.aten.full.default([], number, **settings)
        self.order[made] = self.order[like]
        self.constant.add(made)
        return made

    def unsafe(
        self, node: fx.Node, inputs: list[fx.Node], region: list[fx.Node]
    ) -> tuple[Refusal, fx.Node] | None:
        """Why a region may not be replaced by one node at its end that reads the inputs there."""
        inside = [n for n in (*region, node) if self.order[n] <= self.order[node]]
        first, last = min(self.order[n] for n in inside), self.order[node]
        watched = {g.storage(n) for n in (*inputs, *inside)} - {None}
        for at, writer, written in self._writes:
            if first <= at < last and written & watched:
                return Refusal.MUTATED, writer
        if len({self._grad_mode(n) for n in inside}) > 1:
            return Refusal.GRAD_MODE, node
        return None

    def _grad_mode(self, node: fx.Node) -> Any:
        """Whether gradients are on where a node stands."""
        before = [mode for at, mode in self._grad_switches if at < self.order[node]]
        return before[-1] if before else self._grad_at_start
