"""Stages: the graph as each stage of the pipeline leaves it, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from normfx import graph as g
from normfx.live import LiveWeights
from normfx.ops import norm
from normfx.options import Options
from normfx.passes import RULES
from normfx.passes.hoist import Hoisted
from normfx.pipeline import rewrite, weights_are_tracked
from normfx.record import Journal, Site
from normfx.verification.runs import Recorder

# What came before a stage that hoists has all of its weights in the graph.
_HOISTED = ("hoist", "lower")


@dataclass(frozen=True, slots=True)
class Stage:
    """A graph after one stage.

    Attributes:
        name: of the stage.
        module: the graph, a copy.
        hoisted: what makes its further inputs, or None.
        changed: whether it differs from the one before.
    """

    name: str
    module: fx.GraphModule
    hoisted: Hoisted | None = None
    changed: bool = True

    def make(self, recorder: Recorder) -> Callable[..., Any]:
        """What is called with the inputs of the original graph."""
        if self.hoisted is None:
            return recorder.run
        return LiveWeights(self.hoisted, frozen=False).wrap(recorder.run, _unfit)


class UnfitWeights(Exception):
    """The weights lack a property that the rewritten graph relies on: it would not run."""


def _unfit(*_: Any) -> Any:
    raise UnfitWeights


@dataclass(slots=True)
class Staged:
    """A graph of dynamo's and what each stage makes of it.

    Attributes:
        journal: what was decided.
        stages: the graphs, in order.
        regions: the captured node that each norm stands for, by the key of its site.
    """

    journal: Journal
    stages: list[Stage]
    regions: dict[str, str]

    @property
    def keyed(self) -> dict[str, Site]:
        """The sites by their keys."""
        return {site.key: site for site in self.journal.sites}

    def applied(self, stage: str) -> list[tuple[str, str]]:
        """What a stage did: (rule, key of the site), in the order of the sites.

        All that was done to the body of an operator (an activation checkpoint) was done while the
        graph around it was recognised.
        """
        found: dict[tuple[str, str], None] = {}
        for site in self.journal.sites:
            inside = site.key not in self.regions
            for record in site.records:
                if record.changed and stage == ("recognise" if inside else record.stage):
                    found[record.rule, site.key] = None
            if stage == ("recognise" if inside else "lower"):
                found["lower", site.key] = None
        return list(found)


def staged(gm: fx.GraphModule, inputs: list[Any], options: Options) -> Staged:
    """Runs the pipeline on a graph, and keeps a copy of it after every stage.

    Raises:
        StageError: a stage failed.
        StatisticsError: calibrated statistics do not fit the graph.
    """
    journal = Journal()
    found: list[Stage] = []
    regions: dict[str, str] = {}
    texts = [""]

    def observe(name: str, module: fx.GraphModule) -> None:
        text = "\n".join(_call(node, module) for node in module.graph.nodes)
        found.append(Stage(name, _copy(module), changed=text != texts[-1]))
        texts.append(text)
        if name == "recognise":
            for node in module.graph.find_nodes(op="call_function", target=norm):
                regions[node.meta["normfx_site"].key] = node.meta["normfx_region"]

    tracked = options.weights == "frozen" or weights_are_tracked(gm, inputs)
    made = rewrite(gm, options, journal, tracked=tracked, inputs=inputs, observe=observe)
    stages = [
        replace(stage, hoisted=made.hoisted) if stage.name in _HOISTED else stage for stage in found
    ]
    return Staged(journal, stages, regions)


def renamed(staging: Staged, stage: Stage) -> dict[str, str]:
    """Captured nodes that stand under another name after a stage: norms, and what is returned."""
    captured, graph = staging.stages[0].module.graph, stage.module.graph
    found = {}
    old, new = (pytree.tree_leaves(each.output_node().args) for each in (captured, graph))
    for before, after in zip(old, new, strict=True):
        if isinstance(before, fx.Node) and isinstance(after, fx.Node):
            found[before.name] = after.name
    for node in graph.find_nodes(op="call_function", target=norm):
        site = node.meta.get("normfx_site")
        if site is not None and site.key in staging.regions:
            found[staging.regions[site.key]] = node.name
    return found


def _call(node: fx.Node, module: fx.GraphModule) -> str:
    """All that a node does, as text; a body that was rewritten is another module."""
    held = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    body = id(held) if isinstance(held, fx.GraphModule) else None
    return str((node.name, node.op, node.target, node.args, node.kwargs, body))


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with nodes of its own, and the same names."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def without(options: Options, staging: Staged, kept: Iterable[tuple[str, str]]) -> Options:
    """Options under which the rules do to the known sites only what is kept."""
    kept = set(kept)
    recognised = {
        record.rule
        for site in staging.journal.sites
        for record in site.records
        if record.stage == "recognise" and record.changed
    }
    rules = [*recognised, *(rule for rule in RULES if rule != "hoist"), "lower"]
    skipped = [
        f"{rule}@{key}" for key in staging.keyed for rule in rules if (rule, key) not in kept
    ]
    return replace(options, skip=(*options.skip, *skipped))


def anchors(staging: Staged, limit: int = 12) -> dict[str, list[str]]:
    """For each site, the captured nodes at which its value may be compared, nearest first.

    The norm itself is the first; where a rule moved work to its readers, they have the value that
    did not change.
    """
    captured = {node.name: node for node in staging.stages[0].module.graph.nodes}
    found = {}
    for key, region in staging.regions.items():
        start = captured.get(region)
        queue = [] if start is None else [start]
        for node in queue:
            if len(queue) >= limit:
                break
            queue += [u for u in node.users if u not in queue and g.tensor(u) is not None]
        found[key] = [node.name for node in queue]
    return found
