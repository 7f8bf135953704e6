"""The result of `normfx.diff`: the graphs of a model after every stage, to read and compare."""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from normfx.errors import OptionError
from normfx.graphdiff.printer import graph_text
from normfx.graphdiff.repeats import starred
from normfx.graphdiff.run import Recorded, record
from normfx.graphdiff.snapshot import Snapshot
from normfx.graphdiff.unified import others, unified
from normfx.record import Site


@dataclass(frozen=True, slots=True)
class StageSummary:
    """What a stage did to a graph.

    Attributes:
        graph: the name of the graph.
        stage: the name of the stage.
        nodes: how many the graph has after it.
        seconds: what the stage took; of a body 0.0, since it runs inside of a stage.
        delta: how many calls of each operator there are more (or fewer: negative) than before;
            after capture, how many there are.
    """

    graph: str
    stage: str
    nodes: int
    seconds: float
    delta: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class GraphDiff:
    """What the stages did to the graphs of a model.

    Attributes:
        graphs: each graph, and after it the bodies in it, in the order of compilation.
    """

    graphs: tuple[Recorded, ...]

    @property
    def stages(self) -> list[StageSummary]:
        """Every stage of every graph."""
        return [summary for recorded in self.graphs for summary in _summaries(recorded)]

    @property
    def sites(self) -> list[Site]:
        """Every norm with its verdict, the rules, and the reasons (`Site.records`)."""
        return [site for graph in self.graphs if not graph.is_body for site in graph.journal.sites]

    def graph_text(self, stage: str = "lower", graph: str = "graph 0") -> str:
        """A graph after a stage, one line a node.

        Raises:
            OptionError: there is no such stage or graph.
        """
        names = [recorded.name for recorded in self.graphs]
        return graph_text(
            snapshot_of(self.graphs[names.index(known("graph", graph, names))], stage)
        )

    def text(
        self,
        before: str = "capture",
        after: str = "lower",
        context: int = 3,
        *,
        expand: bool = False,
    ) -> str:
        """A unified diff of two stages of every graph, with the verdict on each norm.

        It is the same on every run. Matched nodes keep the name of the earlier stage; others of the
        later stage begin with `n`.

        Args:
            before: the earlier stage.
            after: the later stage.
            context: how many unchanged lines are shown around a change.
            expand: whether layers that differ only in their weights are all written out.

        Raises:
            OptionError: there is no such stage, or a negative context.
        """
        if context < 0:
            raise OptionError(f"context is {context}; it must not be negative")
        bodies: dict[str, tuple[str, ...]] = {}  # by name: what is alike has equal lines
        shown: dict[tuple[str, ...], list[Recorded]] = {}
        for recorded in reversed(self.graphs):  # bodies before the graphs around them
            lines = tuple(self._of(recorded, before, after, context, expand, bodies))
            if recorded.is_body:
                lines = tuple(" ".join(map(starred, line.split(" "))) for line in lines)
                bodies[recorded.name] = lines
            shown.setdefault((*lines, "" if recorded.is_body else recorded.name), []).append(
                recorded
            )
        return "\n".join(
            _heading(alike[::-1], before, after) + "".join(f"{line}\n" for line in lines[:-1])
            for lines, alike in reversed(shown.items())
        )

    def html(self, path: str | os.PathLike[str]) -> None:
        """Writes all stages as one page that needs no network and no server.

        Args:
            path: of the file; it is replaced.

        Raises:
            OSError: it cannot be written.
        """
        from normfx.graphdiff.html import page

        Path(path).write_text(page(self.graphs), encoding="utf-8")

    def export(self, path: str | os.PathLike[str], stage: str = "lower") -> None:
        """Writes a stage of all graphs for other tools, by the ending of the file.

        `.json` is for Model Explorer (`pip install ai-edge-model-explorer`). `.dot` is what the
        drawer of `torch.fx` makes, for graphviz, one graph after the other.

        Args:
            path: of the file; it is replaced.
            stage: the name of the stage.

        Raises:
            OptionError: there is no such stage, or the ending is another.
            RuntimeError: `.dot`, and pydot is not installed.
            OSError: it cannot be written.
        """
        from normfx.graphdiff.export import dot, model_explorer

        path = Path(path)
        chosen = [(recorded, snapshot_of(recorded, stage)) for recorded in self.graphs]
        if path.suffix == ".json":
            graphs = [model_explorer(*pair) for pair in chosen]
            text = json.dumps({"label": f"normfx {stage}", "graphs": graphs})
        elif path.suffix == ".dot":
            text = "".join(dot(*pair) for pair in chosen)
        else:
            raise OptionError(f"{path.name} must end in .json or .dot")
        path.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        return self.text()

    def _of(
        self,
        recorded: Recorded,
        before: str,
        after: str,
        context: int,
        expand: bool,
        bodies: Mapping[str, Any],
    ) -> list[str]:
        if recorded.journal.fallback:
            return [f"# left to Inductor: {recorded.journal.fallback}"]
        for stage in (before, after):
            snapshot_of(recorded, stage)
        inner = {
            name.removeprefix(f"{recorded.name}, "): lines
            for name, lines in bodies.items()
            if name.startswith(f"{recorded.name}, ")
        }
        lines, named = unified(
            recorded, before, after, context=context, expand=expand, bodies=inner
        )
        if not recorded.is_body:
            inside = {id(site) for body in self.graphs if body.is_body for site in _sites_in(body)}
            left = [s for s in recorded.journal.sites if id(s) not in named | inside]
            lines += others(left, recorded.journal.near_misses)
        return lines


