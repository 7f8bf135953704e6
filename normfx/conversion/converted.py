"""Converted: the record of a conversion, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfx.conversion.sources import Source
from normfx.conversion.targets import Made
from normfx.record import Refusal
from normfx.reports import columns, meanings
from normfx.torch_internals import Bypass


@dataclass(slots=True)
class Carried:
    """A parameter that the new layer has from the old module.

    Attributes:
        parameter: it.
        before: its values in the old module, or None where they are the same in both.
        after: its values right after the conversion.
    """

    parameter: nn.Parameter
    before: Tensor | None = None
    after: Tensor | None = None

    def restore(self, values: Tensor) -> None:
        """Writes values back; numbers that did not change are those from before, bit by bit."""
        if self.before is None or self.after is None or values.is_meta:
            return  # on `meta` there are no values
        held = self.parameter
        values = values.to(held.device, held.dtype).reshape(held.shape)
        before, after = (t.to(held.device) for t in (self.before, self.after))
        held.copy_(torch.where(held == after, before, values.where(values.isfinite(), before)))


@dataclass(slots=True)
class Swap:
    """One module that was swapped.

    Attributes:
        names: its paths in the model, the first one first.
        kind: what it was.
        layer: the class of what it is.
        explained: the share of the norm's variance that the constant map explains, over the
            calibration data; None without statistics.
        new: parameters that the old module had none of, by name. An optimizer does not know them.
    """

    names: tuple[str, ...]
    kind: str
    layer: str
    explained: float | None
    new: dict[str, nn.Parameter]
    _old: nn.Module = field(repr=False)
    _made: Made = field(repr=False)
    _source: Source = field(repr=False)
    _places: list[tuple[nn.Module, str]] = field(repr=False)
    _carried: dict[str, Carried] = field(repr=False)

    def undo(self) -> None:
        """Puts the old module back, with the affine parameters as they have been trained since."""
        source, made = self._source, self._made
        holder: Any = made.holder or made.layer
        weight = holder.weight.detach().double()
        device = weight.device
        effective = weight if made.factor is None else weight / made.factor.to(device)
        if "weight" in self._carried:
            factor = source.factor
            factor = factor.to(device) if isinstance(factor, Tensor) else factor
            self._carried["weight"].restore((effective - source.offset) / factor)
        if "bias" in self._carried and made.shift is not None:
            bias = holder.bias.detach().double() - effective * made.shift.to(device)
            self._carried["bias"].restore(bias)
        self._old.to(device)
        self._old.train(made.layer.training)
        for parent, key in self._places:
            parent._modules[key] = self._old


@dataclass(frozen=True, slots=True)
class Kept:
    """A norm that was not converted: its name and kind, and why."""

    name: str
    kind: str
    code: Refusal


@dataclass(slots=True)
class Converted:
    """What `convert` did to a model, and the way back.

    Attributes:
        to: the kind of layer that was asked for.
        swapped: what became such a layer, in the order of the model.
        kept: the norms that did not, and why.
    """

    to: str
    swapped: list[Swap]
    kept: list[Kept]
    _bypasses: list[Bypass] = field(repr=False, default_factory=list)

    @property
    def new_parameters(self) -> dict[str, nn.Parameter]:
        """By name, the parameters that an optimizer made before does not know: give it these.

        All others are the same objects as before.
        """
        return {name: held for swap in self.swapped for name, held in swap.new.items()}

    def undo(self) -> None:
        """Puts the very modules back that were swapped; a second call does nothing.

        Their parameters have their values back, bit by bit. Where the new layer's weight and bias
        have been trained since, the old ones become what means the same: w = w' / factor,
        b = b' - w shift. Parameters that the old module has none of, and statistics, are lost.
        """
        with torch.inference_mode(False), torch.no_grad():
            for swap in reversed(self.swapped):
                swap.undo()
            for bypass in self._bypasses:
                bypass.undo()
        self.swapped, self._bypasses = [], []

    def __str__(self) -> str:
        rows = [("norm", "was", "is", "explained", "kept for")]
        for swap in self.swapped:
            share = "-" if swap.explained is None else f"{swap.explained:.2%}"
            rows.append((", ".join(swap.names), swap.kind, swap.layer, share, "-"))
        rows += [(kept.name, kept.kind, "-", "-", kept.code.value) for kept in self.kept]
        return "\n".join([*columns(rows), *meanings(kept.code for kept in self.kept)])
