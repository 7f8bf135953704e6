"""Convert: every norm of a model becomes a layer of another kind, in place.

First every swap is planned, which changes nothing; then all are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normfx.calibration.affine import explained
from normfx.calibration.moments import merged
from normfx.calibration.statistics import SiteStatistics, Statistics, digest_of, matches
from normfx.conversion.converted import Carried, Converted, Kept, Swap
from normfx.conversion.proof import Proofs
from normfx.conversion.sources import Fit, Source, by_type
from normfx.conversion.targets import TARGETS, Made, Target
from normfx.errors import ConversionError, StatisticsError
from normfx.passes.calibrated import check_numbers
from normfx.record import Refusal
from normfx.torch_internals import share_hooks, without_bypass

Filter: TypeAlias = "Callable[[str, nn.Module], bool] | Iterable[str] | None"


def convert(
    model: nn.Module,
    to: str,
    *,
    statistics: Statistics | None = None,
    filter: Filter = None,
    **options: Any,
) -> Converted:
    """Makes every norm of a model a layer of `normfx.nn`, in place.

    Modules that are norms are told by what they compute, whoever wrote them: those of torch and of
    `normfx.nn`, and others that normfx proves to be one norm of their input and nothing else. A
    norm that is a function call in the middle of another module stays; the record names it, if the
    statistics do. A second call changes nothing.

    With statistics (and always, where a BatchNorm or another layer with running statistics is
    converted) the new layer starts with its own statistics filled in, and with weights such that
    it computes, in evaluation, the affine map nearest to the norm; see
    `normfx/conversion/targets.py` for the equations. `rms` keeps weight and bias as they are.

    **Optimizers.** Weight and bias stay the same `Parameter` objects, so an optimizer goes on; but
    their values change, to which its momentum does not belong. What has no counterpart in the old
    norm (the bias, where an RMSNorm becomes a UnifiedNorm) is in `Converted.new_parameters`, for
    `optimizer.add_param_group`.

    Kept: dtype and device (running statistics are float32 at least), `requires_grad`, training
    mode, eps where it is added inside of the root, hooks and their handles, the names of modules,
    and that one module stands at several places.

    Args:
        model: a module; if it is compiled, the compiled one is converted and compiled anew.
        to: "unified", "power", "batch" or "rms"; of a BatchNorm with running statistics also
            "alpha" and "unmix".
        statistics: of `normfx.calibrate(model, data)`. Norms that they do not have, or did not
            choose, stay.
        filter: which norms: a function of name and module, or names and patterns (`layers.*.norm`).
        options: arguments of the new layers, as `warmup_steps=100`.

    Returns:
        The record: what was swapped, what was not and why, and `undo()`. It prints as a table.

    Raises:
        ConversionError: an unknown kind, a pattern that no norm has, or an option that the layer
            does not take. Nothing was changed.
        StatisticsError: the statistics are of another model, or not finite. Nothing was changed.
    """
    plan = _Plan(model, to, statistics, filter, options)
    record = Converted(to, plan.swaps, plan.kept)
    with torch.inference_mode(False), torch.no_grad():
        for swap in plan.swaps:
            _swap(swap)
        changed = [parent for swap in plan.swaps for parent, _ in swap._places]
        record._bypasses = without_bypass(plan.model, changed)
    return record


def convertible(
    model: nn.Module,
    to: str,
    *,
    statistics: Statistics | None = None,
    filter: Filter = None,
    **options: Any,
) -> tuple[str, ...]:
    """The names of the norms that `convert` would swap; nothing is changed."""
    plan = _Plan(model, to, statistics, filter, options)
    return tuple(swap.names[0] for swap in plan.swaps)


class _Plan:
    """What is to be swapped, and what is not; nothing is changed."""

    def __init__(
        self,
        model: nn.Module,
        to: str,
        statistics: Statistics | None,
        filter: Filter,
        options: Mapping[str, Any],
    ) -> None:
        if to not in TARGETS:
            known = ", ".join(TARGETS)
            raise ConversionError(f"cannot convert to {to!r}: expected one of {known}.")
        self.model = model = getattr(model, "_orig_mod", model)
        self.swaps: list[Swap] = []
        self.kept: list[Kept] = []
        self._to, self._options, self._statistics = to, dict(options), statistics
        self._owners = _owners(model)
        self._like = next((p for p in model.parameters() if p.is_floating_point()), None)
        if statistics is not None:
            _check_weights(model, statistics)
        norms = _norms(model, statistics)
        wanted = _wanted(filter, norms)
        for module, found in norms.items():
            code = self._add(module, found, wanted)
            if code is not None:
                source = found.source
                kind = type(module).__name__ if isinstance(source, Refusal) else source.kind
                self.kept.append(Kept(found.names[0], kind, code))
        if statistics is not None:
            known = {name for found in norms.values() for name in found.names}
            for name, site in statistics.sites.items():
                if name.partition("#")[0] not in known:
                    self.kept.append(Kept(name, site.form.kind, Refusal.NO_MODULE))

    def _add(
        self, module: nn.Module, found: _Norm, wanted: Callable[[tuple[str, ...], nn.Module], bool]
    ) -> Refusal | None:
        target, source = TARGETS[self._to], found.source
        if type(module) is target.layer:
            return Refusal.ALREADY
        if isinstance(source, Refusal):
            return source
        if target.is_already(source, module):
            return Refusal.ALREADY
        if not wanted(found.names, module):
            return Refusal.NOT_CHOSEN
        if not found.places:
            return Refusal.IS_THE_MODEL
        if target.of_batch_norm and (
            source.fit is None or type(module) not in target.of_batch_norm
        ):
            return Refusal.NEEDS_BATCH_NORM
        if any(p is not None and p.is_inference() for p in (source.weight, source.bias)):
            return Refusal.NOT_TRACKED
        fit, share = source.fit, None
        if fit is None and self._statistics is not None and self._to != "rms":
            site = _site(found.names, source, self._statistics, chosen=wanted is _all)
            if isinstance(site, Refusal):
                return site
            fit = Fit.of_site(site, self._statistics)
            share = explained(site.moments)
        return self._plan(module, found, source, target, fit, share)

    def _plan(
        self,
        module: nn.Module,
        found: _Norm,
        source: Source,
        target: Target,
        fit: Fit | None,
        share: float | None,
    ) -> Refusal | None:
        if source.dtype is None and self._like is not None:
            # a norm without parameters is where the rest of the model is
            source = source.beside(self._like)
        if fit is not None:
            fit = Fit(*(held.to(source.device) for held in fit))
        try:
            made = target.build(source, module, fit, self._options)
        except (TypeError, ValueError) as error:
            raise ConversionError(f"{found.names[0]}: {error}") from error
        carried: dict[str, Carried] = {}
        new: dict[str, nn.Parameter] = {}
        holder: Any = made.holder or made.layer
        prefix = f"{found.names[0]}.layer" if made.holder is not None else found.names[0]
        trains = [p.requires_grad for p in (source.weight, source.bias) if p is not None]
        for name, old, values, same in _affine(source, made):
            slot = getattr(holder, name)
            if slot is None:
                continue
            if old is not None and old.shape == slot.shape:
                carried[name] = Carried(old)
                if same:
                    continue
                if self._owners[id(old)] > 1:
                    return Refusal.SHARED
                carried[name].before = old.detach().clone()
                carried[name].after = values.to(old.dtype)
            else:
                dtype = source.dtype or slot.dtype
                trained = any(trains) or not trains
                made_new = nn.Parameter(values.to(slot.device, dtype), requires_grad=trained)
                setattr(holder, name, made_new)
                new[f"{prefix}.{name}"] = made_new
        kind, layer = source.kind, type(made.layer).__name__
        swap = Swap(
            found.names, kind, layer, share, new, module, made, source, found.places, carried
        )
        self.swaps.append(swap)
        return None


def _affine(source: Source, made: Made) -> Iterator[tuple[str, nn.Parameter | None, Tensor, bool]]:
    """For weight and bias: the old parameter, the new values, and whether they are the same."""
    scale = source.scale()
    weight = scale if made.factor is None else scale * made.factor
    plain = isinstance(source.factor, float) and source.factor == 1.0 and not source.offset
    yield "weight", source.weight, weight, plain and made.factor is None
    old = source.bias
    bias = torch.zeros_like(scale) if old is None else old.detach().double().reshape(-1)
    if made.shift is not None:
        bias = bias + scale * made.shift
    yield "bias", old, bias.expand(source.channels), made.shift is None


def _swap(swap: Swap) -> None:
    layer = swap._made.layer
    holder: Any = swap._made.holder or layer
    for name, carried in swap._carried.items():
        setattr(holder, name, carried.parameter)
        if carried.after is not None:
            carried.parameter.copy_(carried.after)
    layer.train(swap._old.training)
    share_hooks(layer, swap._old)
    for parent, key in swap._places:
        parent._modules[key] = layer


# ------------------------------------------------------------------------ what is in a model


class _Norm:
    """A module that is a norm: its paths, where it hangs, and what it computes."""

    def __init__(self, source: Source | Refusal) -> None:
        self.source = source
        self._names: list[str] = []
        self.places: list[tuple[nn.Module, str]] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def found(self, name: str, parent: nn.Module | None, key: str) -> None:
        """Notes one of its places."""
        self._names.append(name)
        if parent is not None and (parent, key) not in self.places:
            self.places.append((parent, key))


def _norms(model: nn.Module, statistics: Statistics | None) -> dict[nn.Module, _Norm]:
    """Every norm of a model, in its order; what is inside of one is not looked at."""
    proofs, norms, others = Proofs(), dict[nn.Module, _Norm](), set[nn.Module]()
    sites = {} if statistics is None else statistics.sites

    def visit(module: nn.Module, name: str, parent: nn.Module | None, key: str) -> None:
        if module not in norms and module not in others:
            site = sites.get(name)
            source = by_type(module)
            if source is None:
                source = proofs(module, None if site is None else site.form.channels)
            if source is None:
                others.add(module)
            else:
                norms[module] = _Norm(source)
        if module in norms:
            norms[module].found(name, parent, key)
            return
        for child, held in module._modules.items():
            if held is not None:
                visit(held, f"{name}.{child}" if name else child, module, child)

    visit(model, "", None, "")
    return norms


def _owners(model: nn.Module) -> dict[int, int]:
    """How many places a parameter has, by its `id`."""
    found: dict[int, int] = {}
    for module in model.modules():
        for held in module._parameters.values():
            if held is not None:
                found[id(held)] = found.get(id(held), 0) + 1
    return found


def _all(names: tuple[str, ...], module: nn.Module) -> bool:
    return True


def _wanted(
    filter: Filter, norms: Mapping[nn.Module, _Norm]
) -> Callable[[tuple[str, ...], nn.Module], bool]:
    if filter is None:
        return _all
    if callable(filter):
        given = filter
        return lambda names, module: any(given(name, module) for name in names)
    if isinstance(filter, str):
        raise ConversionError(f"filter: expected a list of names or a function, got {filter!r}.")
    patterns = list(filter)
    known = [name for found in norms.values() for name in found.names]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            have = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ConversionError(f"no norm is named {pattern!r}; found {have or 'none'}.")
    return lambda names, module: any(matches(name, patterns) for name in names)


# ------------------------------------------------------------------------ what was measured


def _site(
    names: tuple[str, ...], source: Source, statistics: Statistics, *, chosen: bool
) -> SiteStatistics | Refusal:
    """What was measured of a module, over all of its calls."""
    sites = {
        name: site for name, site in statistics.sites.items() if name.partition("#")[0] in names
    }
    if not sites:
        return Refusal.NOT_MEASURED
    if chosen and not set(sites) <= set(statistics.resolve(None)):
        return Refusal.NOT_CHOSEN
    found: SiteStatistics | None = None
    for name, site in sites.items():
        form = site.form
        fits = form.over_batch or form.statistic == source.statistic
        if form.channels != source.channels or not fits:
            raise StatisticsError(
                f"site {name!r}: the statistics are of {form}, but the module is a {source.kind} "
                f"over {source.channels} channels. Calibrate this model with normfx.calibrate."
            )
        if found is not None:
            site = SiteStatistics(form, merged(found.moments, site.moments))
        found = site
        check_numbers(name, site, statistics)
    assert found is not None
    return found


def _check_weights(model: nn.Module, statistics: Statistics) -> None:
    """Compares the values of parameters, where statistics are for certain weights only."""
    for name, held in model.named_parameters(remove_duplicate=False):
        known = statistics.weights.get(name)
        if known is not None and digest_of(held) != known:
            raise StatisticsError(
                f"the statistics are for other weights: the values of {name!r} differ. Calibrate "
                "this model with normfx.calibrate."
            )
