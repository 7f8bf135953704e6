"""The printer: a graph as text that says the same on every run.

    v3: float32[2, s0, 8] = linear(v2, .weight, bias=.bias)  # layers.0.out

One line a node. Values are numbered in order; inputs have the name under which the model holds
them, relative to the module of the line if they are its own; arguments that say what their absence
would are left out. No addresses, devices, strides or lines of the user's file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from normfx.graphdiff.snapshot import Node, Ref, Snapshot

_CASTS = frozenset({"to", "_to_copy", "type_as", "prims.convert_element_type"})


class Names:
    """The names of the nodes of one graph.

    Args:
        nodes: in order.
        given: names that nodes have already, as they are matched to nodes of another graph.
        prefix: of the numbers of those that have none.
    """

    def __init__(
        self, nodes: Iterable[Node], given: Mapping[int, str] | None = None, prefix: str = "v"
    ) -> None:
        self.of: dict[int, str] = dict(given or {})
        used = set(self.of.values())
        count = 0
        for node in nodes:
            if node.uid in self.of or node.op == "output":
                continue
            if node.op == "call":
                name, count = f"{prefix}{count}", count + 1
            else:
                name = node.operator
                while name in used:
                    name += "'"
            used.add(name)
            self.of[node.uid] = name


def graph_text(snapshot: Snapshot) -> str:
    """The whole graph, one line a node."""
    return "".join(f"{line}\n" for line in lines(snapshot.nodes, Names(snapshot.nodes)).values())


def lines(nodes: Iterable[Node], names: Names) -> dict[int, str]:
    """The line of each node, by its number."""
    values: dict[int, str] = {}
    made = {}
    for node in nodes:
        values[node.uid] = node.value
        made[node.uid] = line(node, names.of, values)
    return made


def line(node: Node, names: Mapping[int, str], values: Mapping[int, str]) -> str:
    """One node.

    Args:
        node: the node.
        names: by number.
        values: dtype and shape of nodes before it, by number.
    """
    if node.op == "output":
        return f"return {', '.join(_shown(a, names, '') for _, a in node.arguments)}"
    head = names[node.uid] + (f": {node.value}" if node.value else "")
    if node.op != "call":
        kind = "parameter" if node.op == "input" and node.is_state else node.op
        return f"{head} = {kind}"
    given = ", ".join(
        f"{name}={_shown(argument, names, node.module)}"
        if name
        else _shown(argument, names, node.module)
        for name, argument in node.arguments
    )
    remarks = [part for part in (node.module, cast(node, values)) if part]
    remark = f"  # {', '.join(remarks)}" if remarks else ""
    return f"{head} = {node.operator}({given}){remark}"


def cast(node: Node, values: Mapping[int, str]) -> str:
    """`cast float32 -> bfloat16` for a node that casts, else ""."""
    if node.operator not in _CASTS:
        return ""
    first = next(iter(node.operands()), None)
    source = values.get(first, "") if first is not None else ""
    old, new = source.partition("[")[0], node.value.partition("[")[0]
    return f"cast {old} -> {new}" if old and new and old != new else ""


def _shown(argument: Any, names: Mapping[int, str], module: str) -> str:
    if isinstance(argument, Ref):
        name = names[argument.uid]
        own = bool(module) and name.startswith(f"{module}.")
        return name.removeprefix(module) if own else name
    if isinstance(argument, tuple):
        return f"[{', '.join(_shown(a, names, module) for a in argument)}]"
    return argument
