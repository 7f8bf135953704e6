"""How much of the normalization is left of a model once normfx has rewritten it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import normfx

# A norm, and what is left of one whose row scale went past a matrix product.
OF_NORMS = ("norm", "row_scale")


@dataclass(frozen=True, slots=True)
class Count:
    """Nodes of a model's graph.

    Attributes:
        found: normalizations of the model.
        left: normalizations of the rewritten graph.
        operators: all operators of the rewritten graph, norms as one each.
    """

    found: int
    left: int
    operators: int


@torch.no_grad()
def count_nodes(model: nn.Module, *args: Any) -> Count:
    """The nodes of the graph that normfx hands to Inductor, for a call without gradients."""
    found = normfx.diff(model)(*args)
    calls = Counter[str]()
    for stage in found.stages:
        if stage.stage != "lower":  # which spells the norms out for Inductor
            calls.update(stage.delta)
    left = sum(calls[name] for name in OF_NORMS)
    return Count(len(found.sites), left, calls.total())
