"""The unified diff of two stages of a graph, with the verdict of each norm where it changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from normfx.graphdiff.alignment import Row, align
from normfx.graphdiff.repeats import Segment, segments, starred
from normfx.graphdiff.run import Recorded
from normfx.graphdiff.sites import sentence, sites_of
from normfx.record import NearMiss, Site


def unified(
    recorded: Recorded,
    before: str,
    after: str,
    *,
    context: int,
    expand: bool,
    bodies: Mapping[str, Any],
) -> tuple[list[str], set[int]]:
    """The lines of the comparison of two stages, without a heading; the `id` of sites they name.

    Args:
        recorded: the graph.
        before: the earlier stage.
        after: the later stage.
        context: how many lines around a change are shown.
        expand: whether repeated blocks are written out, and all else that is shortened otherwise:
            what a norm is spelled in, further inputs, unchanged lines that nothing connects with
            a change, and nodes that are gone, as others compute the same.
        bodies: what tells the bodies of operators in it apart, by their names.
    """
    alignment = align(recorded.snapshots[before], recorded.snapshots[after], merge=not expand)
    sites = sites_of(recorded.snapshots)
    if expand:
        writer = _Writer(alignment.rows, sites, context, shorten=False)
        writer.write(Segment(0, len(alignment.rows)))
        return writer.lines, writer.named
    made = [row for row in alignment.rows if _is_new_input(row)]
    shared = set(alignment.twins.values())  # they are of no layer: all read them
    rows = [
        row
        for row in alignment.rows
        if not _is_new_input(row) and (row.changed or not shared & _made(row))
    ]
    writer = _Writer(rows, sites, context, shorten=True)
    if made:
        writer.lines.append(f"# {len(made)} more inputs, made from parameters when these change")
    if gone := len(alignment.twins):
        writer.lines.append(f"# {gone} nodes gone that compute what others do")
    for part in segments(alignment, rows, bodies):
        writer.write(part)
    return writer.lines, writer.named


# The lines of a norm that are shown where they are collapsed: first, how many, last.
_PARTS = 3


class _Writer:
    """Collects the lines, and which norms were named."""

    def __init__(
        self, rows: Sequence[Row], sites: Mapping[int, Site], context: int, *, shorten: bool
    ) -> None:
        self.rows, self.sites, self.context, self.shorten = rows, sites, context, shorten
        self.lines: list[str] = []
        self.named: set[int] = set()
        # how many lines of each stage stand before a row
        self.before = _running(row.before is not None for row in self.rows)
        self.after = _running(row.after is not None for row in self.rows)

    def write(self, part: Segment) -> None:
        for start, stop in self._hunks(part):
            if self.shorten:
                start, stop = self._connected(start, stop)
            hunk = self.rows[start:stop]
            old, new = self.before[start], self.after[start]
            sizes = f"-{old + 1},{self.before[stop] - old} +{new + 1},{self.after[stop] - new}"
            where = " ".join(filter(None, [_where(hunk), self._times(part)]))
            self.lines.append(f"@@ {sizes} @@ {where}".rstrip())
            self.lines += [f"# {_name(s)}: {sentence(s)}" for s in self._sites(hunk)]
            self.lines += self._marked(hunk)
        copies = self.rows[part.start : part.start + part.length * part.copies]
        self.named |= {id(site) for site in self._sites(copies)}

    def _hunks(self, part: Segment) -> Iterator[tuple[int, int]]:
        """The changed rows of a part (of its first copy), with those around them."""
        first, last = part.start, part.start + part.length
        start = stop = -1
        for i in range(first, last):
            if not self.rows[i].changed:
                continue
            if stop < 0:
                start = max(first, i - self.context)
            elif i - self.context > stop:
                yield start, stop
                start = i - self.context
            stop = min(last, i + self.context + 1)
        if stop >= 0:
            yield start, stop

    def _connected(self, start: int, stop: int) -> tuple[int, int]:
        """A hunk without the lines at its ends that neither read a changed line nor are read."""
        changed = [row for row in self.rows[start:stop] if row.changed]
        made = {uid for row in changed for uid in _made(row)}
        read = {uid for row in changed for uid in _read(row)}

        def idle(row: Row) -> bool:
            node = row.after or row.before
            is_call = node is not None and node.op == "call"
            return not row.changed and not (is_call and (read & _made(row) or made & _read(row)))

        while idle(self.rows[start]):
            start += 1
        while idle(self.rows[stop - 1]):
            stop -= 1
        return start, stop

    def _times(self, part: Segment) -> str:
        if part.copies == 1:
            return ""
        last = part.start + part.length * (part.copies - 1)
        ends = [_path(self.rows[at : at + part.length]) for at in (part.start, last)]
        span = f": {ends[0]} to {ends[1]}" if all(ends) and ends[0] != ends[1] else ""
        return f"(x{part.copies}{span}, differing only in weights)"

    def _marked(self, hunk: Sequence[Row]) -> Iterator[str]:
        """The rows as lines with a sign; in a run of changes what is gone comes first."""
        gone: list[tuple[str, Site | None]] = []
        new: list[tuple[str, Site | None]] = []
        for row in hunk:
            if row.changed:
                for sign, node, text, run in (
                    ("-", row.before, row.old, gone),
                    ("+", row.after, row.new, new),
                ):
                    if node is not None:
                        run.append((sign + text, self.sites.get(node.uid)))
                continue
            yield from (*self._shortened(gone), *self._shortened(new), f" {row.new}")
            gone, new = [], []
        yield from (*self._shortened(gone), *self._shortened(new))

    def _shortened(self, run: list[tuple[str, Site | None]]) -> Iterator[str]:
        """The lines of a run; of a norm's many parts the first and the last."""
        for _, group in groupby(run, key=lambda pair: id(pair[1])):
            part = list(group)
            if not self.shorten or part[0][1] is None or len(part) <= _PARTS:
                yield from (text for text, _ in part)
                continue
            yield part[0][0]
            yield f"{part[0][0][0]}  ... {len(part) - 2} nodes more"
            yield part[-1][0]

    def _sites(self, hunk: Sequence[Row]) -> list[Site]:
        found: dict[int, Site] = {}
        for row in hunk:
            for node in (row.before, row.after) if row.changed else ():
                site = None if node is None else self.sites.get(node.uid)
                if site is not None:
                    found.setdefault(id(site), site)
        return list(found.values())


