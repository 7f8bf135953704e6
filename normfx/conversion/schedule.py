"""Gradual conversion: one norm after the other, while the model is trained.

A model that loses all its norms at once may not come back; one that loses them one by one, with
training between, does. That is how LayerNorms are taken out of trained language models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from normfx.calibration.affine import explained
from normfx.calibration.sensitivity import Sensitivity
from normfx.calibration.statistics import Statistics
from normfx.conversion.convert import Filter, convertible
from normfx.conversion.convert import convert as convert_once
from normfx.conversion.converted import Converted
from normfx.errors import ConversionError

Order: TypeAlias = "Literal['model', 'damage'] | Sensitivity | Iterable[str]"


class GradualConversion:
    """A callback for any training loop: `schedule.step()` after each optimizer step.

    After n steps (n // every) * at_once norms are converted. Nothing else depends on the loop.

        schedule = normfx.GradualConversion(model, to="unified", statistics=statistics, every=100)
        for batch in data:
            loss(model(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            record = schedule.step()
            if record is not None and record.new_parameters:
                optimizer.add_param_group({"params": list(record.new_parameters.values())})

    **To resume**, make the model and the schedule as at first, then load the state of the schedule,
    which converts what was converted, and after it that of the model.

    Args:
        model: as for `convert`.
        to: as for `convert`.
        statistics: as for `convert`; or a function that calibrates the model as it is when a norm's
            turn comes, since what a norm reads changes while those before it go.
        every: steps from one conversion to the next.
        at_once: how many norms at a time.
        order: "model": as in the model; "damage": the norm first that its constant map explains
            best, by the statistics; a `Sensitivity`: the least measured damage first; or names, and
            no others are converted.
        filter: as for `convert`.
        options: as for `convert`.

    Attributes:
        order: the names of all norms that are converted, in their turn.
        steps: how many there were.
        records: one for each conversion.

    Raises:
        ConversionError: as `convert`; or an order that names what is no norm that can be converted,
            or that needs statistics.
        StatisticsError: as `convert`.
    """

    def __init__(
        self,
        model: nn.Module,
        to: str,
        *,
        statistics: Statistics | Callable[[], Statistics] | None = None,
        every: int = 100,
        at_once: int = 1,
        order: Order = "model",
        filter: Filter = None,
        **options: Any,
    ) -> None:
        if every < 1 or at_once < 1:
            raise ConversionError(
                f"expected every and at_once of at least 1, got every={every}, at_once={at_once}."
            )
        self._model, self._to, self._options = model, to, options
        self._statistics, self._every, self._at_once = statistics, every, at_once
        known = self._measured() if order == "damage" or not callable(statistics) else None
        names = convertible(model, to, statistics=known, filter=filter, **options)
        self.order = _ordered(names, order, known)
        self.steps = 0
        self.records: list[Converted] = []

    @property
    def converted(self) -> tuple[str, ...]:
        """The norms that are converted."""
        return tuple(swap.names[0] for record in self.records for swap in record.swapped)

    @property
    def done(self) -> bool:
        """Whether all are."""
        return len(self.converted) == len(self.order)

    def step(self) -> Converted | None:
        """Counts one training step, and converts those whose turn it is.

        Returns:
            The record, if something was converted.
        """
        self.steps += 1
        due = min(self.steps // self._every * self._at_once, len(self.order))
        return self._convert(self.order[len(self.converted) : due])

    def undo(self) -> None:
        """Puts all modules back, see `Converted.undo`; the count stays."""
        for record in reversed(self.records):
            record.undo()
        self.records = []

    def state_dict(self) -> dict[str, Any]:
        """Plain values: steps, order, and how many are converted."""
        return {"steps": self.steps, "order": self.order, "converted": len(self.converted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another schedule was; call it before the model loads its state.

        Raises:
            ConversionError: the state is of other norms, or fewer are converted in it than here.
        """
        order, count = tuple(state["order"]), int(state["converted"])
        if sorted(order) != sorted(self.order):
            unlike = sorted(set(order) ^ set(self.order))
            raise ConversionError(f"the state is of another schedule: it differs in {unlike}.")
        mine = self.converted
        if order[: len(mine)] != mine or count < len(mine):
            raise ConversionError(
                f"the state has {list(order[:count])} converted, but {list(mine)} are already: "
                "give a schedule of a fresh model."
            )
        self.order, self.steps = order, int(state["steps"])
        self._convert(order[len(mine) : count])

    def __str__(self) -> str:
        head = f"step {self.steps}: {len(self.converted)} of {len(self.order)} norms are {self._to}"
        waiting = self.order[len(self.converted) :]
        return head + (f", next {waiting[0]}" if waiting else "")

    def _convert(self, names: tuple[str, ...]) -> Converted | None:
        if not names:
            return None
        record = convert_once(
            self._model, self._to, statistics=self._measured(), filter=names, **self._options
        )
        missing = set(names) - {name for swap in record.swapped for name in swap.names}
        if missing:
            record.undo()
            why = {k.name: k.code.value for k in record.kept if k.name in missing}
            raise ConversionError(f"cannot convert any more: {why or sorted(missing)}.")
        self.records.append(record)
        return record

    def _measured(self) -> Statistics | None:
        """The statistics, not tied to the values of the parameters: these are trained."""
        found = self._statistics
        if callable(found):
            modes = [(module, module.training) for module in self._model.modules()]
            with torch.no_grad():
                self._model.eval()
                try:
                    found = found()
                finally:
                    for module, mode in modes:
                        module.training = mode
        return None if found is None else replace(found, weights={})


def _ordered(
    names: tuple[str, ...], order: Order, statistics: Statistics | None
) -> tuple[str, ...]:
    if isinstance(order, Sensitivity):
        ranks = {row.name: row.damage.of("cosine") for row in order.rows}
        return tuple(sorted(names, key=lambda name: ranks.get(name, float("inf"))))
    if order == "model":
        return names
    if order == "damage":
        if statistics is None:
            raise ConversionError("the order 'damage' needs statistics: see normfx.calibrate.")
        shares = {name: explained(site.moments) for name, site in statistics.sites.items()}
        # a norm whose own statistics are used (a BatchNorm) is not changed at all
        return tuple(sorted(names, key=lambda name: -shares.get(name, 1.0)))
    if isinstance(order, str):
        raise ConversionError(f"order: expected 'model', 'damage' or names, got {order!r}.")
    given = tuple(order)
    unknown = [name for name in given if name not in names]
    if unknown or len(set(given)) != len(given):
        known = ", ".join(names) or "none"
        raise ConversionError(
            f"order: {unknown or 'names twice'}; the norms that can be converted are {known}."
        )
    return given
