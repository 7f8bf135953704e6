"""Emit: new nodes in front of an old one, for the rules that compute weights from weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.cost import byte_count

aten = torch.ops.aten


class Emitter:
    """Makes nodes at a place; only results get a value, that of what they replace.

    Args:
        graph: the graph.
        at: the node that the new ones serve; they stand where the graph inserts.
        rule: the rule that makes them.
    """

    def __init__(self, graph: fx.Graph, at: fx.Node, rule: str) -> None:
        self.graph, self.at, self.rule = graph, at, rule

    def __call__(self, target: Any, *args: Any, like: Any = None) -> fx.Node:
        """A call of an operator, with the value of `like` where a later stage asks for one."""
        made = self.graph.call_function(target, args)
        if like is not None:
            made.meta["val"] = self._with_memory(like)
        g.inherit_provenance(made, self.at)
        made.meta["normfx_rule"] = self.rule
        return made

    def exact(self, weight: fx.Node) -> fx.Node:
        """A weight in float64: the very node that it was rounded from, where a rule has made it."""
        source = weight.args[0] if weight.args else None
        is_made = bool(weight.meta.get("normfx_rule")) and g.is_call(weight, aten.to.dtype)
        is_rounded = is_made and weight.args[1] is not torch.float64
        if is_rounded and isinstance(source, fx.Node) and source.meta.get("normfx_rule"):
            return source
        return self(aten.to.dtype, weight, torch.float64)

    def _with_memory(self, like: torch.Tensor) -> torch.Tensor:
        """The value itself, or one laid out densely for one that repeats the same memory."""
        if 0 not in like.stride():
            return like
        with g.fake_mode(self.at), torch.no_grad():
            return torch.empty_like(like, memory_format=torch.contiguous_format)


def inline(
    graph: fx.Graph, template: fx.Graph, inputs: Iterable[fx.Node], at: fx.Node
) -> tuple[fx.Node, ...]:
    """Copies a traced function to where the graph inserts.

    Args:
        graph: the graph.
        template: of the function.
        inputs: its arguments, in order.
        at: the node whose place in the user's code the new ones have.

    Returns:
        Its results.
    """
    given = iter(inputs)
    copies: dict[fx.Node, fx.Node] = {}
    results: Any = None
    for inner in template.nodes:
        if inner.op == "placeholder":
            copies[inner] = next(given)
        elif inner.op == "output":
            results = inner.args[0]
        else:
            copies[inner] = graph.node_copy(inner, lambda n: copies[n])
            g.inherit_provenance(copies[inner], at)
            copies[inner].meta["normfx_site"] = at.meta.get("normfx_site")  # whose part it is
    results = results if isinstance(results, (tuple, list)) else (results,)
    return tuple(copies[result] for result in results)


def copied_bytes(weights: Iterable[fx.Node]) -> int:
    """The memory of weights that are held twice once a rule changes them: not of those it made."""
    stored = {weight for weight in weights if not weight.meta.get("normfx_rule")}
    return sum(map(byte_count, stored))


def erase_unused(graph: fx.Graph, kept: Sequence[fx.Node]) -> None:
    """Erases what rules made for operators that then got other weights, but for what is kept."""
    for node in reversed(graph.nodes):
        if node.meta.get("normfx_rule") and not node.users and node not in kept:
            graph.erase_node(node)
