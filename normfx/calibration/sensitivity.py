"""Sensitivity: what it costs to make each norm static, and which to take under a budget.

For each site the model runs over the data with that norm replaced, by the same rule and the same
numbers as in a compilation, and its results are compared with those of the model as it is:

    relative L2 = ||y' - y|| / ||y||,    cosine = mean over rows of cos(y', y)

Damages do not add up, so a choice is made one site at a time, and what counts is the damage of all
of them together, measured.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normfx.calibration.calibrate import Mask, bar, mask_of
from normfx.calibration.observe import AT_ONCE, Model, Replaced, invoke
from normfx.calibration.padding import rows_kept
from normfx.calibration.statistics import Statistics
from normfx.errors import StatisticsError
from normfx.options import Options

Metric = Literal["cosine", "relative_l2", "loss"]


@dataclass(frozen=True, slots=True)
class Damage:
    """How far a model with static norms is from the model.

    Attributes:
        relative_l2: ||y' - y|| / ||y|| over all results.
        cosine: the mean cosine of the rows (vectors along the last dim) of all results.
        worst: the smallest cosine of a row.
        loss: the change of the mean loss, or None.
    """

    relative_l2: float
    cosine: float
    worst: float
    loss: float | None = None

    def of(self, metric: Metric) -> float:
        """One number, zero for no damage: 1 - cosine, the relative L2, or the change of the loss.

        Raises:
            StatisticsError: the loss is asked for and there is none.
        """
        if metric == "cosine":
            return 1.0 - self.cosine
        if metric == "relative_l2":
            return self.relative_l2
        if self.loss is None:
            raise StatisticsError("a budget for the loss needs a loss: sensitivity(..., loss=...).")
        return self.loss


@dataclass(frozen=True, slots=True)
class SiteSensitivity:
    """One site.

    Attributes:
        name: as in the statistics.
        kind: of the norm.
        damage: of replacing it alone.
        saved: bytes that the norm reads and writes a batch: what is saved if it folds away.
    """

    name: str
    kind: str
    damage: Damage
    saved: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Sites that may be replaced together.

    Attributes:
        sites: their names.
        damage: of all of them together, measured.
        saved: bytes a batch.
    """

    sites: tuple[str, ...]
    damage: Damage
    saved: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The damage of each site, and the means to choose among them.

    Attributes:
        rows: one for each site, the least damage a saved byte first.
    """

    rows: tuple[SiteSensitivity, ...]
    _measure: Callable[[Sequence[str]], Damage] = field(repr=False)

    def choose(self, budget: float, metric: Metric = "cosine") -> Choice:
        """Takes sites in, the least damage a saved byte first, while all together stay in budget.

        Each step is measured on the data; a site that would exceed the budget is left out, and the
        next one is tried.

        Args:
            budget: the largest damage: 0.001 is a mean cosine of 0.999.
            metric: of what.
        """
        taken: list[str] = []
        damage = Damage(0.0, 1.0, 1.0, 0.0)
        for row in self.order(metric):
            # a site alone beyond the budget may be within it beside others, but seldom is
            if not row.damage.of(metric) <= budget:
                continue
            together = row.damage if not taken else self.damage([*taken, row.name])
            if together.of(metric) <= budget:
                taken.append(row.name)
                damage = together
        saved = sum(row.saved for row in self.rows if row.name in taken)
        return Choice(tuple(taken), damage, saved)

    def order(self, metric: Metric = "cosine") -> list[SiteSensitivity]:
        """The sites, the least damage a saved byte first."""
        return _ordered(self.rows, metric)

    def damage(self, sites: Iterable[str]) -> Damage:
        """The damage of replacing some sites together, measured on the data."""
        return self._measure(tuple(sites))

    def plot(self, path: str | os.PathLike[str], metric: Metric = "cosine") -> None:
        """Saves a picture of damage against saved bytes (PNG, SVG, as the name ends).

        Raises:
            ImportError: matplotlib is not installed.
        """
        from normfx.calibration.plot import plot

        points = [(row.saved, row.damage.of(metric), row.name) for row in self.order(metric)]
        axis = {"cosine": "1 - cosine", "relative_l2": "relative L2", "loss": "change of the loss"}
        plot(points, path, axis[metric])

    def __str__(self) -> str:
        width = max([4, *(len(row.name) for row in self.rows)])
        kinds = max([4, *(len(row.kind) for row in self.rows)])
        with_loss = any(row.damage.loss is not None for row in self.rows)
        head = (
            f"{'site':<{width}}  {'kind':<{kinds}}  relative L2  1 - cosine  worst row  saved/batch"
        )
        lines = [head + ("  loss" if with_loss else "")]
        for row in self.rows:
            damage = row.damage
            line = (
                f"{row.name:<{width}}  {row.kind:<{kinds}}  {damage.relative_l2:>11.3g}"
                f"  {1 - damage.cosine:>10.3g}  {1 - damage.worst:>9.3g}"
                f"  {row.saved / 2**10:>7.0f} KiB"
            )
            lines.append(line + (f"  {damage.loss:+.3g}" if damage.loss is not None else ""))
        return "\n".join(lines)


def sensitivity(
    model: Model,
    data: Iterable[Any],
    statistics: Statistics,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    sites: Iterable[str] | None = None,
    batches: int | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures the damage of making each norm static by itself.

    Args:
        model: the model that the statistics are of.
        data: batches, as for `calibrate`; read again for each step of a choice, so it must be no
            iterator, and give the same batches each time.
        statistics: of the model.
        loss: of the model's result and the batch: also report its change.
        sites: names or patterns; None: all in the statistics.
        batches: use only that many.
        mask: which tokens are real, as for `calibrate`: results of others do not count.
        progress: show a progress bar, where stderr is a terminal.

    Raises:
        StatisticsError: the statistics do not fit the model.
    """
    if iter(data) is data:
        raise StatisticsError("sensitivity reads the data several times: give a list, no iterator.")
    replaced = Replaced(model)

    def measure(choices: Sequence[Sequence[str]]) -> list[Damage]:
        compared = [_Comparison(loss) for _ in choices]
        for batch in itertools.islice(data, batches):
            with torch.no_grad():
                expected = invoke(model, batch)
            real = None if mask is None else mask_of(mask, batch)
            for choice, comparison in zip(choices, compared, strict=True):
                replaced.options = Options(statistics=statistics, sites=tuple(choice))
                comparison.add(expected, replaced(batch), batch, real)
        return [comparison.damage() for comparison in compared]

    names = statistics.resolve(tuple(statistics.sites) if sites is None else sites)
    rows = []
    with bar(progress, len(names), "sensitivity") as advance:
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            for name, damage in zip(some, measure([[name] for name in some]), strict=True):
                site = statistics.sites[name]
                saved = site.bytes / max(statistics.batches, 1)
                rows.append(SiteSensitivity(name, site.form.kind, damage, saved))
                advance()
    return Sensitivity(tuple(_ordered(rows, "cosine")), lambda chosen: measure([chosen])[0])


