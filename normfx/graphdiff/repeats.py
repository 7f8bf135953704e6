"""Repeats: rows of a comparison that are one block many times over.

A block is repeated where its operators, literals, dtypes, shapes, verdicts and module paths (up to
the numbers in them) are the same, each copy reads the copy before it at the place where that read
the one before, and what else is read is the same for all or an input of the same path. Copies then
differ in their inputs, which are weights or made from weights in one way, and in nothing else. What
the first copy reads from before the block may be anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from normfx.graphdiff.alignment import Alignment, Row
from normfx.graphdiff.snapshot import Node, Ref
from normfx.record import Site

# A collapsed block is announced on a line of its own: shorter ones would not get shorter.
_SHORTEST = 4
# How many places of the same row are tried as the next copy: a layer has fewer equal operators.
_TRIED = 24


@dataclass(frozen=True, slots=True)
class Segment:
    """Some rows, and how often they are repeated from there on.

    Attributes:
        start: the first row.
        length: how many rows one copy has.
        copies: how many copies follow each other; 1: no repeat.
    """

    start: int
    length: int
    copies: int = 1


def segments(alignment: Alignment, rows: Sequence[Row], bodies: Mapping[str, Any]) -> list[Segment]:
    """The rows, cut into repeated blocks and what is between them.

    Args:
        alignment: the comparison.
        rows: those of it that are shown.
        bodies: what tells the bodies of operators apart, by their names.
    """
    return _Repeats(alignment, rows, bodies).run()


def starred(path: str) -> str:
    """A module path without the numbers of layers: `h.*.norm`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def verdict(site: Site) -> tuple[Any, ...]:
    """What was decided for a norm, without where it stands."""
    decisions = tuple((r.rule, r.changed, r.code) for r in site.records)
    return site.kind, site.eps, site.dtype, decisions


class _Weight(NamedTuple):
    """Inputs of one path up to the numbers of layers, or what is computed alike from such."""

    number: int


class _Repeats:
    def __init__(
        self, alignment: Alignment, rows: Sequence[Row], bodies: Mapping[str, Any]
    ) -> None:
        self.rows, self.bodies = rows, bodies
        self.names = (alignment.old_names, alignment.new_names)
        # by name: where a value stands, or what an input is and what is made from such alone
        self.at: tuple[dict[str, Any], ...] = ({}, {})
        weights: dict[Any, _Weight] = {}
        for row in alignment.rows:
            for side, names, at in zip(_SIDES, self.names, self.at, strict=True):
                node = side(row)
                if node is not None and self._is_weight(node, names, at):
                    key = self._side(node, names, at)
                    at[names[node.uid]] = weights.setdefault(key, _Weight(len(weights)))
                elif node is not None and node.op == "input":
                    at.setdefault(names[node.uid], -1 - len(at))  # before all rows
                elif node is not None and node.op not in ("call", "output"):
                    at[names[node.uid]] = self._name(node)
        for i, row in enumerate(rows):
            for side, names, at in zip(_SIDES, self.names, self.at, strict=True):
                node = side(row)
                if node is not None and node.op == "call":
                    at.setdefault(names[node.uid], i)
        numbers: dict[Any, int] = {}
        self.tokens = [numbers.setdefault(self._token(row), len(numbers)) for row in rows]
        self.reads = [self._reads(row) for row in rows]
        self.next: list[int] = [0] * len(rows)  # the next row with the same token
        seen: dict[int, int] = {}
        for i in range(len(rows) - 1, -1, -1):
            self.next[i] = seen.get(self.tokens[i], len(rows))
            seen[self.tokens[i]] = i

    def run(self) -> list[Segment]:
        found: list[Segment] = []
        i = plain = 0
        while i < len(self.rows):
            best = self._best(i)
            if best is None:
                i += 1
                continue
            if best.start > plain:
                found.append(Segment(plain, best.start - plain))
            found.append(best)
            i = plain = best.start + best.length * best.copies
        if plain < len(self.rows):
            found.append(Segment(plain, len(self.rows) - plain))
        return found

    def _best(self, i: int) -> Segment | None:
        """The repeat from about this row on that covers the most rows."""
        best: Segment | None = None
        j = self.next[i]
        for _ in range(_TRIED):
            if j >= len(self.rows):
                break
            found = self._repeat(i, j - i) if j - i >= _SHORTEST else None
            if found is not None and (best is None or _covers(found) > _covers(best)):
                best = found
            j = self.next[j]
        return best

    def _repeat(self, start: int, period: int) -> Segment | None:
        """The repeat of this period, begun where the number of a module changes if one does."""
        equal = self._equal(start, period)
        for at in range(start, start + equal % period + 1):
            if equal >= period and _is_border(self.rows, at):
                copies = self._equal(at, period) // period + 1
                if copies > 1:
                    return Segment(at, period, copies)
        return Segment(start, period, equal // period + 1) if equal >= period else None

    def _equal(self, start: int, period: int) -> int:
        """How many rows from here on are like the one a period later."""
        i = start
        while (
            i + period < len(self.rows)
            and self.tokens[i] == self.tokens[i + period]
            and self._follows(start, i, period)
        ):
            i += 1
        return i - start

    def _follows(self, start: int, i: int, period: int) -> bool:
        """Whether a row reads what its counterpart in the next copy reads, one copy before."""
        for here, there in zip(self.reads[i], self.reads[i + period], strict=True):
            if here == there or there - here == period:
                continue
            # the first copy reads from before the block what the others read from the copy before
            if i < start + period and here < start and start <= there < start + period:
                continue
            return False
        return True

    def _token(self, row: Row) -> Any:
        """What rows of two copies have in common; values are told apart by `_reads`."""
        return tuple(
            self._side(side(row), names, at)
            for side, names, at in zip(_SIDES, self.names, self.at, strict=True)
        )

    def _side(self, node: Node | None, names: dict[int, str], at: dict[str, Any]) -> Any:
        if node is None:
            return None

        def shown(argument: Any) -> Any:
            if isinstance(argument, Ref):
                place = at.get(names[argument.uid], names[argument.uid])
                return Ref if isinstance(place, int) else place
            return tuple(map(shown, argument)) if isinstance(argument, tuple) else argument

        site = None if node.site is None else verdict(node.site)
        arguments = tuple((name, shown(a)) for name, a in node.arguments)
        return node.op, self._name(node), arguments, node.value, starred(node.module), site

    def _is_weight(self, node: Node, names: dict[int, str], at: dict[str, Any]) -> bool:
        operands = node.operands()
        if node.op != "call" or not operands:
            return node.is_state or (node.op == "input" and bool(node.rule))
        return all(isinstance(at.get(names[uid]), _Weight) for uid in operands)

    def _name(self, node: Node) -> Any:
        return self.bodies.get(node.operator, starred(node.operator))

    def _reads(self, row: Row) -> list[int]:
        """The rows of the values that a row reads."""
        places = [
            at.get(names[uid])
            for side, names, at in zip(_SIDES, self.names, self.at, strict=True)
            if (node := side(row)) is not None
            for uid in node.operands()
        ]
        return [place for place in places if isinstance(place, int)]


def _covers(segment: Segment) -> int:
    return segment.length * segment.copies


def _is_border(rows: Sequence[Row], i: int) -> bool:
    """Whether the module's number changes from the row before to this one."""
    return i == 0 or _numbers(rows[i]) != _numbers(rows[i - 1])


def _numbers(row: Row) -> list[str]:
    node = row.after or row.before
    assert node is not None
    return [part for part in node.module.split(".") if part.isdigit()]


_SIDES = (lambda row: row.before, lambda row: row.after)
