"""How much of the normalization is left of a model once normfx has compiled it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from normfx.ops import norm
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal


@dataclass(slots=True)
class Count:
    """Nodes of a model's graph.

    Attributes:
        found: normalizations of the model.
        left: normalizations of the rewritten graph.
        operators: all operators of the rewritten graph.
    """

    found: int = 0
    left: int = 0
    operators: int = 0


@torch.no_grad()
def count_nodes(model: nn.Module, *args: Any) -> Count:
    """The nodes of the graph that normfx hands to Inductor, for a call without gradients."""
    count = Count()

    def backend(gm: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        def observe(stage: str, module: fx.GraphModule) -> None:
            if stage == "hoist":  # the last but "lower", which spells the norms out again
                count.left += len(module.graph.find_nodes(op="call_function", target=norm))
                count.operators += sum(n.op == "call_function" for n in module.graph.nodes)

        journal = Journal()
        rewrite(gm, Options(), journal, inputs=given, observe=observe)
        count.found += len(journal.sites)
        return gm.forward

    torch.compiler.reset()
    torch.compile(model, backend=backend)(*args)
    torch.compiler.reset()
    return count