def _ordered(rows: Iterable[SiteSensitivity], metric: Metric) -> list[SiteSensitivity]:
    return sorted(rows, key=lambda row: row.damage.of(metric) / max(row.saved, 1.0))


class _Comparison:
    """Sums over the results of two models; nothing waits for them before the end."""

    def __init__(self, loss: Callable[[Any, Any], Tensor] | None) -> None:
        self._loss = loss
        self._sums: Any = 0.0  # squared difference, squared norm, cosines, rows, losses, batches
        self._worst: Any = None

    def add(self, expected: Any, got: Any, batch: Any, real: Tensor | None) -> None:
        for mine, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            if isinstance(theirs, Tensor) and theirs.is_floating_point() and theirs.numel():
                self._add(mine.double(), theirs.double(), real)
        if self._loss is not None:
            with torch.no_grad():
                change = self._loss(got, batch) - self._loss(expected, batch)
            zero = torch.zeros((), dtype=torch.float64, device=change.device)
            self._count(zero, zero, zero, zero, change.double().mean(), zero + 1)

    def _add(self, mine: Tensor, theirs: Tensor, real: Tensor | None) -> None:
        width = theirs.shape[-1] if theirs.dim() > 1 else theirs.numel()
        sizes = theirs.shape[:-1]
        mine, theirs = mine.reshape(-1, width), theirs.reshape(-1, width)
        keep = None if real is None else rows_kept(real.to(theirs.device), sizes)
        if keep is not None:
            mine, theirs = mine[keep], theirs[keep]
        same = (mine == theirs).all(-1)  # two rows of zeros have no angle
        cosine = torch.cosine_similarity(mine, theirs, dim=-1).clamp(-1, 1)
        cosine = torch.where(same, 1.0, cosine)
        if not len(cosine):
            return
        low = cosine.min()
        self._worst = low if self._worst is None else torch.minimum(self._worst, low)
        zero = torch.zeros_like(low)
        squares = (mine - theirs).square().sum(), theirs.square().sum()
        self._count(*squares, cosine.sum(), zero + len(cosine), zero, zero)

    def _count(self, *terms: Tensor) -> None:
        self._sums = self._sums + torch.stack(terms)

    def damage(self) -> Damage:
        if isinstance(self._sums, float) or self._worst is None:
            raise StatisticsError("the model's results hold no floating tensor to compare.")
        difference, size, cosines, rows, losses, batches = self._sums.tolist()
        relative = (difference / size) ** 0.5 if size else float(difference > 0)
        change = losses / batches if batches else None
        return Damage(relative, cosines / rows, self._worst.item(), change)