def _made(row: Row) -> set[int]:
    return {node.uid for node in (row.before, row.after) if node is not None}


def _read(row: Row) -> set[int]:
    return {uid for node in (row.before, row.after) if node is not None for uid in node.operands()}


def _is_new_input(row: Row) -> bool:
    return row.before is None and row.after is not None and row.after.op == "input"


def _running(flags: Iterable[bool]) -> list[int]:
    sums = [0]
    for flag in flags:
        sums.append(sums[-1] + flag)
    return sums


def _where(hunk: Sequence[Row]) -> str:
    return _path([row for row in hunk if row.changed])


def _path(rows: Sequence[Row]) -> str:
    """The module that all of these rows are of, as far as they have one."""
    paths = [n.module.split(".") for row in rows if (n := row.after or row.before) and n.module]
    common: list[str] = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return ".".join(common)


def _name(site: Site) -> str:
    return f"{site.name} ({site.kind})" if site.name else site.kind


def others(sites: Iterable[Site], misses: Iterable[NearMiss]) -> list[str]:
    """Lines for norms that nothing changed for, and for what is none; those alike together."""
    said = [f"{starred(site.name)} ({site.kind})|: {sentence(site)}" for site in sites]
    said += [f"{starred(miss.name)} is no norm|: {miss.code.value}" for miss in misses]
    return [
        "# " + line.replace("|", f" x{count}" if count > 1 else "", 1)
        for line, count in Counter(said).items()
    ]
