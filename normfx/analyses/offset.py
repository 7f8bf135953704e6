"""Constant offset (forward): the values that are a tensor, scaled and shifted by constants.

Begun at a norm whose statistics are given, y = S * x + T, and carried through the residual adds
after it. Every value found is

    v = S * u + k * T,   k in {0, 1}

for a tensor u of its own: u = x at first, and u + f/S after the addition of f, an addend. An addend
may take the offset with it, f + T, so that what comes after it has none (k = 0) and no rounding
error of its own: u is v but for its scale. Carrying T on through several additions would subtract
numbers that are larger than v.

What moves channels, or scales a value as a whole, is passed through (`passes/channels.py`). Where
nothing is known of an operator, the walk ends: it reads the value.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch
from torch import fx

from normfx import graph as g
from normfx.passes.channels import Channels

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Offset:
    """What is known of a value.

    Attributes:
        channels: which S belongs to each of its numbers.
        shifted: whether k is one.
    """

    channels: Channels
    shifted: bool


@dataclass(frozen=True, slots=True)
class Addend:
    """A tensor f that is added to a value.

    Attributes:
        node: the addition.
        operand: f.
        offset: of the value it is added to. If that is shifted, f takes the shift.
    """

    node: fx.Node
    operand: fx.Node
    offset: Offset


@dataclass(frozen=True, slots=True)
class Read:
    """An operator that the walk does not go through, and the value it reads."""

    source: fx.Node
    user: fx.Node
    offset: Offset


@dataclass(slots=True)
class Spread:
    """All that a scale and a shift come to, in the order of the graph."""

    values: dict[fx.Node, Offset] = field(default_factory=dict)
    addends: list[Addend] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


def spread(
    node: fx.Node, channels: Channels, order: dict[fx.Node, int], *, shifted: bool
) -> Spread:
    """Walks from a value S * x + T to all that is made of it.

    Args:
        node: the value.
        channels: of its numbers.
        order: of the nodes that are computed from inputs.
        shifted: whether T is not zero.
    """
    found = Spread({node: Offset(channels, shifted)})
    pending = [(order[user], user) for user in node.users]
    heapq.heapify(pending)
    last = None
    while pending:
        _, user = heapq.heappop(pending)
        if user is last:  # it reads several of the values
            continue
        last = user
        sources = [source for source in user.all_input_nodes if source in found.values]
        made = _sum(found, user)
        if made is None and len(sources) == 1:
            made = _moved(found.values[sources[0]], sources[0], user)
        if made is None:
            found.reads += [Read(source, user, found.values[source]) for source in sources]
            continue
        found.values[user] = made
        for following in user.users:
            heapq.heappush(pending, (order[following], following))
    return found


def _moved(offset: Offset, source: fx.Node, user: fx.Node) -> Offset | None:
    if user.op != "call_function":
        return None
    channels = offset.channels.through(source, user, shifted=offset.shifted)
    return None if channels is None else Offset(channels, offset.shifted)


def is_sum(node: fx.Node) -> bool:
    """Whether a node is a plain sum of two tensors like it."""
    if not g.is_call(node, aten.add.Tensor) or g.arguments(node)["alpha"] != 1:
        return False
    terms = node.args[:2]
    return terms[0] is not terms[1] and all(
        isinstance(term, fx.Node)
        and str(g.shape(term)) == str(g.shape(node))
        and g.dtype(term) == g.dtype(node)
        for term in terms
    )


def _sum(found: Spread, node: fx.Node) -> Offset | None:
    """What a sum is, with its addend noted; None if it is of another form."""
    if not is_sum(node):
        return None
    a, b = node.args[:2]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    first, second = found.values.get(a), found.values.get(b)
    if first is not None and second is not None:
        same = torch.equal(first.channels.labels, second.channels.labels)
        if not same or (first.shifted and second.shifted):
            return None
        return Offset(first.channels, first.shifted or second.shifted)
    held, addend = (first, b) if first is not None else (second, a)
    assert held is not None
    found.addends.append(Addend(node, addend, held))
    return Offset(held.channels, shifted=False)
