"""Hoist: computations that read only parameters and buffers leave the graph.

What they compute becomes further inputs of the captured graph, marked static as parameters are. A
second graph makes them from the parameters; `live.LiveWeights` runs it before the first call and
after every change of a parameter. Inputs and not buffers, because dynamo reuses compiled code for
another module of the same class (a second model, the next block): each then has hoisted tensors of
its own. With gradients, what reads a parameter that one is wanted of stays where autograd sees it;
what reads frozen parameters alone leaves the graph of a training step too.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from normfx import graph as g
from normfx.ops import norm
from normfx.passes.verdict import change
from normfx.record import Journal
from normfx.torch_internals import mark_static

aten = torch.ops.aten

RULE = "hoist"

# No computation, only another look at the same storage: not worth a buffer.
VIEWS = frozenset(
    {
        aten.view,
        aten.reshape,
        aten.t,
        aten.transpose,
        aten.permute,
        aten.expand,
        aten.expand_as,
        aten.unsqueeze,
        aten.squeeze,
        aten.slice,
        aten.select,
        aten.alias,
        aten.detach,
        aten.flatten,
        aten.unflatten,
        aten.split,
        aten.split_with_sizes,
        aten.chunk,
        aten.unbind,
        aten.numpy_T,
        aten.mT,
    }
)

# A value that is larger than this many times the parameters it is made from (a table indexed by
# every position) trades memory traffic for arithmetic that Inductor fuses into its reader: it
# stays.
MAX_GROWTH = 4


@dataclass(frozen=True, slots=True)
class Hoisted:
    """The graph that makes the new inputs, and where it finds its own.

    Attributes:
        compute: from the parameters at `positions` to the new inputs, in order.
        positions: indices of the inputs that the captured graph had before.
        values: what the new inputs look like (fake tensors).
        conditions: how many further outputs `compute` has: each says whether the captured graph is
            right for these parameters.
    """

    compute: fx.GraphModule
    positions: tuple[int, ...]
    values: tuple[torch.Tensor, ...]
    conditions: int = 0


def hoist(
    gm: fx.GraphModule,
    journal: Journal,
    conditions: Sequence[fx.Node] = (),
    *,
    grad: bool = False,
) -> Hoisted | None:
    """Moves every parameter-only computation out of the graph.

    Args:
        gm: a graph; changed in place: it gets one more input for each hoisted value.
        journal: gets the number of hoisted tensors and their bytes.
        conditions: nodes that read only parameters, each a truth value that rules rely on. They
            leave the graph.
        grad: whether gradients flow through the graph.

    Returns:
        What makes the new inputs, or None if there is nothing to hoist.
    """
    graph = gm.graph
    # those of constants alone (parameters under Inductor's freezing) were met when they were made
    conditions = [c for c in conditions if any(n.op == "placeholder" for n in g.behind([c]))]
    constant = g.parameter_only(graph, frozen=True)
    _merge(graph, constant, set(conditions))
    targets = _targets(graph, constant)
    if grad:  # a table made of buffers may be another one in each step
        targets = [node for node in targets if _reads_parameter(node)]
    outputs = [*targets, *conditions]
    if not outputs:
        return None
    placeholders = list(graph.find_nodes(op="placeholder"))
    needed = g.behind(outputs)
    compute = computing(gm, outputs)
    returned = _returned(graph, constant)
    last = placeholders[-1]
    values = []
    for index, node in enumerate(targets):
        with graph.inserting_after(last):
            last = graph.placeholder(f"normfx_hoisted_{index}")
        g.inherit_meta(last, node)
        last.meta["normfx_rule"] = node.meta.get("normfx_rule", "hoist")
        sources = g.behind([node])
        last.meta["normfx_made_from"] = tuple(n.name for n in placeholders if n in sources)
        mark_static(last)
        _give_back(graph, node, last, returned)
        node.replace_all_uses_with(last, propagate_meta=False)
        held = g.tensor(node)
        assert held is not None
        values.append(held)
        journal.folded_bytes += held.numel() * held.element_size()
    journal.hoisted = len(targets)
    positions = tuple(i for i, node in enumerate(placeholders) if node in needed)
    order = {node: index for index, node in enumerate(graph.nodes)}
    g.erase_dead([n for n in needed if n.op == "call_function"], order)
    for node in needed:
        if node not in order and g.is_call(node, norm):
            change(node, "hoist", RULE, "reads only parameters")
    return Hoisted(compute, positions, tuple(values), len(conditions))


def _merge(graph: fx.Graph, constant: set[fx.Node], kept: set[fx.Node]) -> None:
    """Leaves one of several equal computations, so that there is one copy of what they make.

    A weight that is used with one norm at several depths is folded once at each of them.
    """
    # the caller may write to one of two equal results, which must not be seen in the other
    returned = {g.storage(node) for node in graph.output_node().all_input_nodes} - {None}
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node not in constant or node.op == "placeholder" or g.storage(node) in returned:
            continue
        if node in kept:
            continue
        # as text: 1, 1.0 and True are equal, but not the same argument
        call = repr((node.op, str(node.target), node.args, sorted(node.kwargs.items())))
        same = first.setdefault(call, node)
        if same is not node:
            if g.is_call(node, norm):
                change(node, "hoist", RULE, f"as {same.name}, which is equal")
            node.replace_all_uses_with(same, propagate_meta=False)
            graph.erase_node(node)
            constant.discard(node)


def computing(gm: fx.GraphModule, targets: list[fx.Node]) -> fx.GraphModule:
    """A graph module of its own that makes these values, from the inputs that they depend on."""
    needed = g.behind(targets)
    compute = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = compute.node_copy(node, lambda n: copies[n])
    compute.output(tuple(copies[node] for node in targets))
    return fx.GraphModule(gm, compute)


def _returned(graph: fx.Graph, constant: set[fx.Node]) -> set[fx.Node]:
    """The output, and the views between a computed value and the output."""
    found = {graph.output_node()}
    for node in graph.output_node().all_input_nodes:
        while node in constant and _computed(node) not in (None, node):
            found.add(node)
            node = node.all_input_nodes[0]
    return found


def _give_back(graph: fx.Graph, node: fx.Node, hoisted: fx.Node, returned: set[fx.Node]) -> None:
    """Returns a copy to the caller, who may write to it and owns it; one at each call."""
    readers = [user for user in node.users if user in returned]
    if not readers:
        return
    with graph.inserting_before(node):
        copied = graph.call_function(aten.clone.default, (hoisted,))
    g.inherit_meta(copied, node)
    for reader in readers:
        reader.replace_input_with(node, copied)


def _targets(graph: fx.Graph, constant: set[fx.Node]) -> list[fx.Node]:
    """The computed values that the rest of the graph reads, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node not in constant or node.op != "call_function":
            continue
        if all(user in constant for user in node.users):
            continue
        base = _computed(node)
        if base is not None and base not in found and _is_hoistable(base):
            found[base] = None
    return [node for node in graph.nodes if node in found]


def _computed(node: fx.Node) -> fx.Node | None:
    """The computation behind views, or None if there are only views of a parameter."""
    current = node
    while True:
        if current.op != "call_function":
            return None
        source = current.args[0] if current.args else None
        is_view = g.packet(current) in VIEWS or (
            current.target is operator.getitem
            and isinstance(source, fx.Node)
            and g.packet(source) in VIEWS
        )
        if not is_view:
            return current
        assert isinstance(source, fx.Node)
        current = source


def _reads_parameter(node: fx.Node) -> bool:
    return any(isinstance(g.tensor(n), torch.nn.Parameter) for n in g.behind([node]))


def _is_hoistable(node: fx.Node) -> bool:
    held = g.tensor(node)
    if (
        held is None
        or held.layout != torch.strided
        or any(not isinstance(s, int) for s in held.shape)
    ):
        return False
    inputs = [g.tensor(n) for n in g.behind([node]) if n.op == "placeholder"]
    size = sum(t.numel() for t in inputs if t is not None)
    return bool(inputs) and held.numel() <= MAX_GROWTH * size
