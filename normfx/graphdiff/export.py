"""Exports: a stage as JSON for Model Explorer, and as a graph for the drawer of `torch.fx`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfx.graphdiff.printer import Names, lines
from normfx.graphdiff.run import Recorded
from normfx.graphdiff.snapshot import Node, Ref, Snapshot


def model_explorer(recorded: Recorded, snapshot: Snapshot) -> dict[str, Any]:
    """A graph in the format of `model_explorer.graph_builder.Graph`.

    Modules are its layers, so Model Explorer shows a model folded up. Each node has its line, the
    user's line, the rule that made it and the verdict on the norm that it is a part of.
    """
    names = Names(snapshot.nodes)
    text = lines(snapshot.nodes, names)
    return {
        "id": f"{recorded.name}, {snapshot.stage}",
        "nodes": [_explored(node, text[node.uid]) for node in snapshot.nodes],
    }


def _explored(node: Node, line: str) -> dict[str, Any]:
    attributes = {"line": line, "module": node.module, "rule": node.rule, "stack": node.trace}
    if node.site is not None:
        attributes["norm"] = node.site.name
        for record in node.site.records:
            code = "" if record.code is None else f": {record.code.value}"
            attributes[record.rule] = "changed" if record.changed else f"refused{code}"
    value = [{"key": "tensor_shape", "value": node.value}] if node.value else []
    return {
        "id": str(node.uid),
        "label": node.operator,
        "namespace": node.module.replace(".", "/"),
        "attrs": [{"key": key, "value": value} for key, value in attributes.items() if value],
        "incomingEdges": [
            {"sourceNodeId": str(operand), "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
            for i, operand in enumerate(node.operands())
        ],
        "outputsMetadata": [{"id": "0", "attrs": value}] if value else [],
    }


def dot(recorded: Recorded, snapshot: Snapshot) -> str:
    """A graph in the language of graphviz, by `torch.fx.passes.graph_drawer.FxGraphDrawer`.

    Raises:
        RuntimeError: pydot is not installed.
    """
    from torch.fx.passes.graph_drawer import FxGraphDrawer

    title = f"{recorded.name}, {snapshot.stage}"
    return FxGraphDrawer(_as_fx(snapshot), title).get_dot_graph().to_string()


def _as_fx(snapshot: Snapshot) -> fx.GraphModule:
    """The graph for drawing: its calls and edges; literals as text. It cannot be run."""
    graph, made = fx.Graph(), dict[int, fx.Node]()
    names = Names(snapshot.nodes)

    def argument(given: Any) -> Any:
        if isinstance(given, Ref):
            return made[given.uid]
        return [argument(a) for a in given] if isinstance(given, tuple) else given

    for node in snapshot.nodes:
        arguments = [argument(a) for name, a in node.arguments if not name]
        named = {name: argument(a) for name, a in node.arguments if name}
        if node.op == "output":
            graph.output(tuple(arguments))
        elif node.op != "call":
            made[node.uid] = graph.placeholder(names.of[node.uid].replace(".", "_"))
        elif callable(node.target):
            made[node.uid] = graph.call_function(node.target, tuple(arguments), named)
        else:
            made[node.uid] = graph.call_method(node.operator, tuple(arguments), named)
    return fx.GraphModule(torch.nn.Module(), graph)
