"""The page: all stages of all graphs in one file that needs no network.

The data stands in the page as JSON, with strings and nodes that are equal written once. Jinja2
escapes it, and the script puts it into the page as text only, so that what a model calls its
modules cannot become markup.
"""

from __future__ import annotations

from collections.abc import Hashable
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from normfx.graph import user_frames
from normfx.graphdiff.history import Stage, history, side_by_side
from normfx.graphdiff.neighbourhood import drawings
from normfx.graphdiff.run import Recorded
from normfx.graphdiff.sites import sites_of
from normfx.passes import RULES
from normfx.record import REFUSALS, Site


def page(graphs: tuple[Recorded, ...]) -> str:
    """The page of these graphs."""
    files = resources.files("normfx.graphdiff") / "page"
    style, script, template = (
        (files / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js", "page.html.jinja")
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        data=payload(graphs), style=Markup(style), script=Markup(script)
    )


def payload(graphs: tuple[Recorded, ...]) -> dict[str, Any]:
    """What the page shows, as plain values."""
    return {
        "graphs": [_graph(recorded) for recorded in graphs],
        "rules": {
            name: {
                "effect": rule.effect,
                "identity": rule.identity,
                "source": rule.source,
                "exactness": rule.exactness.name,
                "promise": rule.exactness.value,
            }
            for name, rule in RULES.items()
        },
        "refusals": {
            code.value: {"meaning": entry.meaning, "hint": entry.hint}
            for code, entry in REFUSALS.items()
        },
    }


class _Table:
    """Values that are written once, and referred to by their place."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._places: dict[Hashable, int] = {}

    def place(self, key: Hashable, row: Any) -> int:
        if key not in self._places:
            self._places[key] = len(self.rows)
            self.rows.append(row)
        return self._places[key]


def _graph(recorded: Recorded) -> dict[str, Any]:
    journal = recorded.journal
    stages = history(recorded.snapshots)
    sites = sites_of(recorded.snapshots)
    mine = {id(site) for site in sites.values()}
    listed = [site for site in journal.sites if id(site) in mine]
    number = {id(site): i for i, site in enumerate(listed)}
    nodes, sources = _Table(), _Table()

    shown: list[dict[str, Any]] = []
    for stage in stages:
        of = {n.uid: v for n, v in zip(stage.snapshot.nodes, stage.values, strict=True)}
        cost = stage.snapshot.cost
        places = []
        for node, line, value in zip(stage.snapshot.nodes, stage.lines, stage.values, strict=True):
            site = number.get(id(sites.get(node.uid)), -1)
            read = [of[uid] for uid in node.operands()]
            source = sources.place(node.trace, node.trace)
            made = [line, value, node.module, node.rule, site, source, read, node.op]
            places.append(nodes.place((id(node), line), made))
        name = stage.snapshot.stage
        shown.append(
            {
                "name": name,
                "seconds": 0.0 if recorded.is_body else round(journal.stages.get(name, 0.0), 6),
                "nodes": places,
                "cost": None if cost is None else [cost.bytes, cost.kernels, cost.flops],
            }
        )
    return {
        "name": recorded.name,
        "training": journal.training,
        "fallback": journal.fallback,
        "hoisted": [journal.hoisted, journal.folded_bytes],
        "stages": shown,
        "nodes": nodes.rows,
        "sources": list(map(user_frames, sources.rows)),
        "rows": _rows(stages),
        "sites": [_site(site) for site in listed],
        "drawings": _drawings(stages, listed, sites),
        "misses": [[m.name, m.code.value, m.location] for m in journal.near_misses],
    }


def _rows(stages: list[Stage]) -> dict[str, list[int]]:
    """The rows of each stage beside the one before it, and beside the first."""
    pairs = {(max(i - 1, 0), i) for i in range(len(stages))} | {(0, i) for i in range(len(stages))}
    return {
        f"{i}-{j}": [place for row in side_by_side(stages[i], stages[j]) for place in row]
        for i, j in sorted(pairs)
    }


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "eps": None if site.eps is None else repr(site.eps),
        "dtype": site.dtype,
        "origin": site.origin,
        "location": site.location,
        "records": [
            [r.stage, r.rule, r.changed, r.code.value if r.code else "", r.detail, r.location]
            for r in site.records
        ],
    }


def _drawings(
    stages: list[Stage], listed: list[Site], sites: dict[int, Site]
) -> list[list[dict[str, Any] | None]]:
    """The neighbourhood of each norm in the first stage and in the last."""
    if not stages:
        return []
    ends = [drawings(stages[at].snapshot, sites) for at in (0, -1)]
    return [[end.get(id(site)) for end in ends] for site in listed]
