"""Capture: dynamo's graph to one pre-dispatch ATen graph, the IR of every later stage.

At this level `x**2`, `x.pow(2)` and `torch.square(x)` are one operator, `layer_norm`, `linear` and
`scaled_dot_product_attention` are still whole, and autograd has not run: one IR for inference and
training.

Nodes that cannot or must not be traced are carried through verbatim, with the fake value dynamo
gave them: higher-order operators (tracing through `autograd.Function` would silently drop its
gradient), regions under functorch levels, and data-dependent operators. Nothing is executed for
them here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch.fx.node import map_aggregate

from normfx import graph as g
from normfx.fused import OPENED
from normfx.passes.explicit import explicit
from normfx.passes.functional import functional
from normfx.replay import Replays
from normfx.torch_internals import (
    cannot_be_traced,
    copy_graph_meta,
    copy_placeholder,
    fake_mode_of,
    give_value,
    is_traceable,
    proxy_of,
    real_tensors_allowed,
    trace_pre_dispatch,
    tracer,
    tracing_context,
)


def capture(gm: fx.GraphModule) -> fx.GraphModule:
    """The pre-dispatch ATen graph of dynamo's graph, with the same inputs (in order) and outputs.

    Args:
        gm: dynamo's graph; every placeholder has `meta["example_value"]`. It is not changed.

    Returns:
        A graph module whose nodes have `meta["val"]`, and the user's line and module path where
        dynamo knew them.

    Raises:
        Exception: whatever the trace raises; the pipeline then leaves the graph to Inductor.
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    inputs = [g.value(node) for node in placeholders]
    mode = fake_mode_of(inputs)
    interpreter = _Capture(gm)
    with real_tensors_allowed(mode), mode, tracing_context():
        captured = trace_pre_dispatch(lambda *args: interpreter.run(*args), inputs)
    for new, old in zip(captured.graph.find_nodes(op="placeholder"), placeholders, strict=True):
        copy_placeholder(new, old)
        new.meta["val"] = g.value(old)
    copy_graph_meta(captured, gm)
    explicit(captured)
    functional(captured)
    captured.recompile()
    return captured


class _Verbatim:
    """The value of a node inside a verbatim region: its proxy, for it has no fake value."""

    def __init__(self, proxy: Any) -> None:
        self.proxy = proxy


class _Capture(fx.Interpreter):
    """Runs dynamo's graph under a trace; what is verbatim becomes a node without being run."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._verbatim = verbatim_nodes(gm.graph)
        self._replays = Replays(gm.graph)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr" and isinstance(
            body := getattr(self.module, str(n.target), None), fx.GraphModule
        ):
            setattr(tracer().root, str(n.target), body)
            return _Verbatim(tracer().create_proxy("get_attr", n.target, (), {}, name=n.name))
        if n not in self._verbatim and not self._reads_verbatim(n):
            last = next(iter(reversed(tracer().graph.nodes)), None)
            try:
                if self._replays.covers(n, self.env):
                    return self._replays.replay(n, self.env)
                return self._replays.learn(n, self.env, last, super().run_node(n))
            except RuntimeError as error:
                if not cannot_be_traced(error):
                    raise
                _erase_after(tracer().graph, last)
        with fx_traceback.set_current_meta(n):
            return self._carry(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        opened: Any = OPENED.get(target, target)
        return super().call_function(opened, args, kwargs)

    def _reads_verbatim(self, n: fx.Node) -> bool:
        return any(isinstance(self.env.get(i), _Verbatim) for i in n.all_input_nodes)

    def _carry(self, n: fx.Node) -> Any:
        def proxy(value: Any) -> Any:
            if isinstance(value, _Verbatim):
                return value.proxy
            if isinstance(value, (tuple, list)):
                return type(value)(map(proxy, value))
            return proxy_of(value)

        args = map_aggregate(n.args, lambda a: proxy(self.env[a]) if isinstance(a, fx.Node) else a)
        kwargs = map_aggregate(
            n.kwargs, lambda a: proxy(self.env[a]) if isinstance(a, fx.Node) else a
        )
        made = tracer().create_proxy(n.op, n.target, args, kwargs, name=n.name)
        made.node.meta["val"] = g.value(n)
        if not is_traceable(g.value(n)):
            return _Verbatim(made)
        return give_value(g.value(n), made)


def _erase_after(graph: fx.Graph, last: fx.Node | None) -> None:
    """Takes back what a failed operator had already put into the trace."""
    for node in reversed(graph.nodes):
        if node is last:
            return
        graph.erase_node(node)


_LEVEL_MODULES = ("torch._functorch", "torch._C._functorch")


def verbatim_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of dynamo's graph that capture carries through as they stand."""
    found: set[fx.Node] = set()
    depth = 0
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        target = node.target
        name = getattr(target, "__name__", str(target))
        if name.endswith("_increment_nesting"):
            depth += 1
        if (
            depth
            or isinstance(target, torch._ops.HigherOrderOperator)
            or _is_data_dependent(node)
            or str(getattr(target, "__module__", "")).startswith(_LEVEL_MODULES)
        ):
            found.add(node)
        if name.endswith("_decrement_nesting"):
            depth -= 1
    return found


def _is_data_dependent(node: fx.Node) -> bool:
    """Whether a node makes symbols of its own (`item`): traced again, it would make others."""
    return bool(node.meta.get("unbacked_bindings")) or (
        node.op == "call_method" and node.target in ("item", "tolist")
    )
