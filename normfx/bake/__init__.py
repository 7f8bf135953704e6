"""Bake: folds that are written into the model itself, so that no second copy of a weight exists.

    norm(x; w, b) V^T + c  =  norm(x; 1, 0) (V diag(w))^T + (c + V b)

What may be folded, and into what, the rules of the compiler say (`passes/fold.py`, `fold_back.py`);
so do the new weights, which are the nodes that these rules make. `plan.py` decides what of it may
be written, `changes.py` has the way back. The norm's own parameters become neutral: weight 1,
bias 0, mean 0, variance 1 - eps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from normfx.bake.changes import Change, write
from normfx.bake.plan import Plan
from normfx.errors import BakeError
from normfx.passes.neutral import mark
from normfx.record import Site
from normfx.reports import columns, meanings
from normfx.torch_internals import compile_alone, dynamo_error, same_random_numbers

# Relative to the largest number of a result. A deep MobileNetV2 with random statistics is itself
# 4e-4 away from its result in float64 (torch 2.13, CPU, float32).
_WRONG = 1e-2


def bake_(
    model: nn.Module, *, clone: bool = False, exact_undo: bool = False, verify: bool = True
) -> Callable[..., Baked]:
    """Folds norms into the weights of an eager model: `baked = normfx.bake_(model)(*args)`.

    The model computes what it did, and its state dict keeps its keys, shapes and dtypes. What is
    folded is decided by the graph of this one call, so the arguments have to be such that all
    that reads a weight runs. While it runs, a second copy of what changes exists.

    Args:
        model: a module in eval mode, not compiled.
        clone: unties a weight that other modules read too: its reader gets a copy of its own. The
            state dict then no longer loads into a model that ties them.
        exact_undo: keep the weights as they were, in the memory of the CPU, for `Baked.undo`.
        verify: run the model once more, and take everything back if its result has changed.

    Returns:
        A function of the model's arguments that returns a `Baked`.

    Raises:
        BakeError: the model cannot be baked. Nothing was changed.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise BakeError(f"bake_ changes the weights of a module; {type(model).__name__} is none.")

    def bake(*args: Any, **kwargs: Any) -> Baked:
        training = [name for name, module in model.named_modules() if module.training]
        if training:
            name = f" (its module {training[0]!r} is)" if training[0] else ""
            raise BakeError(f"the model is in training mode{name}: call model.eval() first.")
        with torch.inference_mode(False), torch.no_grad():
            with same_random_numbers(model):
                plan, before = _planned(model, args, kwargs, clone=clone)
            changes = plan.changes(exact=exact_undo)
            baked = Baked(plan.journal.sites, plan.into, model, changes)
            written = write([(change.tensor, change.take_made()) for change in changes])
            try:
                for change in changes:
                    change.install()
                if verify:
                    with same_random_numbers(model):
                        after = model(*args, **kwargs)
                    _compare(before, after)
            except BaseException:
                for change in changes:
                    change.take_back()
                write(written)
                raise
            for change in changes:
                change.settle()
            for tensor, value in plan.neutral:
                mark(tensor, value)
        return baked

    return bake


@dataclass(slots=True)
class Baked:
    """What `bake_` did to a model, and the way back.

    Attributes:
        sites: every normalization, with what was decided of it.
        into: for each that was folded, the names of the parameters that took it over, by `id`.
    """

    sites: list[Site]
    into: dict[int, list[str]]
    _model: nn.Module = field(repr=False)
    _changes: list[Change] = field(repr=False)

    @property
    def bytes(self) -> int:
        """The memory that this record holds."""
        held = {id(t): t for change in self._changes for t in change.held()}
        return sum(t.numel() * t.element_size() for t in held.values())

    def undo(self) -> None:
        """Gives the model its weights back; a second call does nothing.

        Biases and the parameters of norms are as they were. A weight is as it was up to one ulp,
        and bit by bit after `bake_(exact_undo=True)`.

        Raises:
            BakeError: a weight has changed since. Nothing was changed.
        """
        state = self._model.state_dict(keep_vars=True)
        for change in self._changes:
            if not change.is_current(state.get(change.name)):
                raise BakeError(f"{change.name!r} has changed since it was baked.")
        with torch.inference_mode(False), torch.no_grad():
            kept = [change for change in self._changes if change.owner is None]
            write([(change.tensor, change.restored()) for change in kept])
        for change in self._changes:
            change.take_back()
            mark(change.tensor, None)
        self._changes = []

    def __str__(self) -> str:
        rows = [("norm", "kind", "into", "refused")]
        for site in self.sites:
            into = ", ".join(self.into.get(id(site), [])) or "-"
            refused = ", ".join(dict.fromkeys(site.refusals)) or "-"
            rows.append((site.name, site.kind, into, refused))
        codes = (r.code for site in self.sites for r in site.records if r.code)
        return "\n".join([*columns(rows), *meanings(codes)])


def _planned(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, clone: bool
) -> tuple[Plan, Any]:
    """The plan for the graph of a call, and the result of the call."""
    plans: list[Plan] = []
    errors: list[Exception] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        plan = Plan(model, example_inputs, clone)
        plans.append(plan)
        try:
            plan.read(gm)
        except Exception as error:  # which dynamo would take for one of its own
            errors.append(error)
        return gm

    try:
        result = compile_alone(model, collect, False, fullgraph=True)(*args, **kwargs)
    except dynamo_error() as error:
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise BakeError(
            f"the call is not one graph, so what else reads a weight is not known ({cause})."
        ) from error
    if errors:
        raise BakeError(str(errors[0])) from errors[0]
    if len(plans) != 1:
        raise BakeError(f"the call is {len(plans)} graphs; it has to be one.")
    return plans[0], result


def _compare(before: Any, after: Any) -> None:
    """Refuses results that differ by more than rounding explains."""
    then, now = (
        [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for result in (before, after)
    )
    for old, new in zip(then, now, strict=True):
        if not old.dtype.is_floating_point:
            continue  # a choice between equals may turn on a rounding
        usable = torch.isfinite(old)
        scale = old[usable].abs().amax() if usable.any() else torch.zeros(())
        limit = max(_WRONG, torch.finfo(old.dtype).eps ** 0.5) * scale
        off = (old - new).abs()[usable]
        if bool((off > limit).any()) or not torch.equal(usable, torch.isfinite(new)):
            raise BakeError(
                "the result of the model has changed, so everything was taken back. If calls of "
                "this model with the same arguments differ in any case, pass verify=False."
            )
