"""Pipeline: the order of the stages. Data flows one way; a stage never reaches back.

    capture -> recognise -> calibrate, test time -> rewrite -> fold -> hoist -> lower

Each stage takes a graph that runs and leaves a graph that runs, and writes to the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.capture import capture
from normfx.errors import StageError, StatisticsError
from normfx.kernels.select import Selector
from normfx.options import Options
from normfx.passes.calibrated import calibrated
from normfx.passes.compress import compress
from normfx.passes.defer_scale import defer_scale
from normfx.passes.emit import erase_unused
from normfx.passes.fold import fold
from normfx.passes.fold_back import fold_back
from normfx.passes.hoist import Hoisted, hoist
from normfx.passes.identity_norm import identity_norm
from normfx.passes.lower import lower
from normfx.passes.neutral import marked_inputs, neutral
from normfx.passes.norm_of_norm import norm_of_norm
from normfx.passes.open_clamp import open_clamp
from normfx.passes.recentre import recentre
from normfx.passes.recognise import recognise
from normfx.passes.telescope import telescope
from normfx.passes.test_time import adapted
from normfx.passes.unread import unread
from normfx.passes.use_kernel import use_kernels
from normfx.passes.values import Values
from normfx.passes.verdict import Permit
from normfx.record import Journal, Refusal
from normfx.torch_internals import is_module_state

# Operators whose bodies run as they stand, so that rewriting one keeps its meaning, and how many of
# their bodies are computations of the model: the second of an `autograd.Function` is its backward.
_BODIES = {"tag_activation_checkpoint": 1, "invoke_subgraph": 1, "autograd_function_apply": 1}

Observer = Callable[[str, fx.GraphModule], None]


@dataclass(slots=True)
class Rewritten:
    """A graph after the last stage, and what has to run beside it."""

    module: fx.GraphModule
    hoisted: Hoisted | None


def rewrite(
    gm: fx.GraphModule,
    options: Options,
    journal: Journal,
    *,
    tracked: bool = True,
    in_body: bool = False,
    inputs: Sequence[Any] = (),
    permit: Permit | None = None,
    observe: Observer | None = None,
    observe_body: Callable[[str], Observer] | None = None,
    selector: Selector | None = None,
) -> Rewritten:
    """Runs every stage on dynamo's graph.

    Args:
        gm: dynamo's graph; not changed.
        options: the switches.
        journal: gets every decision and the seconds of every stage.
        tracked: whether changes of the parameters can be noticed (or need not be).
        in_body: whether this is the body of an operator, whose operands are not known to be
            parameters.
        inputs: what the graph is called with now, parameters among them; empty if not known.
        permit: may refuse a fold that is legal (see `fold`).
        observe: called with the name of each stage and its graph, for tests and diffs.
        observe_body: gives the observer of a body that is rewritten inside, by its name here.
        selector: chooses between kernels; without one, by what was measured before.

    Raises:
        StageError: a stage failed; its cause is what the stage raised.
        StatisticsError: calibrated statistics do not fit the graph.
    """
    journal.training = grad = wants_grad(gm)

    def watch(stage: str, module: fx.GraphModule) -> None:
        if observe is not None:
            module.recompile()  # so that what is seen can be run
            observe(stage, module)

    with _stage("capture", journal):
        captured = capture(gm)
    if grad:
        g.mark_trained(_trained(gm, captured))
    journal.nodes = len(captured.graph.nodes)
    watch("capture", captured)
    with _stage("recognise", journal):
        _bodies(captured, options, journal, observe_body)
        recognise(captured, journal, grad=grad, options=options)
    watch("recognise", captured)
    if options.statistics is not None:
        with _stage("calibrate", journal):
            calibrated(captured, options, in_body=in_body)
        watch("calibrate", captured)
    if options.test_time is not None:
        with _stage("test-time", journal):
            adapted(captured, options, grad=grad, in_body=in_body, inputs=inputs)
        watch("test-time", captured)
    blocked = _blocked(grad, tracked, in_body)
    # what no gradients are wanted of is constant in training too, if it can leave the graph
    hoists = _blocked(False, tracked, in_body) is None and options.allows("hoist")
    frozen = grad and hoists and g.has_frozen(captured.graph)
    folds = None if frozen else blocked
    marked = marked_inputs(gm, inputs)
    with _stage("rewrite", journal):
        values = Values(captured, inputs)
        unread(captured, options)
        conditions = open_clamp(captured, options, blocked=blocked, values=values)
        norm_of_norm(captured, options, grad=grad)
        identity_norm(captured, options)
        recentre(captured, options, blocked=blocked, frozen=frozen, baked=bool(marked))
    watch("rewrite", captured)
    with _stage("fold", journal):
        conditions += neutral(captured, options, marked, blocked=blocked)
        fold_back(captured, options, blocked=folds, permit=permit)
        conditions += telescope(captured, options, blocked=blocked, values=values)
        conditions += fold(captured, options, blocked=folds, permit=permit, values=values)
        compress(captured, options, blocked=blocked)
        defer_scale(captured, options, grad=grad)
        erase_unused(captured.graph, conditions)
    watch("fold", captured)
    hoisted = None
    with _stage("hoist", journal):
        if hoists and (frozen or not grad):
            hoisted = hoist(captured, journal, conditions, grad=grad)
        else:
            assert not conditions  # nobody would check them
    watch("hoist", captured)
    with _stage("lower", journal):
        inference = not grad and not in_body
        two_passes = inference and options.lowering == "inductor"
        use_kernels(captured, options, selector or Selector(options.kernels), grad=grad)
        lower(captured, two_passes=two_passes, options=options)
        captured.graph.lint()
        captured.recompile()
    watch("lower", captured)
    return Rewritten(captured, hoisted)


def _trained(gm: fx.GraphModule, captured: fx.GraphModule) -> list[fx.Node]:
    """The inputs of a captured graph that gradients are wanted of."""
    given = zip(*(m.graph.find_nodes(op="placeholder") for m in (gm, captured)), strict=False)
    held = [(g.tensor(before), node) for before, node in given]
    return [node for tensor, node in held if tensor is not None and tensor.requires_grad]


def _blocked(grad: bool, tracked: bool, in_body: bool) -> Refusal | None:
    """Why nothing may be folded or hoisted in a graph, if so."""
    if grad:
        return Refusal.NEEDS_GRAD
    if in_body:
        return Refusal.IN_BODY
    return None if tracked else Refusal.NOT_TRACKED


def wants_grad(gm: fx.GraphModule) -> bool:
    """Whether autograd will differentiate this graph: grad mode is on, some input wants it."""
    switched_on = any(
        getattr(node.target, "__name__", "") == "_set_grad_enabled" and node.args[:1] == (True,)
        for node in gm.graph.nodes
    )
    if not torch.is_grad_enabled() and not switched_on:
        return False
    held = [g.tensor(node) for node in gm.graph.find_nodes(op="placeholder")]
    return any(t is not None and t.requires_grad for t in held)


def _bodies(
    gm: fx.GraphModule,
    options: Options,
    journal: Journal,
    observe_body: Callable[[str], Observer] | None,
) -> None:
    """Runs the stages on bodies that may be rewritten inside (activation checkpoints, say)."""
    for node in gm.graph.nodes:
        for argument in node.args[: _BODIES.get(getattr(node.target, "__name__", ""), 0)]:
            body = (
                getattr(gm, str(argument.target), None) if isinstance(argument, fx.Node) else None
            )
            if isinstance(body, fx.GraphModule):
                inner = Journal()
                watch = observe_body and observe_body(str(argument.target))
                rewritten = rewrite(body, options, inner, in_body=True, observe=watch)
                gm.add_submodule(str(argument.target), rewritten.module)
                for found in (*inner.sites, *inner.near_misses):
                    found.location = found.location or g.location(node)
                journal.sites += inner.sites
                journal.near_misses += inner.near_misses


@contextmanager
def _stage(name: str, journal: Journal) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    except StatisticsError:
        raise  # what the user asked for cannot be done: no fallback
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise StageError(f"normfx stage {name!r} failed: {cause}") from error
    finally:
        journal.stages[name] = journal.stages.get(name, 0.0) + time.perf_counter() - start


def weights_are_tracked(gm: fx.GraphModule, example_inputs: list[Any]) -> bool:
    """Whether every parameter reports its changes: tensors made in inference mode do not."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return not any(
        isinstance(given, torch.Tensor) and given.is_inference()
        for node, given in zip(placeholders, example_inputs, strict=True)
        if is_module_state(node)
    )
