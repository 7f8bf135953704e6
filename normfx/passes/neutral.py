"""Neutral: parameters that `bake_` left without effect are taken out of their norms.

    norm(x; 1, 0) = norm(x)          (x - 0) / sqrt((1 - eps) + eps) * 1 + 0 = x

`bake_` marks such a parameter with the one number that all of its elements have. A graph that is
compiled later drops it, so that no product with ones is folded, which would be a copy of the next
weight. The numbers are read when the graph is compiled, and may change after: what is returned here
are conditions, which `live.LiveWeights` checks whenever a parameter has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from normfx import graph as g
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.emit import Emitter
from normfx.passes.verdict import allows, change
from normfx.record import Refusal
from normfx.torch_internals import is_module_state

RULE = "drop-baked"

_MARK = "_normfx_neutral"

# Of (weight, bias, eps, mean, square) of a norm: where each stands among its arguments.
WEIGHT, BIAS, EPS, MEAN, SQUARE = range(1, 6)


# How far from one a neutral variance plus eps may be, where its dtype has no nearer number: such
# errors do not average out, and a hundred norms in a row must stay below a percent.
_MAX_OFF = 1e-4


def mark(tensor: torch.Tensor, value: float | None) -> None:
    """Remembers that every element of a parameter is this number; None: forgets it."""
    if value is not None:
        setattr(tensor, _MARK, value)
    elif hasattr(tensor, _MARK):
        delattr(tensor, _MARK)


def marked_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, float]:
    """The positions of a graph's inputs that are marked, and still are what their mark says."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        position: value
        for position, (node, given) in enumerate(zip(placeholders, inputs, strict=False))
        if is_module_state(node)
        and (value := getattr(given, _MARK, None)) is not None
        and is_uniform(given, value)
    }


def is_uniform(tensor: torch.Tensor, value: float) -> bool:
    """Whether every element of a tensor is this number."""
    return tensor.numel() > 0 and bool((tensor == value).all())


def neutral(
    gm: fx.GraphModule,
    options: Options,
    marked: Mapping[int, float],
    *,
    blocked: Refusal | None,
) -> list[fx.Node]:
    """Takes operands that have no effect out of canonical nodes.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
        marked: inputs of the graph of which every element is one number, by their positions.
        blocked: why nothing may be folded in this graph (gradients flow, say), or None.

    A norm that loses an operand gets one record.

    Returns:
        Conditions: nodes that read the inputs that were taken for their numbers, and must be true
        whenever the graph runs.
    """
    allowed = options.allows(RULE) and options.allows("hoist")  # which checks the conditions
    if blocked is not None or not marked or not allowed:
        return []
    graph = gm.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    known = {
        placeholders[position]: torch.full_like(held, value, device="cpu")
        for position, value in marked.items()
        if (held := _look_of(placeholders[position])) is not None
    }
    constant = g.parameter_only(graph)
    written = g.written_storages(graph)
    visible = [*placeholders, *graph.output_node().all_input_nodes]
    assumed: dict[int, float] = {}
    for node in list(graph.find_nodes(op="call_function", target=norm)):
        source: Any = node.args[0]
        if source in constant or str(g.shape(source)) != str(g.shape(node)):
            continue
        if not allows(options, RULE, node):
            continue
        found = _neutral_operands(node, known, options)
        # one tensor in place of two: no write to one of them may be seen in the other
        apart = g.storage(node) in written or g.storage(source) in written
        shown = g.storage(source) in {g.storage(n) for n in visible if n is not node}
        if not found or (_vanishes(node, found) and (apart or shown)):
            continue
        for operand in found:
            sources = g.behind([operand])
            assumed.update((p, v) for p, v in marked.items() if placeholders[p] in sources)
        change(node, "fold", RULE, "what bake_ made neutral")
        _drop(graph, node, found)
    return [_condition(graph, placeholders[p], value) for p, value in assumed.items()]


def _condition(graph: fx.Graph, node: fx.Node, value: float) -> fx.Node:
    """Whether every element of an input is one number."""
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        emit = Emitter(graph, node, RULE)
        return emit(torch.ops.aten.all.default, emit(torch.ops.aten.eq.Scalar, node, value))


def _look_of(node: fx.Node) -> torch.Tensor | None:
    held = g.tensor(node)
    if held is None or any(not isinstance(size, int) for size in held.shape):
        return None
    return torch.empty(list(held.shape), dtype=held.dtype, device="cpu")


def evaluated(node: fx.Node, known: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The value of a node that is computed from known tensors, or None."""
    if node in known:
        return known[node]
    cone = g.behind([node])
    if any(n.op != "call_function" and n not in known for n in cone):
        return None
    values: dict[fx.Node, Any] = dict(known)
    with torch.no_grad():
        for n in node.graph.nodes:
            if n in cone and n not in values:
                target: Any = n.target
                args, kwargs = map_arg((n.args, n.kwargs), values.__getitem__)
                values[n] = target(*args, **kwargs)
    return values[node]


def is_neutral(place: int, value: torch.Tensor | None, spec: Any) -> bool:
    """Whether an operand of a norm that has this value has no effect at its place."""
    if value is None:
        return False
    if place != SQUARE:
        return is_uniform(value, 1.0 if place == WEIGHT else 0.0)
    if spec.eps is None or spec.eps_place != "inside":
        return False
    off = (value.double() + spec.eps - 1).abs()
    return bool((off <= min(torch.finfo(value.dtype).eps / 4, _MAX_OFF)).all())


def _neutral_operands(
    node: fx.Node, known: Mapping[fx.Node, torch.Tensor], options: Options
) -> dict[fx.Node, int]:
    """The operands of a norm that have no effect, and their places."""
    spec: Any = node.kwargs["spec"]
    operands: Any = node.args
    found = {
        place: operands[place]
        for place in (WEIGHT, BIAS, MEAN, SQUARE)
        if operands[place] is not None
        and (place in (WEIGHT, BIAS) or spec.statistic == "running")
        and is_neutral(place, evaluated(operands[place], known), spec)
    }
    held = g.tensor(node)
    # where statistics are on another device, no change of them is seen (see `fold_back`)
    seen = options.weights == "frozen" or (held is not None and held.device.type == "cpu")
    static = MEAN in found and SQUARE in found and operands[EPS] is None and spec.scale == 1.0
    if not (static and seen):
        found.pop(MEAN, None)
        found.pop(SQUARE, None)
    return {operand: place for place, operand in found.items()}


def _vanishes(node: fx.Node, found: Mapping[fx.Node, int]) -> bool:
    """Whether nothing is left to be computed without these operands."""
    spec: Any = node.kwargs["spec"]
    left = [a for a in node.args[1:] if a is not None and a not in found]
    return spec.statistic in ("running", "static") and not left


def _drop(graph: fx.Graph, node: fx.Node, found: Mapping[fx.Node, int]) -> None:
    vanishes = _vanishes(node, found)
    args: list[Any] = list(node.args)
    for place in found.values():
        args[place] = None
    spec: Any = node.kwargs["spec"]
    if SQUARE in found.values():
        spec = spec._replace(statistic="static", origin="algebra")
    if args[WEIGHT] is None and args[BIAS] is None:
        spec = spec._replace(affine_dim=None)
    node.args = tuple(args)
    node.kwargs = {**node.kwargs, "spec": spec}
    if vanishes and spec.scale == 1.0 and g.dtype(args[0]) == spec.out_dtype:
        if not spec.contiguous:
            node.replace_all_uses_with(args[0], propagate_meta=False)
            graph.erase_node(node)
