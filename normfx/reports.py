"""Reports: the journals of compiled graphs, as a table and as JSON. They decide nothing."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfx import pages
from normfx.record import REFUSALS, Journal, NearMiss, Record, Refusal, Site


@dataclass(frozen=True, slots=True)
class Report:
    """What normfx did to the graphs of a model (or of a process).

    Attributes:
        graphs: one journal for each graph, in the order of compilation.
    """

    graphs: tuple[Journal, ...] = ()

    @property
    def sites(self) -> list[Site]:
        """Every normalization found, in the order of the graphs: one entry a call."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def near_misses(self) -> list[NearMiss]:
        """What looked like a normalization and is none, each with the first law that failed."""
        return [miss for graph in self.graphs for miss in graph.near_misses]

    @property
    def fallbacks(self) -> list[str]:
        """Why graphs were left to plain Inductor, if any were."""
        return [graph.fallback for graph in self.graphs if graph.fallback]

    def to_json(self) -> str:
        """The whole report as JSON text."""
        return json.dumps({"graphs": [payload(graph) for graph in self.graphs]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote, or that of the one journal that a trace holds.

        Raises:
            ValueError: the text is no JSON, or has a code that is not in the registry.
            KeyError, TypeError: it is JSON of something else.
        """
        held = json.loads(text)
        graphs = held["graphs"] if "graphs" in held else [held]
        return cls(tuple(_journal(graph) for graph in graphs))

    def to_html(self, path: str | Path) -> Path:
        """Writes one page that needs no network, and returns its path."""
        codes = {r.code for s in self.sites for r in s.records if r.code is not None}
        return pages.write(
            path,
            "report",
            report=self,
            columns=_COLUMNS,
            headline=_headline,
            rows=_rows,
            codes=sorted(codes, key=lambda code: code.value),
            refusals=REFUSALS,
        )

    def __str__(self) -> str:
        return _render(self)


class Reports:
    """The journals of this process. Safe under threads."""

    def __init__(self) -> None:
        self._journals: list[Journal] = []
        self._lock = threading.Lock()

    def add(self, journal: Journal) -> None:
        """Files a journal under the next graph number."""
        with self._lock:
            journal.name = f"graph {len(self._journals)}"
            self._journals.append(journal)

    def snapshot(self) -> Report:
        """The report of all graphs so far."""
        with self._lock:
            return Report(tuple(self._journals))

    def clear(self) -> None:
        """Forgets all journals."""
        with self._lock:
            self._journals.clear()


REPORTS = Reports()


def report() -> Report:
    """The `Report` of all graphs that normfx compiled in this process since the last `reset`."""
    return REPORTS.snapshot()


def reset() -> None:
    """Forgets the reports so far. Compiled code is not touched."""
    REPORTS.clear()


def recognised() -> int:
    """How many calls of normalizations on activations were recognised since the last `reset`."""
    return sum(not site.on_weight for site in report().sites)


def payload(journal: Journal) -> dict[str, Any]:
    """A journal as plain JSON values."""
    return {
        "name": journal.name,
        "nodes": journal.nodes,
        "training": journal.training,
        "fallback": journal.fallback,
        "hoisted_tensors": journal.hoisted,
        "hoisted_bytes": journal.folded_bytes,
        "stage_ms": {stage: round(1e3 * seconds, 3) for stage, seconds in journal.stages.items()},
        "sites": [_site(site) for site in journal.sites],
        "near_misses": [
            {
                "name": miss.name,
                "code": miss.code.value,
                "meaning": REFUSALS[miss.code].meaning,
                "location": miss.location,
                "node": miss.node,
            }
            for miss in journal.near_misses
        ],
    }


def _journal(held: dict[str, Any]) -> Journal:
    """The journal that `payload` made these values of."""
    return Journal(
        name=held["name"],
        sites=[_read_site(site) for site in held["sites"]],
        near_misses=[
            NearMiss(miss["name"], Refusal(miss["code"]), miss["location"], miss["node"])
            for miss in held["near_misses"]
        ],
        stages={stage: ms / 1e3 for stage, ms in held["stage_ms"].items()},
        nodes=held["nodes"],
        folded_bytes=held["hoisted_bytes"],
        hoisted=held["hoisted_tensors"],
        fallback=held["fallback"],
        training=held["training"],
    )


def _read_site(held: dict[str, Any]) -> Site:
    eps = held["eps"]
    return Site(
        name=held["name"],
        kind=held["kind"],
        dims=tuple(held["dims"]),
        eps=None if eps is None else float(eps),
        dtype=held["dtype"],
        location=held["location"],
        weight=held["weight"],
        bias=held["bias"],
        origin=held["origin"],
        on_weight=held["on_weight"],
        records=[_read_record(record) for record in held["records"]],
    )


def _read_record(held: dict[str, Any]) -> Record:
    return Record(
        held["stage"],
        held["rule"],
        held["verdict"] == "changed",
        None if held["code"] is None else Refusal(held["code"]),
        held["node"],
        held["location"],
        held["detail"],
    )


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "dims": list(site.dims),
        "eps": site.eps if site.eps is None or math.isfinite(site.eps) else str(site.eps),
        "dtype": site.dtype,
        "weight": site.weight,
        "bias": site.bias,
        "origin": site.origin,
        "on_weight": site.on_weight,
        "location": site.location,
        "actions": site.actions,
        "refusals": site.refusals,
        "records": [_record(record) for record in site.records],
    }


def _record(record: Record) -> dict[str, Any]:
    return {
        "stage": record.stage,
        "rule": record.rule,
        "verdict": "changed" if record.changed else "refused",
        "code": record.code.value if record.code else None,
        "node": record.node,
        "location": record.location,
        "detail": record.detail,
    }


# -- the table -----------------------------------------------------------------------------------

_COLUMNS = ("site", "kind", "dims", "eps", "dtype", "actions", "refused", "line")


def _render(shown: Report) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    in_terminal = sys.stdout.isatty()
    console = Console(
        file=io.StringIO(),
        width=None if in_terminal else 160,
        force_terminal=in_terminal,
        highlight=False,
        color_system="auto" if in_terminal else None,
    )
    if not shown.graphs:
        console.print("normfx compiled no graph since the last reset.")
    for graph in shown.graphs:
        console.print(Text(_headline(graph), style="bold"))
        if graph.fallback:
            console.print(Text(f"  left to Inductor: {graph.fallback}"))
        if graph.sites:
            table = Table(box=None, pad_edge=False, show_edge=False)
            for column in _COLUMNS:
                table.add_column(
                    column, overflow="fold", no_wrap=column in ("kind", "dims", "eps", "dtype")
                )
            for row in _rows(graph.sites):
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
        for miss in graph.near_misses:
            console.print(Text(f"near miss  {miss.code.value}  {miss.name}  {line(miss.location)}"))
            console.print(Text(f"           {REFUSALS[miss.code].meaning}"))
        console.print()
    codes = sorted({r.code.value for s in shown.sites for r in s.records if r.code})
    meanings = {code.value: entry for code, entry in REFUSALS.items()}
    for code in codes:
        console.print(Text(f"{code}: {meanings[code].meaning} {meanings[code].hint}"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip() + "\n"


def _headline(graph: Journal) -> str:
    folded = sum(bool(site.actions) for site in graph.sites)
    parts = [
        f"{len(graph.sites)} norms found",
        f"{folded} rewritten",
        f"{len(graph.near_misses)} near misses",
    ]
    if graph.hoisted:
        parts.append(f"{graph.hoisted} tensors hoisted ({graph.folded_bytes / 2**20:.1f} MiB)")
    return f"{graph.name}{' (training)' if graph.training else ''}: {', '.join(parts)}"


def _rows(sites: Iterable[Site]) -> Iterable[tuple[str, ...]]:
    for site in sites:
        dims = ",".join(map(str, site.dims)) or "-"
        eps = "tensor" if site.eps is None else f"{site.eps:g}"
        refused = ", ".join(dict.fromkeys(site.refusals)) or "-"
        actions = ", ".join(dict.fromkeys(site.actions)) or "-"
        yield site.name, site.kind, dims, eps, site.dtype, actions, refused, line(site.location)


def line(location: str) -> str:
    """The last two parts of a path, which is what tells one file from another."""
    return "/".join(location.replace("\\", "/").split("/")[-2:])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def meanings(codes: Iterable[Refusal]) -> list[str]:
    """One line for each code."""
    found = sorted(set(codes), key=lambda code: code.value)
    return [f"{code.value}: {REFUSALS[code].meaning} {REFUSALS[code].hint}" for code in found]
