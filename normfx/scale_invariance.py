"""Scale-invariant parameters: which weights of a model a normalization makes blind to their scale.

If multiplying a block w of a parameter by any positive number changes no result of a model, then

    <w, dL/dw> = 0                                        (AdamP, arXiv 2006.08217, equation 2)

for every loss L of the results, and steps along w only grow its norm, which shrinks the effective
step size. AdamP and SGDP take the component along w out of each step; which parameters to do that
for, and in blocks of what, they guess from the cosine between w and its gradient at each step. It
is a property of the graph: here it is read off, once (`analyses/scaleblind.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from normfx import graph as g
from normfx.analyses.blind import Blind
from normfx.analyses.partition import NONE
from normfx.analyses.scaleblind import scale_blindness
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal
from normfx.torch_internals import compile_alone


@dataclass(frozen=True, slots=True, eq=False)
class Invariance:
    """How a parameter is scale-invariant.

    Attributes:
        name: its qualified name.
        shape: its shape.
        view: what may be scaled by a factor of its own: "channel" (each index of `dim`), "group"
            (several indices of `dim`, or blocks that run along several dims), "whole" (all of it),
            "part" (as "group", but the rest of the parameter is not invariant), or "dead": no
            change of it is seen at all, as of a bias before BatchNorm.
        dim: the dim that numbers the blocks; None where there are none or several.
        groups: the number of blocks.
        shift: whether a constant added to any block is not seen either.
        norms: the names of the normalizations that make it so, as in `Report.sites`.
        blocks: the number of each element's block, broadcast against the parameter; -1 for none.
    """

    name: str
    shape: tuple[int, ...]
    view: str
    dim: int | None
    groups: int
    shift: bool
    norms: tuple[str, ...]
    blocks: torch.Tensor

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The inner product of two tensors like the parameter, for each block.

        Shapes: a, b: as the parameter. Returns: (groups,).
        Dtypes: the sum is in at least float32.
        """
        product = a.to(torch.promote_types(a.dtype, torch.float32)) * b
        # one more place, for what is in no block
        numbers = self._numbers(product.device) % (self.groups + 1)
        total = product.new_zeros(self.groups + 1)
        return total.index_add(0, numbers.flatten(), product.flatten())[: self.groups]

    def project(
        self, update: torch.Tensor, weight: torch.Tensor, eps: float = 1e-8
    ) -> torch.Tensor:
        """An update less its component along the weight, block by block.

            p - w * <w, p> / (|w| + eps)^2

        Elements in no block are returned as they are. Of a "dead" parameter every element is a
        block, so that nothing is left of its update.

        Shapes: update, weight: as the parameter.
        """
        squares = (self.dot(weight, weight).sqrt() + eps) ** 2
        along = self.dot(weight, update) / squares
        factors = torch.cat([along, along.new_zeros(1)])[self._numbers(weight.device)]
        return (update - weight * factors).to(update.dtype)

    def _numbers(self, device: torch.device) -> torch.Tensor:
        return self.blocks.to(device).expand(self.shape)


class ScaleInvariance(Mapping[str, Invariance]):
    """The scale-invariant parameters of a model by name, in the order of `named_parameters()`."""

    def __init__(self, found: Mapping[str, Invariance]) -> None:
        self._found = dict(found)

    def __getitem__(self, name: str) -> Invariance:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def to_json(self) -> str:
        """The table as JSON text, without the blocks of irregular parameters."""
        keys = ("name", "shape", "view", "dim", "groups", "shift", "norms")
        rows = [{key: getattr(found, key) for key in keys} for found in self.values()]
        return json.dumps(rows, indent=1)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "view", "shift", "norms")]
        for found in self.values():
            groups = f" ({found.groups})" if found.view in ("group", "part") else ""
            shape = "x".join(map(str, found.shape))
            shift = "yes" if found.shift else "-"
            norms = ", ".join(found.norms) or "-"
            rows.append((found.name, shape, found.view + groups, shift, norms))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(lines) + "\n"


def scale_invariant_parameters(
    model: nn.Module, *, dynamic: bool | None = None
) -> Callable[..., ScaleInvariance]:
    """The scale-invariant parameters of a model: `scale_invariant_parameters(model)(*args)`.

    Each block w of a parameter that is listed has <w, dL/dw> = 0 for every loss L of the model's
    results, up to the eps of the norm (AdamP, arXiv 2006.08217). What is not listed may be
    invariant too: what is not proved is left out. Buffers do not count as results: the running
    statistics of a BatchNorm see the scale. Neither does what a loss does with a parameter itself
    (weight decay).

    The call runs the model once, in the mode that it is in: `model.train()` first. In eval mode a
    BatchNorm has fixed statistics, and makes nothing invariant.

    Args:
        model: a module, not compiled. It must be one graph: code between two graphs could read a
            parameter unseen.
        dynamic: as in `torch.compile`.

    Returns:
        A function of the model's arguments that returns the `ScaleInvariance`.

    Raises:
        StageError: the graph could not be captured.
        torch._dynamo.exc.Unsupported: the model is not one graph.
    """

    def analysed(*args: Any, **kwargs: Any) -> ScaleInvariance:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[str, Invariance] = {}

        def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            def observe(stage: str, module: fx.GraphModule) -> None:
                if stage != "recognise":
                    return
                blind = scale_blindness(module.graph)
                placeholders = module.graph.find_nodes(op="placeholder")
                for node, given in zip(placeholders, example_inputs, strict=True):
                    name = names.get(id(given))
                    row = None if name is None else _invariance(name, node, blind[node])
                    if row is not None:
                        found[row.name] = row

            rewrite(gm, Options(rules=()), Journal(), observe=observe)
            return gm

        with torch.enable_grad():  # a detached statistic is none of a norm that has gradients
            compile_alone(model, collect, dynamic, fullgraph=True)(*args, **kwargs)
        return ScaleInvariance({name: found[name] for name in names.values() if name in found})

    return analysed


def _invariance(name: str, node: fx.Node, blind: Blind) -> Invariance | None:
    """The row of a parameter, or None if no part of it is invariant."""
    shape: Any = g.shape(node)
    if blind.scale.is_none():
        return None
    blocks = blind.scale.labelled(shape)
    dims = [d for d, size in enumerate(blocks.shape) if size != 1]
    dim, groups = dims[0] if len(dims) == 1 else None, int(blocks.max()) + 1
    if bool((blocks == NONE).any()):
        view = "part"
    elif blind.is_dead(shape):
        view = "dead"
    elif groups == 1:
        view = "whole"
    else:
        view = "channel" if dim is not None and groups == shape[dim] else "group"
    norms = sorted({norm.meta["normfx_site"].name for norm in blind.norms})
    shift = blind.shift.refines(blind.scale, shape)
    return Invariance(name, tuple(shape), view, dim, groups, shift, tuple(norms), blocks)
