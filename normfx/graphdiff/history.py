"""History: nodes followed through all stages of a graph, each under one name.

What one stage made of a node has the name of that node, so that any two stages can stand side by
side; what is new in a stage gets a new name, beginning with `n`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from normfx.graphdiff.alignment import increasing
from normfx.graphdiff.matching import match
from normfx.graphdiff.printer import Names, lines
from normfx.graphdiff.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Stage:
    """A graph after a stage, as part of its history.

    Attributes:
        snapshot: the graph.
        values: for each of its nodes the number of the value, which is kept through the stages.
        lines: the line of each of its nodes.
    """

    snapshot: Snapshot
    values: tuple[int, ...]
    lines: tuple[str, ...]


def history(snapshots: Mapping[str, Snapshot]) -> list[Stage]:
    """The stages of a graph."""
    found: list[Stage] = []
    value: dict[int, int] = {}  # of the stage before, by node
    names: dict[int, str] = {}  # by value
    before: Snapshot | None = None
    for snapshot in snapshots.values():
        partners = {} if before is None else match(before, snapshot)
        now = {new: value[old] for new, old in partners.items()}
        fresh = [node for node in snapshot.nodes if node.uid not in partners]
        now.update((node.uid, len(names) + i) for i, node in enumerate(fresh))
        given = {uid: names[v] for uid, v in now.items() if v in names}
        made = Names(snapshot.nodes, given, prefix="v" if before is None else f"n{len(found)}.")
        for node in fresh:
            names[now[node.uid]] = made.of.get(node.uid, "return")
        text = lines(snapshot.nodes, made)
        found.append(
            Stage(
                snapshot,
                tuple(now[node.uid] for node in snapshot.nodes),
                tuple(text[node.uid] for node in snapshot.nodes),
            )
        )
        before, value = snapshot, now
    return found


def side_by_side(before: Stage, after: Stage) -> list[tuple[int, int]]:
    """The rows of two stages: places in each, or -1 where there is none."""
    at = {value: i for i, value in enumerate(before.values)}
    pairs = [(at[value], j) for j, value in enumerate(after.values) if value in at]
    rows: list[tuple[int, int]] = []
    i = j = 0
    for p, q in [*increasing(pairs), (len(before.values), len(after.values))]:
        rows += [(k, -1) for k in range(i, p)]
        rows += [(-1, k) for k in range(j, q)]
        if p < len(before.values):
            rows.append((p, q))
        i, j = p + 1, q + 1
    return rows
