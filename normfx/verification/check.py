"""Check: every stage of one graph against the original, and who is to blame where one is wrong.

    own dtype   error(stage) <= max(2 error(eager), 1 ulp)        the contract (`numerics.py`)
    float64     |stage - original| <= eps(float32) * size         what rounding does not explain

The second sees what the first cannot in bfloat16: every rule is an identity, so in float64 nothing
may be left of the difference. Which application of a rule is wrong is found by running the pipeline
again with half of them, and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.errors import StageError
from normfx.numerics import MEANING, Comparison, compare
from normfx.options import Options
from normfx.torch_internals import is_module_state, source_name
from normfx.verification.result import Blame, GraphResult, Measured, SiteResult, StageResult
from normfx.verification.runs import Outcome, run
from normfx.verification.stages import (
    Stage,
    Staged,
    UnfitWeights,
    anchors,
    renamed,
    staged,
    without,
)
from normfx.verification.variants import Inputs, Variant, shaken, variants

# Stages that change the function, because they were asked to.
_APPROXIMATE = ("calibrate", "test-time")


@dataclass(frozen=True, slots=True)
class _Reference:
    """What a stage is compared with: the original, or the graph whose norms statistics replace.

    Attributes:
        of: the graph.
        exact: its run in float64.
        eager: its run in its own dtype.
    """

    of: Stage
    exact: Outcome
    eager: Outcome


# How many more inputs and weights a suspicion of rounding is tried on.
_RETRIES = 8


class GraphCheck:
    """One graph of dynamo's, checked at every call.

    Args:
        name: of the graph.
        gm: the graph.
        inputs: what it is called with first.
        options: of the pipeline.
        kind: which inputs to verify with.
        compiled: makes the compiled code of the graph, or None.

    Raises:
        StageError: a stage failed, under `strict`.
    """

    def __init__(
        self,
        name: str,
        gm: fx.GraphModule,
        inputs: list[Any],
        options: Options,
        kind: Inputs,
        compiled: Callable[..., Any] | None,
    ) -> None:
        self._gm, self._inputs, self._options = gm, inputs, options
        self._kind: Inputs = kind
        self._compiled = compiled
        places = list(gm.graph.find_nodes(op="placeholder"))
        self._names = [_name_of(node) for node in places]
        self._state = [i for i, node in enumerate(places) if is_module_state(node)]
        self.result = GraphResult(name)
        try:
            self._staged = staged(gm, inputs, options)
        except StageError as error:
            if options.strict:
                raise
            self.result.fallback = str(error)
            return
        journal = self._staged.journal
        self.result.training, self.result.norms = journal.training, len(journal.sites)
        self.result.approximate = [
            key for stage in _APPROXIMATE for _, key in self._staged.applied(stage)
        ]

    def __call__(self, args: Sequence[Any]) -> None:
        """Checks every stage on the inputs of one call."""
        self.result.calls += 1
        if self.result.fallback:
            return
        captured = self._staged.stages[0].module.graph
        for variant in variants(captured, self._state, args, self._kind):
            self._check(variant)

    # ---------------------------------------------------------------------------- running

    def _run(
        self, stage: Stage, variant: Variant, *, exact: bool, wanted: frozenset[str] = frozenset()
    ) -> Outcome:
        return run(
            stage.make,
            stage.module,
            variant.args,
            names=self._names,
            grad=self.result.training,
            in_float64=exact,
            before=variant.before if stage.hoisted is not None else None,
            wanted=wanted,
        )

    def _check(self, variant: Variant) -> None:
        places = anchors(self._staged) if variant.name == "given" else {}
        reference = self._reference(Stage("original", self._gm), variant)
        captured: _Reference | None = None
        last: tuple[str, Measured] | None = None
        for stage in self._staged.stages:
            if not stage.changed and last is not None and stage.hoisted is None:
                verdict, measured = last
                same = "unchanged" if verdict == "ok" else verdict
                self._note(StageResult(stage.name, variant.name, same, measured))
                continue
            names = renamed(self._staged, stage) if places else {}
            wanted = frozenset(names.get(n, n) for found in places.values() for n in found)
            try:
                own = self._run(stage, variant, exact=False, wanted=wanted)
            except UnfitWeights:
                detail = "its conditions do not hold for these weights, so it would not run"
                self._note(StageResult(stage.name, variant.name, "not run", None, detail))
                continue
            wide = self._wide(stage, variant, wanted)
            measured = _measured(own, wide, reference)
            if captured is None:
                captured = _Reference(stage, wide or own, own)
            elif places and wide is not None:
                self._sites(stage.name, places, names, own, wide, captured)
            if stage.name in _APPROXIMATE and self._staged.applied(stage.name):
                # what comes after is held to what the statistics, or the option, say
                reference = _Reference(stage, wide or own, own)
                self._note(StageResult(stage.name, variant.name, "approximate", measured))
                last = None
                continue
            wrong = self._wrong(stage, variant, own, wide, reference)
            last = ("violation" if wrong else "ok", measured)
            self._note(StageResult(stage.name, variant.name, last[0], measured, wrong))
            if wrong and self.result.blamed is None:
                self.result.blamed = self._blame(stage.name, variant, reference, measured, wrong)
        if self._compiled is not None and variant.name == "given":
            self._check_compiled(variant, reference)

    def _check_compiled(self, variant: Variant, reference: _Reference) -> None:
        compiled = self._compiled
        assert compiled is not None
        own = run(
            lambda _: compiled,
            self._gm,
            variant.args,
            names=self._names,
            grad=self.result.training,
        )
        measured = _measured(own, None, reference)
        wrong = _rounding(_compared(own, reference))
        verdict = "violation" if wrong else "ok"
        self._note(StageResult("inductor", variant.name, verdict, measured, wrong))
        if wrong and self.result.blamed is None:
            self.result.blamed = self._blamed("inductor", "inductor", "", variant, measured, wrong)

    def _reference(self, of: Stage, variant: Variant) -> _Reference:
        exact = self._run(of, variant, exact=True)
        return _Reference(of, exact, self._run(of, variant, exact=False))

    def _wrong(
        self,
        stage: Stage,
        variant: Variant,
        own: Outcome,
        wide: Outcome | None,
        reference: _Reference,
    ) -> str:
        """What a stage violates, as a line for people, or "".

        Of two roundings of a short tensor one may have luck. So it is rounding worse than eager
        only if it does so again, over a few more inputs and weights that are close to these.
        """
        strayed = {} if wide is None else _strayed(wide, reference)
        for name, share in strayed.items():
            if share > MEANING:
                return (
                    f"{name}: in float64 it differs by {share:.3g} of its size, "
                    f"{MEANING:.3g} is allowed"
                )
        compared = _compared(own, reference)
        wrong = _rounding(compared)
        if not wrong or any(held.problem for held in compared.values()):
            return wrong
        again: dict[str, Comparison] = {}
        for seed in range(_RETRIES):
            near = shaken(self._staged.stages[0].module.graph, self._state, variant, seed)
            try:
                own = self._run(stage, near, exact=False)
            except UnfitWeights:  # weights with a property that those close to them lack
                break
            for name, more in _compared(own, self._reference(reference.of, near)).items():
                again[name] = again[name].joined(more) if name in again else more
        return wrong if not again or _rounding(again) else ""

    def _wide(self, stage: Stage, variant: Variant, wanted: frozenset[str]) -> Outcome | None:
        """The outcome in float64, or None where an operator has no such kernel."""
        try:
            return self._run(stage, variant, exact=True, wanted=wanted)
        except (RuntimeError, NotImplementedError):
            return None

    # ---------------------------------------------------------------------------- what is found

    def _note(self, found: StageResult) -> None:
        """Keeps a result; of several calls of one graph, the worst."""
        key = (found.stage, found.variant)
        for index, known in enumerate(self.result.stages):
            if (known.stage, known.variant) == key:
                if _badness(found) > _badness(known):
                    self.result.stages[index] = found
                return
        self.result.stages.append(found)

    def _sites(
        self,
        stage: str,
        places: dict[str, list[str]],
        names: dict[str, str],
        own: Outcome,
        exact: Outcome,
        captured: _Reference,
    ) -> None:
        """Compares each norm at the nearest value that the stage should have kept, and has."""
        for key, nearest in places.items():
            for name in nearest:
                here = names.get(name, name)
                truth, mine = captured.exact.values.get(name), exact.values.get(here)
                if truth is None or mine is None or truth.shape != mine.shape:
                    continue
                if not compare(mine, mine, truth).relative <= MEANING:
                    continue  # another value by now
                found = compare(own.values[here], captured.eager.values[name], truth)
                self._note_site(
                    SiteResult(key, stage, here, found.error_ulp, found.relative, found.eager_ulp)
                )
                break

    def _note_site(self, found: SiteResult) -> None:
        """Keeps a result; of several calls of one graph, the worst."""
        for index, known in enumerate(self.result.sites):
            if (known.site, known.stage) == (found.site, found.stage):
                if found.ulp > known.ulp:
                    self.result.sites[index] = found
                return
        self.result.sites.append(found)

    # ---------------------------------------------------------------------------- who it was

    def _blame(
        self, stage: str, variant: Variant, reference: _Reference, measured: Measured, wrong: str
    ) -> Blame:
        """The application of a rule with which the stage begins to be wrong."""
        candidates = self._staged.applied(stage)
        before = [
            applied
            for earlier in self._staged.stages
            for applied in self._staged.applied(earlier.name)
            if earlier.name != stage and self._is_before(earlier.name, stage)
        ]

        def fails(count: int) -> bool:
            kept = [*before, *candidates[:count]]
            return self._fails(
                stage, variant, reference, without(self._options, self._staged, kept)
            )

        low, high = 0, len(candidates)
        if not candidates or fails(0):
            return self._blamed(stage, stage, "", variant, measured, wrong)
        while high - low > 1:  # `low` of them are right, `high` are wrong
            middle = (low + high) // 2
            low, high = (low, middle) if fails(middle) else (middle, high)
        rule, site = candidates[high - 1]
        return self._blamed(stage, rule, site, variant, measured, wrong)

    def _is_before(self, earlier: str, stage: str) -> bool:
        order = [s.name for s in self._staged.stages]
        return order.index(earlier) < order.index(stage)

    def _fails(self, stage: str, variant: Variant, reference: _Reference, options: Options) -> bool:
        try:
            again: Staged = staged(self._gm, self._inputs, options)
        except StageError:  # it is what is left that is wrong, in another way
            return True
        found = next(s for s in again.stages if s.name == stage)
        own = self._run(found, variant, exact=False)
        wide = self._wide(found, variant, frozenset())
        return bool(self._wrong(found, variant, own, wide, reference))

    def _blamed(
        self, stage: str, rule: str, site: str, variant: Variant, measured: Measured, wrong: str
    ) -> Blame:
        known = self._staged.keyed.get(site)
        location = "" if known is None else known.location
        return Blame(
            self.result.name, stage, rule, site, location, variant.name, measured.tensor, wrong
        )


def _name_of(node: fx.Node) -> str:
    return g.clean_path(source_name(node)) or node.name


def _measured(own: Outcome, wide: Outcome | None, reference: _Reference) -> Measured:
    """The worst tensor, by how much of what is allowed it takes."""
    strayed = {} if wide is None else _strayed(wide, reference)
    worst, badness = Measured(), -1.0
    for name, compared in _compared(own, reference).items():
        share = compared.error / compared.allowed if compared.error else 0.0
        bad = math.inf if compared.problem else max(share, strayed.get(name, 0.0) / MEANING)
        if bad > badness:
            badness = bad
            worst = Measured(
                name,
                compared.error_ulp,
                compared.relative,
                compared.eager_ulp,
                problem=compared.problem,
            )
    return replace(worst, meaning=None if wide is None else max(strayed.values(), default=0.0))


def _compared(own: Outcome, reference: _Reference) -> dict[str, Comparison]:
    """Every tensor beside eager's, by its name."""
    exact, eager = reference.exact, reference.eager
    scale = _scale(exact)
    found = {}
    for name, held in eager.tensors.items():
        if name not in own.tensors or name not in exact.tensors:
            found[name] = Comparison(problem="missing")
            continue
        size = scale if name in exact.gradients else None
        found[name] = compare(own.tensors[name], held, exact.tensors[name], scale=size)
        if held.dtype is torch.float64 and not found[name].problem:
            # eager is the exact run then, and says nothing of its own error
            found[name] = replace(found[name], eager=math.inf)
    most = max((found[n].eager for n in exact.gradients if n in found), default=0.0)
    for name in exact.gradients & set(found):  # the gradients of all parameters are one vector
        found[name] = replace(found[name], eager=most)
    return found


