"""Calibrate: one pass over data that measures every norm of a model.

Each batch counts as a whole or not at all: what it adds is put in place by one assignment after the
call has returned, so an interrupt leaves the statistics of the batches before it, and a resumed
pass is the same sums in the same order. What is kept has the size of the channels, however much
data there is; it stays on the device of the model, and nothing waits for it before the end.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from normfx.calibration.affine import Affine
from normfx.calibration.moments import merged, moments
from normfx.calibration.observe import Model, Watched
from normfx.calibration.padding import rows_kept
from normfx.calibration.sites import Form
from normfx.calibration.smoothing import fresh, smoothed
from normfx.calibration.statistics import SiteStatistics, Statistics, digest_of, matches
from normfx.errors import StatisticsError

Mask: TypeAlias = "str | Callable[[Any], Tensor]"


def calibrate(
    model: Model,
    data: Iterable[Any],
    *,
    sites: Iterable[str] | None = None,
    batches: int | None = None,
    budget: float | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    progress: bool = True,
    mask: Mask | None = None,
    window: int | None = None,
    filtration: bool = False,
    form: Affine = "fitted",
    weights: bool = False,
    resume: Statistics | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Statistics:
    """Measures the norms of a model over data, in one pass.

    Args:
        model: a module or function, not compiled; run as it is, without gradients. Call `.eval()`
            first, or its dropout is measured too.
        data: batches: a mapping is the keyword arguments of a call, a tuple or list its arguments,
            anything else its only argument.
        sites: names or patterns (`layers.*.norm`) of the norms to measure; None: all.
        batches: stop after that many.
        budget: choose the sites that may be replaced at this damage together: 1 - cosine, or with
            a loss its change; see `Sensitivity.choose`. The data is then read more than once, so it
            must be no iterator.
        loss: of the model's result and the batch.
        progress: show a progress bar, where stderr is a terminal.
        mask: which tokens are real: a key of the batch (`attention_mask`), or a function of the
            batch; (batch, tokens), zero for padding.
        window: also smooth the second moments of this many batches, as Unified Normalization does.
        filtration: keep outlier batches out of the window.
        form: which affine map stands for a norm; see `normfx/calibration/affine.py`.
        weights: tie the statistics to the values of the parameters, not only to their shapes.
        resume: an interrupted calibration over the same data: its batches are skipped.
        path: where to save the statistics, also when interrupted.

    Returns:
        The statistics. After Ctrl-C those of the batches so far, with `complete=False`, and a
        warning that says so.

    Raises:
        StatisticsError: no norm was found, a site matches nothing, or `resume` is of another model
            or other options.
    """
    options = {
        "mask": mask if mask is None or isinstance(mask, str) else "function",
        "window": window,
        "filtration": filtration,
        "sites": None if sites is None else list(sites),
    }
    _check_options(data, options, budget)
    run = _Pass(model, options, mask, resume)
    interrupted = False
    try:
        with bar(progress, batches or length_of(data)) as advance:
            for index, batch in enumerate(data):
                if batches is not None and index >= batches:
                    break
                if resume is None or index >= resume.batches:
                    run.add(batch)
                advance()
    except KeyboardInterrupt:
        interrupted = True
    result = run.statistics(form=form, weights=weights, complete=not interrupted)
    if path is not None:
        result.save(path)
    if interrupted:
        kept = "" if path is None else f", saved as {os.fspath(path)}"
        warnings.warn(
            f"calibration was interrupted: the statistics are of {result.batches} batches{kept}. "
            "Go on with calibrate(..., resume=statistics).",
            stacklevel=2,
        )
        return result
    if budget is not None:
        from normfx.calibration.sensitivity import sensitivity

        measured = sensitivity(
            model, data, result, loss=loss, batches=batches, mask=mask, progress=progress
        )
        result = result.using(measured.choose(budget, "cosine" if loss is None else "loss").sites)
        if path is not None:
            result.save(path)
    return result


class _Pass:
    """The sums of a pass over data."""

    def __init__(
        self, model: Model, options: Mapping[str, Any], mask: Mask | None, resume: Statistics | None
    ) -> None:
        self._options, self._mask, self._resume = options, mask, resume
        patterns = options["sites"]
        self._model = Watched(model, lambda name: patterns is None or matches(name, patterns))
        self._real: Tensor | None = None
        self._pending: dict[str, SiteStatistics] = {}
        before = {} if resume is None else dict(resume.sites)
        # in one tuple, so that one assignment takes a batch in
        self._done: tuple[int, dict[str, SiteStatistics]] = (
            0 if resume is None else resume.batches,
            before,
        )
        if resume is not None:
            if resume.options != options or resume.parts != 1:
                raise StatisticsError(
                    f"cannot resume: the statistics were made with {dict(resume.options)} in "
                    f"{resume.parts} parts, these options are {dict(options)}."
                )
            self._model.refused |= resume.refused

    def add(self, batch: Any) -> None:
        """Takes one batch in."""
        self._pending = {}
        self._real = None if self._mask is None else mask_of(self._mask, batch)
        self._model(batch, self._see)
        count, sites = self._done
        added = {name: self._together(sites.get(name), new) for name, new in self._pending.items()}
        self._done = count + 1, {**sites, **added}

    def _see(self, name: str, form: Form, x: Tensor, y: Tensor) -> None:
        sizes = [size for dim, size in enumerate(x.shape) if dim != x.dim() + form.channel]
        keep = None
        if self._real is not None:
            keep = rows_kept(self._real.to(x.device), sizes)
            if keep is None:
                self._model.refused[name] = (
                    f"the padding mask {tuple(self._real.shape)} does not say which of its rows "
                    f"{tuple(sizes)} are real"
                )
                return
        measured = moments(_rows(x, form), _rows(y, form), keep)
        size = 2 * x.numel() * x.element_size()
        site = SiteStatistics(form, measured, size)
        before = self._pending.get(name)
        if before is not None:  # called more than once by one call of the model
            both = merged(before.moments, measured)
            site = SiteStatistics(form, both, before.bytes + size)
        self._pending[name] = site

    def _together(self, old: SiteStatistics | None, new: SiteStatistics) -> SiteStatistics:
        device = new.moments.mean.device
        window = self._options["window"]
        state = None
        if window:
            known = None if old is None else old.smoothed
            state = fresh(window, new.moments.mean) if known is None else _on(known, device)
            filtration = self._options["filtration"]
            measured = new.moments
            state = smoothed(state, measured.second, measured.rows, filtration=filtration)
        if old is None:
            return SiteStatistics(new.form, new.moments, new.bytes, state)
        if old.form != new.form:
            raise StatisticsError(
                f"cannot resume: the statistics are of {old.form}, the model has {new.form}."
            )
        both = merged(_on(old.moments, device), new.moments)
        return SiteStatistics(new.form, both, old.bytes + new.bytes, state)

    def statistics(self, *, form: Affine, weights: bool, complete: bool) -> Statistics:
        """The result so far."""
        model, resume = self._model, self._resume
        count, sites = self._done
        state = {name: tuple(sorted(looks)) for name, looks in sorted(model.state.items())}
        digests = {}
        if weights:
            digests = {name: digest_of(tensor) for name, tensor in sorted(model.tensors.items())}
        if resume is not None:
            _check_same(resume, state, digests)
            state, digests = {**resume.state, **state}, {**resume.weights, **digests}
        if complete:
            _check_found(model, sites, self._options["sites"], count)
        return Statistics(
            {
                name: replace(
                    site,
                    moments=_on(site.moments, "cpu"),
                    smoothed=None if site.smoothed is None else _on(site.smoothed, "cpu"),
                )
                for name, site in sites.items()
                if name not in model.refused
            },
            state,
            dict(model.refused),
            count,
            complete,
            form,
            None,
            self._options,
            digests,
        )


def _check_options(data: Any, options: Mapping[str, Any], budget: float | None) -> None:
    window = options["window"]
    if window is not None and window < 2:
        raise StatisticsError(f"window: expected at least 2 batches, got {window}.")
    if options["filtration"] and window is None:
        raise StatisticsError("filtration compares a batch with a window: give window=4, say.")
    if budget is not None and isinstance(data, Iterator):
        raise StatisticsError(
            "a budget reads the data several times: give a list or a DataLoader, no iterator."
        )


def _check_same(
    before: Statistics, state: Mapping[str, tuple[str, ...]], digests: Mapping[str, str]
) -> None:
    for old, new in ((before.state, state), (before.weights, digests)):
        for name in sorted(old.keys() & new.keys()):
            if old[name] != new[name]:
                raise StatisticsError(
                    f"cannot resume: the statistics are of another model: {name!r} is {old[name]} "
                    f"there and {new[name]} here."
                )


def _check_found(model: Watched, sites: Any, patterns: Any, count: int) -> None:
    for pattern in patterns or ():
        if not any(matches(name, [pattern]) for name in (*sites, *model.refused)):
            known = ", ".join(sites) or "none of the sites that were asked for"
            raise StatisticsError(f"no norm is named {pattern!r}; found {known}.")
    if not count:
        raise StatisticsError("no batch was given, so nothing was measured.")
    if not sites and not model.refused:
        raise StatisticsError("the model has no norm that could be measured.")


def mask_of(mask: Mask, batch: Any) -> Tensor:
    """The mask of a batch, (batch, tokens)."""
    if isinstance(mask, str):
        if not isinstance(batch, Mapping) or mask not in batch:
            raise StatisticsError(f"mask: the batch has no key {mask!r}.")
        real = batch[mask]
    else:
        real = mask(batch)
    if not isinstance(real, Tensor) or real.dim() != 2:
        got = tuple(real.shape) if isinstance(real, Tensor) else type(real).__name__
        raise StatisticsError(f"mask: expected a (batch, tokens) tensor, got {got}.")
    return real


def _rows(x: Tensor, form: Form) -> Tensor:
    return x.movedim(form.channel, -1).reshape(-1, form.channels)


def _on(held: Any, device: torch.device | str) -> Any:
    return type(held)(*(tensor.to(device) for tensor in held))


def length_of(data: Any) -> int | None:
    """How many batches there are, where the data can say."""
    try:
        return len(data)
    except TypeError:
        return None


@contextmanager
def bar(show: bool, total: int | None, what: str = "calibrate") -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, where that is a terminal; yields what counts one step."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield lambda: None
        return
    with Progress(console=console, transient=True) as display:
        task = display.add_task(what, total=total)
        yield lambda: display.advance(task)
