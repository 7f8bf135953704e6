"""Scale-blindness: which factors of a value no result of the graph sees.

    norm(c * x) = norm(x)   for c > 0, constant over what the statistics are taken over, as eps -> 0

A backward analysis. For each value it finds the finest partition (`blocks.py`) whose blocks may be
multiplied by a positive factor each, for all other values as they are. A norm is blind to factors
of what it reads; an operator h with h(c*x) = c^k * h(x) is as blind as its own readers; everything
else sees the factor, and so do the results of the graph. Of several readers, all must be blind.

A summand beside x is scaled relative to it: c*x + b = c*(x + b) + (1 - c)*b. That is unseen only
where the readers are blind to what is added too, as a norm is that subtracts the mean over it: a
bias before BatchNorm is dead, one before LayerNorm is not. So the analysis carries a second
partition, of the constants whose addition no result sees. A value to whose every number anything
may be added is dead.

Each use of a value is judged with all else as it is. So it holds for every gradient too (Euler): if
factors of a block w of a value are not seen, then <w, dL/dw> = 0, whatever paths are detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from normfx import graph as g
from normfx.analyses.blind import Blind, Use, uses
from normfx.analyses.partition import Partition
from normfx.analyses.scale_laws import LAWS, SPLITS
from normfx.laws import EXACT_DTYPES
from normfx.ops import norm


def scale_blindness(graph: fx.Graph) -> dict[fx.Node, Blind]:
    """What no result sees of each tensor of a graph with canonical nodes.

    Args:
        graph: not changed. Its norms are recognised with gradients on: a detached statistic is none
            of a norm then.
    """
    found: dict[fx.Node, Blind] = {}
    written = g.written_storages(graph)
    for node in reversed(graph.nodes):
        shape = g.shape(node)
        if shape is None:
            continue
        rank = len(shape)
        if g.storage(node) is None or g.storage(node) in written or _is_empty(shape):
            found[node] = Blind.nothing(rank)
            continue
        blind = Blind.unread(rank)
        for use in uses(node, found):
            blind = blind.join(_read(use))
        if blind.is_dead(shape):
            blind = Blind(Partition.each(rank), blind.shift, blind.norms)
        found[node] = blind
    return found


def _read(use: Use) -> Blind:
    """What one occurrence of a value lets through of what the operator's readers do not see."""
    if g.is_pure(use.user) and use.user in use.found and use.out.is_dead(use.made):
        return use.unread()
    packet = norm if use.user.target is norm else g.packet(use.user)
    law = LAWS.get(packet, {}).get(use.name)
    if law is None:
        return use.nothing()
    if law is Use.unread:
        return law(use)
    # a split has several results
    read = [use.source] if packet in SPLITS else [use.source, use.user]
    return law(use) if all(g.dtype(node) in EXACT_DTYPES for node in read) else use.nothing()


def _is_empty(shape: Sequence[Any]) -> bool:
    return any(isinstance(size, int) and size == 0 for size in shape)