def snapshot_of(recorded: Recorded, stage: str) -> Snapshot:
    """The graph after a stage.

    Raises:
        OptionError: there is no such stage.
    """
    return recorded.snapshots[known("stage", stage, list(recorded.snapshots))]


def known(kind: str, name: str, names: list[str]) -> str:
    """A name, if it is one of these.

    Raises:
        OptionError: it is none of them; the nearest is named.
    """
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"there is no {kind} {name!r}, only {', '.join(names)}{meant}")


def _sites_in(recorded: Recorded) -> list[Site]:
    return [n.site for s in recorded.snapshots.values() for n in s.nodes if n.site is not None]


def _heading(alike: list[Recorded], before: str, after: str) -> str:
    first = alike[0]
    count = f" (x{len(alike)}, differing only in weights)" if len(alike) > 1 else ""
    if first.journal.fallback:
        return f"{first.name}{count}\n"
    old, new = (len(first.snapshots[stage].nodes) for stage in (before, after))
    parts = [f"{before} -> {after}", f"{old} -> {new} nodes"]
    if not first.is_body:
        sites = first.journal.sites
        rewritten = sum(bool(site.actions) for site in sites)
        parts.append(f"{len(sites)} norms, {rewritten} rewritten")
    return f"{first.name}{count}: {', '.join(parts)}\n"


def _summaries(recorded: Recorded) -> list[StageSummary]:
    counts = [
        Counter(node.operator for node in snapshot.nodes if node.op == "call")
        for snapshot in recorded.snapshots.values()
    ]
    deltas: list[dict[str, int]] = [
        {name: later[name] - earlier[name] for name in sorted(earlier | later)}
        for earlier, later in pairwise([Counter(), *counts])
    ]
    return [
        StageSummary(
            recorded.name,
            stage,
            len(snapshot.nodes),
            0.0 if recorded.is_body else recorded.journal.stages.get(stage, 0.0),
            {name: change for name, change in delta.items() if change},
        )
        for (stage, snapshot), delta in zip(recorded.snapshots.items(), deltas, strict=True)
    ]


def diff(
    model: Callable[..., Any],
    *,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., GraphDiff]:
    """The graphs of one call of a model after every stage: `print(normfx.diff(model)(*args))`.

    Like `explain`, the call traces, rewrites and runs the model eagerly, and starts no Inductor. It
    compiles the model anew each time, so it does not matter what a cache holds. Code compiled
    before stays valid, and `normfx.report()` does not change.

    Args:
        model: a module or a function, not compiled.
        dynamic: as in `torch.compile`.
        options: see `normfx.Options`.

    Returns:
        A function of the model's arguments that returns the `GraphDiff`.

    Raises:
        OptionError: an unknown option or a value of the wrong type.
        StatisticsError: calibrated statistics do not fit the model.
        StageError: a stage failed and `strict` is set.
    """

    def compared(*args: Any, **kwargs: Any) -> GraphDiff:
        return GraphDiff(record(model, args, kwargs, dynamic=dynamic, options=options))

    return compared
