"""Statistics: what a calibration measured, which model it is of, and its file.

The file is safetensors: float64 tensors `SITE/rows`, `SITE/mean`, ..., and one entry of metadata,
JSON with everything else. It is written beside its place and then renamed, so a reader never sees
half of one.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from normfx.calibration.affine import Affine, affine, explained
from normfx.calibration.moments import Moments, merged
from normfx.calibration.sites import Form
from normfx.calibration.smoothing import Smoothed
from normfx.errors import StatisticsError

VERSION = 1
_KEY = "normfx-statistics"


@dataclass(frozen=True, slots=True, eq=False)
class SiteStatistics:
    """What was measured of one norm.

    Attributes:
        form: what it is.
        moments: of its input, and of its output before weight and bias.
        bytes: read and written by it, over all batches.
        smoothed: Unified Normalization's statistic, where a window was asked for.
    """

    form: Form
    moments: Moments
    bytes: int = 0
    smoothed: Smoothed | None = None

    def affine(self, how: Affine) -> tuple[Tensor, ...]:
        """(s, t) of the static norm s x + t, one float64 number for each channel."""
        second = None if self.smoothed is None else self.smoothed.running
        return affine(self.form, self.moments, second, how)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The result of a calibration. A value: nothing changes it; two are equal if their files are.

    Attributes:
        sites: name to what was measured.
        state: the parameters of the model: name to "dtype[shape]", more than one where
            several modules share a name.
        refused: norms that no static norm can stand for: name to the reason.
        batches: how many were seen.
        complete: False if the calibration was interrupted.
        form: which affine map stands for a norm: "fitted" or "unified".
        chosen: the sites to replace where a compilation names none; None: all.
        options: what decides how a batch counts: mask, window, filtration, sites.
        weights: a digest for each parameter, where the file is for these weights only.
        parts: how many calibrations were merged into this one.
    """

    sites: Mapping[str, SiteStatistics]
    state: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    batches: int = 0
    complete: bool = True
    form: Affine = "fitted"
    chosen: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    parts: int = 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the model and the options: its parameters' names, shapes and dtypes, and its norms."""
        model = [self.state, {k: s.form for k, s in self.sites.items()}, self.refused]
        return _digest(json.dumps([*model, self.options], sort_keys=True).encode())

    @functools.cached_property
    def digest(self) -> str:
        """Of everything."""
        return _digest(self._bytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statistics) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def using(self, sites: Iterable[str] | None = None, form: Affine | None = None) -> Statistics:
        """The same numbers with a choice of sites (names or patterns), or with another form.

        Raises:
            StatisticsError: a site is not in here, or was refused.
        """
        chosen = self.chosen if sites is None else self.resolve(sites)
        return replace(self, chosen=chosen, form=form or self.form)

    def resolve(self, sites: Iterable[str] | None) -> tuple[str, ...]:
        """The names that some names and patterns (`layers.*.norm`) stand for.

        Args:
            sites: None: those that were chosen, or all.

        Raises:
            StatisticsError: one of them is in here under no name, or was refused.
        """
        if sites is None:
            return tuple(self.sites) if self.chosen is None else self.chosen
        found: dict[str, None] = {}
        for pattern in sites:
            fitting = [name for name in self.sites if matches(name, [pattern])]
            if not fitting:
                raise StatisticsError(self._unknown(pattern))
            found.update(dict.fromkeys(fitting))
        return tuple(found)

    def _unknown(self, name: str) -> str:
        if name in self.refused:
            return f"site {name!r} cannot be replaced: {self.refused[name]}"
        near = difflib.get_close_matches(name, [*self.sites], n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(list(self.sites)[:8]) + (", ..." if len(self.sites) > 8 else "")
        return f"the statistics have no site {name!r}.{meant} They have: {known or 'none'}."

    # ------------------------------------------------------------------------ merging

    @classmethod
    def merge(cls, first: Statistics, *others: Statistics) -> Statistics:
        """The statistics of all data of several calibrations of one model, as if of one process.

        Raises:
            StatisticsError: they are of different models or options, or have a window (the order
                of the batches is lost).
        """
        return functools.reduce(_merged, others, first)

    # ------------------------------------------------------------------------ the file

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, all or nothing."""
        path = os.fspath(path)
        handle, draft = tempfile.mkstemp(dir=os.path.dirname(path) or ".", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise

    def _bytes(self) -> bytes:
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            parts = {**site.moments._asdict()}
            if site.smoothed is not None:
                parts |= {f"smoothed.{k}": v for k, v in site.smoothed._asdict().items()}
            tensors |= {f"{name}/{k}": v.detach().cpu().contiguous() for k, v in parts.items()}
        about = {
            "version": VERSION,
            "sites": {
                name: {"form": site.form._asdict(), "bytes": site.bytes}
                for name, site in self.sites.items()
            },
            "state": self.state,
            "refused": self.refused,
            "batches": self.batches,
            "complete": self.complete,
            "form": self.form,
            "chosen": self.chosen,
            "options": self.options,
            "weights": self.weights,
            "parts": self.parts,
        }
        return save(tensors, {_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads a file that `save` wrote.

        Raises:
            StatisticsError: it is no such file, damaged, or of a later version.
            OSError: it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        path = os.fspath(path)
        with open(path, "rb"):  # safetensors has an error of its own for a file that is not there
            pass
        try:
            with safe_open(path, "pt") as file:
                header = (file.metadata() or {}).get(_KEY)
                if header is None:
                    raise StatisticsError(
                        f"{path}: a safetensors file, but not one of normfx.Statistics."
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            about = json.loads(header)
            if about["version"] > VERSION:
                raise StatisticsError(
                    f"{path}: version {about['version']}, this normfx reads up to {VERSION}: "
                    "install a later one."
                )
            return _parsed(about, tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, StatisticsError):
                raise
            raise StatisticsError(
                f"{path}: no file of normfx.Statistics, or a damaged one "
                f"({type(error).__name__}: {error}). Calibrate again."
            ) from error

    # ------------------------------------------------------------------------ for people

    def __repr__(self) -> str:
        return f"Statistics({len(self.sites)} sites, {self.batches} batches, {self.digest[:12]})"

    def __str__(self) -> str:
        state = "complete" if self.complete else "interrupted"
        lines = [f"{len(self.sites)} sites over {self.batches} batches ({state})"]
        for name, site in self.sites.items():
            rows = int(site.moments.rows.item())
            share = explained(site.moments)
            lines.append(f"  {name}: {site.form}, {rows} rows, {share:.2%} explained")
        lines += [f"  {name}: not measured: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of these, or fits a pattern among them."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_of(tensor: Tensor) -> str:
    """Of the values of a tensor."""
    from safetensors.torch import save

    return _digest(save({"": tensor.detach().cpu().contiguous()}))


def _parsed(about: dict[str, Any], tensors: dict[str, Tensor]) -> Statistics:
    sites = {}
    for name, described in about["sites"].items():
        form = Form(**described["form"])
        found = Moments(*(_checked(tensors, name, key, form) for key in Moments._fields))
        state = None
        if f"{name}/smoothed.running" in tensors:
            keys = [f"smoothed.{key}" for key in Smoothed._fields]
            state = Smoothed(*(_checked(tensors, name, key, form) for key in keys))
        sites[name] = SiteStatistics(form, found, int(described["bytes"]), state)
    chosen = about["chosen"]
    if about["form"] not in get_args(Affine):
        raise ValueError(f"form {about['form']!r}")
    return Statistics(
        sites,
        {name: tuple(looks) for name, looks in about["state"].items()},
        dict(about["refused"]),
        int(about["batches"]),
        bool(about["complete"]),
        about["form"],
        None if chosen is None else tuple(chosen),
        dict(about["options"]),
        dict(about["weights"]),
        int(about["parts"]),
    )


def _checked(tensors: dict[str, Tensor], name: str, key: str, form: Form) -> Tensor:
    held = tensors[f"{name}/{key}"]
    expected = () if key.split(".")[-1] in ("rows", "batches", "skipped") else (form.channels,)
    if tuple(held.shape[-1:]) != expected or held.dtype != torch.float64:
        raise ValueError(
            f"{name}/{key}: {held.dtype}{list(held.shape)}, expected float64 of {form.channels}"
        )
    return held


def _merged(a: Statistics, b: Statistics) -> Statistics:
    if a.options != b.options or a.form != b.form:
        raise StatisticsError(
            f"cannot merge statistics that were made with other options: {dict(a.options)}, form "
            f"{a.form!r}; and {dict(b.options)}, form {b.form!r}."
        )
    if a.options.get("window"):
        raise StatisticsError(
            "cannot merge statistics with a window: it is over batches in their order. Calibrate "
            "in one process, or without a window."
        )
    for table, others, what in ((a.state, b.state, "parameter"), (a.weights, b.weights, "values")):
        for name in sorted(table.keys() & others.keys()):
            if table[name] != others[name]:
                raise StatisticsError(
                    f"cannot merge statistics of different models: {what} of {name!r} is "
                    f"{table[name]} in one and {others[name]} in the other."
                )
    sites = dict(a.sites)
    for name, theirs in b.sites.items():
        mine = sites.get(name)
        if mine is None:
            sites[name] = theirs
            continue
        if mine.form != theirs.form:
            raise StatisticsError(
                f"cannot merge statistics of different models: site {name!r} is {mine.form} in one "
                f"and {theirs.form} in the other."
            )
        both = merged(mine.moments, theirs.moments)
        sites[name] = SiteStatistics(mine.form, both, mine.bytes + theirs.bytes)
    refused = {**b.refused, **a.refused}
    if a.chosen != b.chosen:
        raise StatisticsError("cannot merge statistics with different choices of sites.")
    return replace(
        a,
        sites={name: site for name, site in sites.items() if name not in refused},
        state={**b.state, **a.state},
        refused=refused,
        batches=a.batches + b.batches,
        complete=a.complete and b.complete,
        weights={**b.weights, **a.weights},
        parts=a.parts + b.parts,
    )
