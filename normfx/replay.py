"""Replay: a node of dynamo's graph that is like an earlier one is captured without a trace.

Models repeat a block, and tracing an operator (dispatch, fake tensors, the tracer) costs about 2
ms. The first time an operator meets arguments of some dtypes, shapes and strides, capture traces it
and keeps the ATen nodes it became; after that the same nodes are made directly, and the result
takes the fake value that dynamo already computed.

Only for what is certain to come out the same: tensors without symbolic sizes, operators that write
to nothing and whose inner values are no views. Values keep dynamo's own fake tensors throughout, so
storages stay comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from normfx import graph as g
from normfx.torch_internals import bind, is_fake, is_symbolic, is_traced, node_of, tracer


@dataclass(frozen=True, slots=True)
class _Template:
    """The ATen nodes that an operator became: inputs are numbers, inner nodes are themselves."""

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    result: fx.Node


class Replays:
    """What one capture has learnt. Off for symbolic sizes, which are nodes themselves."""

    def __init__(self, graph: fx.Graph) -> None:
        self._templates: dict[Any, _Template | None] = {}
        self._keys: dict[fx.Node, Any] = {}
        self._context = 0  # counts switches of autocast and grad mode, which change what is traced
        self._on = all(_is_static(g.value(node)) for node in graph.nodes)

    def covers(self, node: fx.Node, env: dict[fx.Node, Any]) -> bool:
        """Whether a node can be made without a trace."""
        if node.op != "call_function" and node.op != "call_method":
            return False
        if _switches_mode(node):
            self._context += 1
        key = self._key(node, env) if self._on else None
        self._keys[node] = key
        return (
            key is not None
            and self._templates.get(key) is not None
            and not is_traced(g.value(node))
        )

    def replay(self, node: fx.Node, env: dict[fx.Node, Any]) -> torch.Tensor:
        """Makes the nodes of the template, and returns dynamo's value for the result."""
        template = self._templates[self._keys[node]]
        assert template is not None
        graph = tracer().graph
        made: dict[fx.Node, fx.Node] = dict(zip(template.inputs, _inputs(node, env), strict=True))
        for inner in template.nodes:
            copied = graph.node_copy(inner, lambda n: made[n])
            for name in g.PROVENANCE:
                copied.meta.pop(name, None)
            g.inherit_provenance(copied, node)
            made[inner] = copied
        held = g.value(node)
        bind(held, made[template.result])
        return held

    def learn(
        self, node: fx.Node, env: dict[fx.Node, Any], last: fx.Node | None, result: Any
    ) -> Any:
        """Keeps what a node became; returns its value, dynamo's own fake tensor where it can."""
        held = g.value(node)
        if not self._on or not is_fake(result) or not is_fake(held) or _look(held) != _look(result):
            return result
        traced = node_of(result)
        if traced is None or is_traced(held):
            return result
        key = self._keys.get(node)
        if key is not None and key not in self._templates:
            self._templates[key] = _template(_inputs(node, env), last, traced)
        bind(held, traced)
        return held

    def _key(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """What decides how a node is traced; None if it is not safe to say."""
        numbers: dict[fx.Node | None, int] = {}  # by node of the trace: two values may be one
        looks: list[Any] = []
        safe = True

        def name(argument: Any) -> Any:
            nonlocal safe
            if isinstance(argument, fx.Node):
                value: Any = env.get(argument)
                traced = node_of(value) if is_fake(value) else None
                if traced is None:
                    safe = False
                    return None
                if traced not in numbers:
                    numbers[traced] = len(numbers)
                    looks.append(_look(value))
                return ("input", numbers[traced])
            return (type(argument).__name__, repr(argument))

        target = node.target
        if (isinstance(target, str) and target.endswith("_")) or "out" in node.kwargs:
            return None
        arguments = repr(map_aggregate((node.args, tuple(sorted(node.kwargs.items()))), name))
        return (node.op, target, arguments, tuple(looks), self._context) if safe else None


def _inputs(node: fx.Node, env: dict[fx.Node, Any]) -> tuple[fx.Node, ...]:
    """The nodes of the trace behind a node's arguments, in order."""
    traced = [node_of(env[n]) for n in node.all_input_nodes if is_fake(env[n])]
    return tuple(dict.fromkeys(n for n in traced if n is not None))


def _template(
    inputs: tuple[fx.Node, ...], last: fx.Node | None, result: fx.Node
) -> _Template | None:
    nodes: list[fx.Node] = []
    for inner in reversed(result.graph.nodes):
        if inner is last:
            break
        nodes.append(inner)
    nodes.reverse()
    known = set(inputs) | set(nodes)
    for inner in nodes:
        target = inner.target
        if not isinstance(target, torch._ops.OpOverload) or g.mutated_arguments(inner):
            return None
        if inner is not result and any(r.alias_info is not None for r in target._schema.returns):
            return None
        if any(source not in known for source in inner.all_input_nodes):
            return None
    return _Template(inputs, tuple(nodes), result) if nodes and result in nodes else None


def _look(held: torch.Tensor) -> tuple[Any, ...]:
    """What a trace can see of a fake tensor."""
    return (
        held.dtype,
        tuple(held.shape),
        held.stride(),
        held.storage_offset(),
        held.device,
        held.requires_grad,
        type(held),
    )


def _is_static(held: Any) -> bool:
    if isinstance(held, (tuple, list)):
        return all(_is_static(h) for h in held)
    if is_symbolic(held):
        return False
    return (
        not isinstance(held, torch.Tensor)
        or held.layout != torch.strided
        or not any(map(is_symbolic, held.shape))
    )


def _switches_mode(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return "autocast" in name or "grad_enabled" in name or "inference_mode" in name
