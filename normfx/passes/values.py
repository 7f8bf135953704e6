"""Values: what nodes that read only parameters hold at the time of compiling.

Weights may change later, so a value proves nothing of the compiled graph. A rule that needs one
also gives a condition, which is checked whenever the weights are made again (`live.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.torch_internals import is_fake, without_autocast


class Values:
    """Computes nodes of a graph. Called as an `Emitter` is, it computes in place of emitting.

    Args:
        gm: the graph.
        inputs: the tensors its inputs have now; empty if they are not known.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self._gm = gm
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._known: dict[fx.Node, Any] = {
            node: given
            for node, given in zip(placeholders, inputs, strict=False)
            if isinstance(given, torch.Tensor) and not is_fake(given)
        }

    def __call__(self, target: Any, *args: Any, like: Any = None) -> Any:
        """The result of an operator on nodes and values; None if one of them is not known."""
        given = [self.of(arg) if isinstance(arg, fx.Node) else arg for arg in args]
        if any(arg is None for arg in given):
            return None
        device = next(arg for arg in given if isinstance(arg, torch.Tensor)).device
        with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
            return target(*given)

    def of(self, node: fx.Node) -> Any:
        """The value of a node that is computed from parameters alone, or None."""
        if node not in self._known:
            needed = g.behind([node])
            for current in [n for n in node.graph.nodes if n in needed]:
                if current not in self._known:
                    self._known[current] = self._computed(current)
        return self._known[node]

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            held = getattr(self._gm, str(node.target), None)
            return held if isinstance(held, torch.Tensor) and not is_fake(held) else None
        if node.op != "call_function" or any(self.of(n) is None for n in node.all_input_nodes):
            return None
        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
        with torch.inference_mode(False), torch.no_grad():
            return target(*args, **kwargs)
