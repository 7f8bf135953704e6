"""Table: a `Verification` as text."""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from normfx.reports import line
from normfx.verification.result import GraphResult, Verification, number

_COLUMNS = ("stage", "inputs", "verdict", "ulp", "eager", "relative", "float64", "worst tensor")
_MOST_SITES = 12


def render(verification: Verification) -> str:
    """The text that `print` shows."""
    in_terminal = sys.stdout.isatty()
    console = Console(
        file=io.StringIO(),
        width=None if in_terminal else 120,
        force_terminal=in_terminal,
        highlight=False,
        color_system="auto" if in_terminal else None,
    )
    if not verification.graphs:
        console.print("dynamo made no graph of this model: there is nothing to verify.")
    for graph in verification.graphs:
        _graph(console, graph)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip() + "\n"


def _graph(console: Console, graph: GraphResult) -> None:
    calls = f", {graph.calls} calls" if graph.calls != 1 else ""
    training = " (training)" if graph.training else ""
    console.print(Text(f"{graph.name}{training}: {graph.norms} norms{calls}", style="bold"))
    if graph.fallback:
        console.print(Text(f"  left to Inductor: {graph.fallback}"))
        return
    table = _table(*_COLUMNS)
    for found in graph.stages:
        m = found.measured
        row = [found.stage, found.variant, found.verdict]
        if m is None:
            row += ["-"] * 4 + [found.detail]
        else:
            row += [number(m.ulp), number(m.eager_ulp), number(m.relative), number(m.meaning)]
            row.append(m.problem or m.tensor)
        style = "bold red" if found.verdict == "violation" else ""
        table.add_row(*(Text(cell, style=style) for cell in row))
    console.print(table)
    _sites(console, graph)
    if graph.approximate:
        console.print(Text(f"approximate, as asked for: {', '.join(graph.approximate)}"))
    if graph.blamed is not None:
        blamed = graph.blamed
        where = f" at {blamed.site} ({line(blamed.location)})" if blamed.site else ""
        console.print(
            Text(f"violation: {blamed.rule}{where}, stage {blamed.stage}", style="bold red")
        )
        console.print(Text(f"  inputs: {blamed.variant}. {blamed.detail}"))
        if blamed.skip:
            console.print(Text(f'  Without it: options={{"skip": ["{blamed.skip}"]}}'))
    console.print()


def _sites(console: Console, graph: GraphResult) -> None:
    """The norms, worst first, after the last stage that has a value to compare."""
    last = {found.site: found for found in graph.sites}
    if not last:
        return
    worst = sorted(last.values(), key=lambda found: -found.ulp)
    table = _table("site", "after", "at", "ulp", "eager", "relative")
    for found in worst[:_MOST_SITES]:
        cells = [found.site, found.stage, found.at]
        cells += [number(found.ulp), number(found.eager_ulp), number(found.relative)]
        table.add_row(*map(Text, cells))
    console.print()
    console.print(table)
    if len(worst) > _MOST_SITES:
        console.print(Text(f"and {len(worst) - _MOST_SITES} more, each with a smaller error"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
