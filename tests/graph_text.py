"""The graph after each stage as text that does not change with names, addresses or devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfx.backend import weights_are_tracked
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal


def stages_of(
    model: Any, *inputs: Any, rules: list[str] | None = None
) -> tuple[dict[str, str], Journal]:
    """The text of the model's only graph after each stage, and its journal."""
    texts: dict[str, str] = {}
    journals: list[Journal] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]):
        assert not journals, "the model breaks into several graphs"
        journals.append(Journal())

        def observe(stage: str, module: fx.GraphModule) -> None:
            texts[stage] = graph_text(module.graph)

        rewrite(
            gm,
            Options.parse({"rules": rules}),
            journals[0],
            tracked=weights_are_tracked(gm, example_inputs),
            inputs=example_inputs,
            observe=observe,
        )
        return gm

    torch.compile(model, backend=backend)(*inputs)
    return texts, journals[0]


def graph_text(graph: fx.Graph) -> str:
    """One line a node: `a = linear(x, w, b)`, inputs by name, the rest by number."""
    names: dict[fx.Node, str] = {}
    lines = []

    def shown(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return names[argument]
        if isinstance(argument, (list, tuple)) and not hasattr(argument, "_fields"):
            return "[" + ", ".join(map(shown, argument)) + "]"
        if hasattr(argument, "_fields"):  # a NormSpec
            return f"{argument.kind} over {list(argument.dims)}, eps {argument.eps:g}"
        return str(argument).removeprefix("torch.")

    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("normfx_hoisted_"):
            names[node] = str(node.target).removeprefix("normfx_")
        elif node.op == "placeholder":
            names[node] = f"in{sum(n.startswith('in') for n in names.values())}"
        elif node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "output":
            lines.append(f"return {shown(node.args[0])}")
        else:
            names[node] = f"v{sum(n.startswith('v') for n in names.values())}"
            given = [shown(a) for a in node.args] + [
                shown(v) for k, v in node.kwargs.items() if k != "rank"
            ]
            target = getattr(node.target, "overloadpacket", node.target)
            lines.append(
                f"{names[node]} = {getattr(target, '__name__', target)}({', '.join(given)})"
            )
    return "\n".join(lines) + "\n"
