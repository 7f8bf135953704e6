"""Observe: a model whose norms are watched while it runs, or replaced by static ones.

The model goes through dynamo, capture and recognition as in a compilation, so its norms are those
that the compiler finds, spelled out or not. Then the captured graph is run as it is, node by node.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from normfx import graph as g
from normfx.calibration.sites import Form, form_of, named_norms, state_of
from normfx.capture import capture
from normfx.errors import NormfxError, StatisticsError
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.calibrated import calibrated
from normfx.passes.recognise import recognise
from normfx.passes.verdict import Refused
from normfx.pipeline import wants_grad
from normfx.record import REFUSALS, Journal
from normfx.torch_internals import (
    compile_alone,
    copy_placeholder,
    every_call_compiled,
    unwrapped,
)

# How many choices of sites have a graph of their own at a time.
AT_ONCE = 16

Model: TypeAlias = Callable[..., Any]
See: TypeAlias = Callable[[str, Form, Tensor, Tensor], None]


def invoke(model: Model, batch: Any) -> Any:
    """One call of a model: a mapping is its keyword arguments, a sequence its arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _run(call: Model, batch: Any) -> Any:
    """One call of a compiled model, without gradients."""
    too_often = StatisticsError(
        "dynamo compiled the model too often and stopped, so its norms cannot be followed. "
        'TORCH_LOGS="recompiles" says what changes from call to call.'
    )
    with torch.no_grad(), every_call_compiled(too_often), unwrapped(NormfxError):
        return invoke(call, batch)


@dataclass(slots=True, eq=False)
class _Watch:
    """A captured graph and the norms in it that are watched.

    Attributes:
        module: the graph.
        norms: node to name and form.
        state: name of a parameter to its position among the inputs.
        known: the ids of parameters that it was run with before.
    """

    module: fx.GraphModule
    norms: dict[fx.Node, tuple[str, Form]]
    state: dict[str, int]
    known: set[tuple[int, ...]] = field(default_factory=set)


class Watched:
    """A model that shows the input and the value of each of its norms, at every call.

    Args:
        model: a module or function, not compiled.
        wanted: whether a site of this name is watched.

    Attributes:
        forms: what the norms are, by name.
        refused: the norms that cannot be measured by themselves, and why.
        state: the parameters of all graphs: name to looks.
        tensors: these themselves.
    """

    def __init__(self, model: Model, wanted: Callable[[str], bool]) -> None:
        self.forms: dict[str, Form] = {}
        self.refused: dict[str, str] = {}
        self.state: dict[str, set[str]] = {}
        self.tensors: dict[str, Tensor] = {}
        self._wanted = wanted
        self._lines: dict[str, str] = {}
        self._owners: dict[str, dict[str, int]] = {}
        self._see: See | None = None
        self._lock = threading.Lock()
        self._call = compile_alone(model, self._compile, None)

    def __call__(self, batch: Any, see: See) -> Any:
        """Runs one batch without gradients.

        Args:
            batch: see `invoke`.
            see: called with name, form, input and value (before weight and bias) of each norm.
        """
        self._see = see
        return _run(self._call, batch)

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Model:
        module = recognised(gm)
        constant = g.parameter_only(module.graph)
        watch = _Watch(module, {}, {})
        with self._lock:
            for name, (position, looks) in state_of(module.graph).items():
                self.state.setdefault(name, set()).add(looks)
                watch.state[name] = position
            for name, node in named_norms(module.graph, constant):
                if self._wanted(name):
                    self._add(watch, name, node, form_of(node, constant))
        return lambda *args: _Watching(watch, self).run(*args)

    def _add(self, watch: _Watch, name: str, node: fx.Node, form: Form | Refused) -> None:
        line = g.location(node)
        if isinstance(form, Refused):
            self.refused[name] = f"{form.code.value}: {REFUSALS[form.code].meaning}"
            return
        watch.norms[node] = name, form
        before = self.forms.setdefault(name, form)
        if before != form:
            self.refused[name] = f"it is {before} in one graph and {form} in another"
        if self._lines.setdefault(name, line) != line:
            self.refused[name] = "several norms have this name, in different graphs"

    def owned(self, watch: _Watch, args: Sequence[Any]) -> None:
        """Notices where one graph is run with the parameters of several modules."""
        ids = tuple(id(args[position]) for position in watch.state.values())
        if ids in watch.known:
            return
        watch.known.add(ids)
        mine = dict(zip(watch.state, ids, strict=True))
        self.tensors |= {name: args[position] for name, position in watch.state.items()}
        for name, _ in watch.norms.values():
            theirs = self._owners.setdefault(name, mine)
            if any(theirs[key] != mine[key] for key in theirs.keys() & mine.keys()):
                self.refused[name] = (
                    "several modules share its compiled code (a graph break between them), so "
                    "that they cannot be told apart"
                )

    def seen(self, name: str, form: Form, node: fx.Node, args: Sequence[Any]) -> None:
        """Shows one norm."""
        if name not in self.refused and self._see is not None:
            self._see(name, form, args[0], _value(node, args))


class _Watching(fx.Interpreter):
    """One run of a captured graph."""

    def __init__(self, watch: _Watch, owner: Watched) -> None:
        super().__init__(watch.module)
        self._watch, self._owner = watch, owner

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._owner.owned(self._watch, args)
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._watch.norms:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._owner.seen(*self._watch.norms[n], n, args)
        return super().run_node(n)


def _value(node: fx.Node, args: Sequence[Any]) -> Tensor:
    """What a norm computes before its weight and bias, in float64; nothing is updated."""
    spec: Any = node.kwargs["spec"]
    rank: Any = node.kwargs["rank"]
    eps, mean, square = args[3:6]
    if spec.statistic == "batch":
        spec, mean, square = spec._replace(statistic="variance"), None, None
    exact = dict.fromkeys(("stats_dtype", "norm_dtype", "out_dtype"), torch.float64)
    spec = spec._replace(**exact, affine_dim=None, contiguous=False)
    return norm(args[0], None, None, eps, mean, square, spec=spec, rank=rank)


class Replaced:
    """A model with static norms at some of its sites. Eager: the graphs are run as they are.

    Args:
        model: as that which the statistics are of.

    Attributes:
        options: with the statistics and the sites; may be changed between two calls.
    """

    def __init__(self, model: Model) -> None:
        self.options = Options()
        self._call = compile_alone(model, self._compile, None)

    def __call__(self, batch: Any) -> Any:
        """Runs one batch without gradients."""
        return _run(self._call, batch)

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Model:
        module = recognised(gm)
        made: dict[tuple[Any, ...], fx.GraphModule] = {}

        def call(*args: Any) -> Any:
            key = (self.options.statistics, self.options.sites)
            if key not in made:
                if len(made) == AT_ONCE:
                    made.clear()
                made[key] = _copied(module)
                calibrated(made[key], self.options, in_body=False)
                made[key].recompile()
            return made[key](*args)

        return call


def recognised(gm: fx.GraphModule) -> fx.GraphModule:
    """The captured graph of one of dynamo's, with its norms as canonical nodes."""
    module = capture(gm)
    recognise(module, Journal(), grad=wants_grad(gm))
    return module


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """A graph that can be changed while the other stays as it is."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.op == "placeholder":
            copy_placeholder(copies[node], node)
        elif "normfx_site" in node.meta:
            site = node.meta["normfx_site"]
            copies[node].meta["normfx_site"] = replace(site, records=[*site.records])
    return fx.GraphModule(module, graph)
