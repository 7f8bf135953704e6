"""Variants: the inputs of a graph as they came, and harder ones of the same shapes and dtypes.

A fault may not show on what a model is given: a wrong eps is invisible beside a variance of one,
and a weight that was folded once and for all is right until it changes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from normfx import graph as g

Inputs = Literal["given", "hard"]

# Rows as they are, with a variance about that of eps, with none that eps leaves anything of, and
# larger ones. All is multiplied, so that a row keeps its direction.
_SCALES = (1.0, 2.0**-8, 2.0**-12, 0.0, 8.0)
# The mean of a row in its own largest values.
_OFFSET = 64.0


@dataclass(frozen=True, slots=True)
class Variant:
    """Inputs of one graph.

    Attributes:
        name: "given", "scaled rows", "large means" or "changed weights".
        args: the inputs.
        before: those of a call before, for what must follow a change; or None.
    """

    name: str
    args: list[Any]
    before: list[Any] | None = None


def variants(
    captured: fx.Graph, state: Collection[int], args: Sequence[Any], inputs: Inputs
) -> list[Variant]:
    """The inputs that a graph is verified with.

    Args:
        captured: the graph after capture.
        state: the positions of the inputs that are parameters and buffers.
        args: what it was called with.
        inputs: "given": these alone. "hard": also rows of small and large scale and of zeros, rows
            with a large mean, and weights that change between two calls. The rows are those of
            the activations that the graph gets; where it gets none, those of its embedding tables.
    """
    given = list(args)
    found = [Variant("given", given)]
    if inputs == "given":
        return found
    places = list(captured.find_nodes(op="placeholder"))
    rows = _rows(places, state, given)
    if rows:
        found.append(Variant("scaled rows", _changed(given, rows, _scaled)))
        found.append(Variant("large means", _changed(given, rows, _offset)))
    weights = [i for i in state if _is_real(given[i])]
    if weights:
        found.append(Variant("changed weights", _changed(given, weights, _multiplied), given))
    return found


def shaken(captured: fx.Graph, state: Collection[int], variant: Variant, seed: int) -> Variant:
    """Inputs and matrices close to those of a variant, that round in another way.

    The matrices too: what their rounding does to a short result is the same for all inputs.
    """
    args = list(variant.args)
    places = list(captured.find_nodes(op="placeholder"))
    rows = _rows(places, state, args)
    matrices = [i for i in state if i not in rows and _is_real(args[i]) and args[i].dim() > 1]

    def shake(held: Tensor, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + number)
        factors = 1 + torch.rand(held.shape, generator=generator) / 64
        return held * factors.to(held.device, held.dtype)

    return Variant(variant.name, _changed(args, [*rows, *matrices], shake), variant.before)


def _rows(places: list[fx.Node], state: Collection[int], args: list[Any]) -> list[int]:
    activations = [i for i, held in enumerate(args) if i not in state and _is_real(held)]
    if activations:
        return activations
    return [i for i, node in enumerate(places) if _is_real(args[i]) and _is_table(node)]


def _is_table(node: fx.Node) -> bool:
    lookups = torch.ops.aten.embedding, torch.ops.aten.index
    return any(g.packet(user) in lookups and user.args[0] is node for user in node.users)


def _is_real(held: Any) -> bool:
    return isinstance(held, Tensor) and held.is_floating_point() and held.numel() > 0


def _changed(args: list[Any], positions: list[int], change: Any) -> list[Any]:
    """The inputs with other numbers at some positions; the others are the tensors themselves."""
    changed = list(args)
    for seed, position in enumerate(positions):
        held = args[position].detach()
        new = torch.empty_like(held).copy_(change(held, seed))
        changed[position] = new.requires_grad_(args[position].requires_grad)
    return changed


def _scaled(held: Tensor, _: int) -> Tensor:
    if held.dim() < 2:
        return held
    rows = held.shape[:-1]
    count = torch.tensor(_SCALES, dtype=held.dtype, device=held.device)
    numbers = torch.arange(rows.numel(), device=held.device) % len(_SCALES)
    return held * count[numbers].reshape(*rows, 1)


def _offset(held: Tensor, _: int) -> Tensor:
    return held + _OFFSET * held.abs().amax(-1, keepdim=True) if held.dim() else held


def _multiplied(held: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = 0.75 + torch.rand(held.shape, generator=generator) / 2
    return held * factors.to(held.device, held.dtype)
