"""Lifted values, and what they are read from: the data that the lift and its laws share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly
from normfx.layout import Layout

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Lifted:
    """A polynomial, and the axes of x behind each dim of the value (none: constant along it)."""

    poly: Poly
    layout: Layout


class Operand(NamedTuple):
    """What an opaque atom stands for: a node, and the axes of x behind each of its dims."""

    node: fx.Node
    layout: Layout


class Reduced(NamedTuple):
    """A reduction of `poly` over the axes `over`: `number` elements each, to a `layout`."""

    poly: Poly
    over: frozenset[int]
    number: Poly
    layout: Layout


@dataclass(frozen=True, slots=True)
class Stuck:
    """Why an operator could not be lifted: the law that failed, at this node."""

    law: str
    node: fx.Node


def normal_dims(dims: Any, rank: int) -> set[int]:
    """The dims of a reduction as non-negative numbers; None and the empty list are all dims."""
    if dims is None or dims == []:
        return set(range(rank))
    return {d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def literal(node: fx.Node) -> float | int | None:
    """The number behind a constant of the graph: a filled 0-d tensor or a 0-d attribute."""
    if node.op == "get_attr":
        held: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            held = getattr(held, part, None)
        if (
            isinstance(held, torch.Tensor)
            and held.dim() == 0
            and not isinstance(held, torch.nn.Parameter)
        ):
            from torch._subclasses.fake_tensor import FakeTensor

            return None if isinstance(held, FakeTensor) else held.item()
        return None
    packet = g.packet(node)
    if packet in (aten.neg, aten.negative):
        negated = literal(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        return None if negated is None else -negated
    if packet in (
        aten.lift_fresh,
        aten.lift_fresh_copy,
        aten.detach,
        aten.clone,
        aten.to,
        aten.alias,
    ):
        source = node.args[0]
        return literal(source) if isinstance(source, fx.Node) else None
    if packet in (aten.full, aten.scalar_tensor, aten.full_like, aten.new_full):
        named = g.arguments(node)
        fill = named.get("fill_value", named.get("s"))
        return fill if isinstance(fill, (int, float)) and not isinstance(fill, bool) else None
    if packet in (aten.ones, aten.ones_like, aten.zeros, aten.zeros_like):
        return 1 if "ones" in str(packet) else 0
    return None
