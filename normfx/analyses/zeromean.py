"""Zero mean: which values have mean zero, block by block, once constants are centred.

    mean((V - 1 mean(V)) x + c - mean(c)) = 0,     mean(a + b) = mean(a) + mean(b)

A forward analysis, after `meanblind`: a constant may be centred where it is read if nobody sees
that. A value is zero in a block if what it is made from is, by the laws of `carried`, and it says
which constants have to be centred for that. Everything else has some mean. So has the result of a
LayerNorm without affine part, as rounded: of a row with a large mean some is left, which the next
LayerNorm takes away (tests/passes/test_norm_of_norm.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks
from normfx.analyses.carried import Use
from normfx.analyses.meanblind import MeanBlind, blind_rows
from normfx.ops import norm


@dataclass(frozen=True, slots=True)
class Zero:
    """Blocks of mean zero.

    Attributes:
        blocks: of the value.
        uses: the places where constants have to be centred, in the blocks they are blind in.
        values: the values that have to be centred in the graph.
    """

    blocks: Blocks
    uses: frozenset[Use] = frozenset()
    values: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a value has a mean.

    Attributes:
        node: the guilty node.
        sees: whether it reads a mean that could go otherwise; else it makes one.
    """

    node: fx.Node
    sees: bool


# Under this name a node says in which blocks its mean was taken from it.
CENTRED = "normfx_centred"

_ZEROS = frozenset({torch.ops.aten.zeros, torch.ops.aten.zeros_like, torch.ops.aten.new_zeros})


class ZeroMean:
    """Which blocks of each value have mean zero.

    Args:
        graph: with canonical nodes; not changed.
        blind: of that graph.
        in_graph: whether a value that nothing can be centred behind may itself be centred, if all
            who read it are blind to that.

    Attributes:
        values: of each value that has such blocks, possibly.
        reasons: of each value that has none, and of those that have too few.
    """

    def __init__(self, graph: fx.Graph, blind: MeanBlind, *, in_graph: bool = False) -> None:
        self._blind, self._in_graph = blind, in_graph
        self.values: dict[fx.Node, Zero] = {}
        self.reasons: dict[fx.Node, Reason] = {}
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if g.packet(node) in _ZEROS and g.shape(node) is not None:
            self.values[node] = Zero(Blocks.singles(len(g.shape(node) or ())))
            return
        if CENTRED in node.meta:
            self.values[node] = Zero(node.meta[CENTRED])
            return
        law = self._blind.laws.get(node)
        if law is None:
            self._has_mean(node, Reason(node, sees=False))
            return
        parts = [self.at(use) for use in law[1]]
        blocks = law[0].forth([part.blocks if isinstance(part, Zero) else None for part in parts])
        reason = next((part for part in parts if isinstance(part, Reason)), None)
        if reason is None:
            reason = next((self.reasons[u.value] for u in law[1] if u.value in self.reasons), None)
        if blocks is None or blocks.is_none():
            self._has_mean(node, reason or Reason(node, sees=False))
            return
        if reason is not None:
            self.reasons[node] = reason
        known = [part for part in parts if isinstance(part, Zero)]
        uses = frozenset[Use]().union(*(part.uses for part in known))
        values = frozenset[fx.Node]().union(*(part.values for part in known))
        self.values[node] = Zero(blocks, uses, values)

    def _has_mean(self, node: fx.Node, reason: Reason) -> None:
        self.reasons[node] = reason
        blind = self._blind.of(node) if self._in_graph else None
        if blind is not None and blind.row() is not None and node not in self._blind.constant:
            self.values[node] = Zero(blind, values=frozenset({node}))

    def at(self, use: Use) -> Zero | Reason:
        """What is known of a value where it is read."""
        value: Any = use.value
        found = self.values.get(value) if use.scale is None else None
        blind = self._blind.uses.get(use)
        shape = g.shape(value) or ()
        if blind is not None and not blind.is_none():
            if found is not None and found.blocks.covers(blind, shape):
                return found
            return Zero(blind, frozenset({use}))
        if found is not None:
            return found
        if value in self._blind.constant and use in self._blind.seen_by:
            guilty = self._blind.seen_by[use]
            return Reason(guilty, sees=guilty is not use.reader)
        return self.reasons.get(value, Reason(value, sees=False))


def is_zero(zero: ZeroMean, node: fx.Node) -> Zero | Reason:
    """Whether a norm's x has mean zero in every row that the norm takes the mean from."""
    rows, x = blind_rows(node), node.args[0]
    assert g.is_call(node, norm)
    assert isinstance(x, fx.Node)
    found = zero.at(Use(node, (0,)))
    if rows is None or isinstance(found, Reason):
        return found if isinstance(found, Reason) else Reason(node, sees=True)
    if found.blocks.covers(rows, g.shape(x) or ()):
        return found
    return zero.reasons.get(x, Reason(node, sees=True))
