"""Alignment: two stages side by side, so that what did not change stands in one row.

Matched nodes that keep their order stand beside each other (the longest such sequence); between
them, what is gone comes before what is new. A matched node that moved appears in both ways.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normfx.graphdiff.matching import match
from normfx.graphdiff.printer import Names, lines
from normfx.graphdiff.snapshot import Node, Ref, Snapshot


@dataclass(frozen=True, slots=True)
class Row:
    """One line of two stages beside each other.

    Attributes:
        before: the node in the earlier stage, or None.
        after: the node in the later stage, or None.
        old: its line there, or "".
        new: its line there, or "".
    """

    before: Node | None
    after: Node | None
    old: str
    new: str

    @property
    def changed(self) -> bool:
        """Whether the two stages differ here."""
        return self.old != self.new


@dataclass(frozen=True, slots=True)
class Alignment:
    """Two stages beside each other.

    Attributes:
        rows: in order.
        old_names: of the nodes of the earlier stage, by number.
        new_names: of those of the later stage; what is only there has an `n` in front.
        partners: the numbers of nodes of the later stage with those of the earlier.
        twins: nodes that are left out, as they are gone and another computes the same: the number
            of each with that of the other.
    """

    rows: tuple[Row, ...]
    old_names: dict[int, str]
    new_names: dict[int, str]
    partners: dict[int, int]
    twins: Mapping[int, int]


def align(before: Snapshot, after: Snapshot, *, merge: bool = False) -> Alignment:
    """Two stages of one graph beside each other.

    Args:
        before: the earlier stage.
        after: the later stage.
        merge: whether a node that is gone, as another computes the same, is left out and has the
            name of the other.
    """
    partners = match(before, after)
    old_names = Names(before.nodes)
    twins = _twins(before, set(partners.values())) if merge else {}
    old_names.of.update((gone, old_names.of[left]) for gone, left in twins.items())
    given = {new: old_names.of[old] for new, old in partners.items() if old in old_names.of}
    new_names = Names(after.nodes, given, prefix="n")
    old, new = lines(before.nodes, old_names), lines(after.nodes, new_names)
    at = {node.uid: i for i, node in enumerate(before.nodes)}
    pairs = [
        (at[partners[node.uid]], j) for j, node in enumerate(after.nodes) if node.uid in partners
    ]
    rows: list[Row] = []
    i = j = 0
    for p, q in [*increasing(pairs), (len(before.nodes), len(after.nodes))]:
        rows += [Row(n, None, old[n.uid], "") for n in before.nodes[i:p] if n.uid not in twins]
        rows += [Row(None, n, "", new[n.uid]) for n in after.nodes[j:q]]
        if p < len(before.nodes):
            a, b = before.nodes[p], after.nodes[q]
            rows.append(Row(a, b, old[a.uid], new[b.uid]))
        i, j = p + 1, q + 1
    return Alignment(tuple(rows), old_names.of, new_names.of, partners, twins)


def _twins(before: Snapshot, kept: set[int]) -> dict[int, int]:
    """Nodes that are gone, with a node that is kept and computes the same."""
    twins: dict[int, int] = {}
    first: dict[Hashable, int] = {}

    def named(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return Ref(twins.get(argument.uid, argument.uid))
        return tuple(map(named, argument)) if isinstance(argument, tuple) else argument

    for node in before.nodes:
        if node.op != "call":
            continue
        key = (node.operator, node.value, tuple((k, named(a)) for k, a in node.arguments))
        if node.uid in kept:
            first.setdefault(key, node.uid)
        elif key in first:
            twins[node.uid] = first[key]
    return twins


def increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part of these pairs, sorted by the second, whose first grows too."""
    tails: list[int] = []  # the smallest first number that ends a sequence of each length
    ends: list[int] = []  # which pair that is
    previous: list[int] = []
    for index, (first, _) in enumerate(pairs):
        length = bisect_left(tails, first)
        previous.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [first]
        ends[length : length + 1] = [index]
    found = []
    index = ends[-1] if ends else -1
    while index >= 0:
        found.append(pairs[index])
        index = previous[index]
    return found[::-1]