def _strayed(wide: Outcome, reference: _Reference) -> dict[str, float]:
    """How far every tensor is from the original where both run in float64, by its size."""
    exact = reference.exact
    scale = _scale(exact)
    found, largest = {}, 0.0
    for name, truth in exact.tensors.items():
        size = scale if name in exact.gradients else None
        if name in wide.tensors:
            found[name] = alone = compare(wide.tensors[name], truth, truth, scale=size)
            largest = max(largest, alone.size)
    noise = torch.finfo(torch.float64).eps * largest  # all there is of a tensor of zeros
    return {
        name: math.inf if alone.problem else alone.relative if alone.error > noise else 0.0
        for name, alone in found.items()
    }


def _scale(exact: Outcome) -> float:
    """The largest gradient: what a bias before a norm gets is zero but for rounding."""
    gradients = [exact.tensors[name] for name in exact.gradients]
    return max((float(t.abs().max()) for t in gradients if t.numel()), default=0.0)


def _rounding(compared: dict[str, Comparison]) -> str:
    """The first tensor that the contract does not hold for, as a line for people, or ""."""
    return next((f"{name}: {held}" for name, held in compared.items() if not held.within), "")


_ORDER = {"unchanged": 0, "ok": 0, "not run": 1, "approximate": 2, "violation": 3}


def _badness(found: StageResult) -> tuple[int, float]:
    return _ORDER[found.verdict], 0.0 if found.measured is None else found.measured.ulp
