"""Changes: parameters that are written to, all or none, and the way back.

A weight V that became V' = V w comes back as V' / w, rounded once, so that nothing but the small
vectors has to be kept. Elements for which that is no way back (w = 0) are kept too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from normfx.check import in_float64
from normfx.live import without_autocast


@dataclass(slots=True)
class Change:
    """A parameter that is written to.

    Attributes:
        name: its entry of the state dict.
        parameter: what that entry is.
        tensor: the same, or a view of it.
        made: what it becomes.
        owner: module, name and parameter, where this is a new one in place of that.
        original: what it was; None for a weight that comes back by division.
        factor: what the weight was multiplied with.
        lost: of what division does not bring back: where, and what it was.
    """

    name: str
    parameter: torch.Tensor
    tensor: torch.Tensor
    made: torch.Tensor
    owner: tuple[nn.Module, str, nn.Parameter] | None = None
    original: torch.Tensor | None = None
    factor: Factor | None = None
    lost: tuple[torch.Tensor, torch.Tensor] | None = None
    seen: tuple[int, int] = (-1, -1)

    def install(self) -> None:
        """Puts a new parameter in the place of a tied one."""
        if self.owner is not None:
            module, name, _ = self.owner
            module._parameters[name] = self.tensor  # pyright: ignore[reportArgumentType]

    def take_back(self) -> None:
        """Puts a tied parameter back in its place."""
        if self.owner is not None:
            module, name, before = self.owner
            module._parameters[name] = before

    def take_made(self) -> torch.Tensor:
        """What the parameter becomes; it is not kept here."""
        made, self.made = self.made, torch.empty(0)
        return made

    def settle(self) -> None:
        """Remembers the parameter as it was written."""
        self.seen = self.tensor._version, self.tensor.data_ptr()

    def is_current(self, entry: torch.Tensor | None) -> bool:
        """Whether this is still the model's parameter, and nobody has written to it."""
        now = self.parameter._version, self.parameter.data_ptr()
        return entry is self.parameter and now == self.seen

    def held(self) -> Iterable[torch.Tensor]:
        """The tensors that are kept for the way back."""
        return (
            *(() if self.original is None else (self.original,)),
            *(() if self.factor is None else self.factor.operands),
            *(self.lost or ()),
        )

    def restored(self) -> torch.Tensor:
        """What the parameter was."""
        if self.original is not None:
            return self.original
        assert self.factor is not None
        assert self.lost is not None
        divided = self.factor.divided(self.tensor)
        index, values = (t.to(divided.device) for t in self.lost)
        flat = divided.flatten()
        flat[index.long()] = values
        return flat.view(divided.shape)


@dataclass(frozen=True, slots=True)
class Factor:
    """What a weight was multiplied with, element by element, as a function of the small vectors.

    Attributes:
        compute: the graph that made the new weight.
        place: which of its inputs is the weight.
        shape: of that input.
        operands: the others, in order, as they were.
    """

    compute: fx.GraphModule
    place: int
    shape: torch.Size
    operands: tuple[torch.Tensor, ...]

    def divided(self, folded: torch.Tensor) -> torch.Tensor:
        """The weight before, rounded once."""
        ones = torch.ones(self.shape, dtype=torch.float64, device=folded.device)
        inputs = [t.to(folded.device, torch.float64) for t in self.operands]
        inputs.insert(self.place, ones)
        with without_autocast(folded.device):
            (scale,) = _InFloat64(self.compute).run(*inputs)
        return (folded.double() / scale).to(folded.dtype).contiguous()


class _InFloat64(fx.Interpreter):
    """Runs a graph without the roundings in it."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, in_float64(args), in_float64(kwargs))


def write(changes: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Any]:
    """Writes all or nothing, and empties the list; returns the tensors with what they were."""
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        while changes:
            tensor, made = changes.pop()
            before.append((tensor, tensor.detach().clone()))
            tensor.copy_(made)
    except BaseException:
        for tensor, was in before:
            tensor.copy_(was)
        raise
    return before


def lost(before: torch.Tensor, divided: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is not brought back up to one ulp: its place and its value."""
    was, back = before.double(), divided.double()
    limit = torch.finfo(before.dtype).eps * was.abs()
    kept = ((back - was).abs() > limit) | ~torch.isfinite(back) | ~torch.isfinite(was)
    index = kept.flatten().nonzero().flatten()
    if before.numel() <= torch.iinfo(torch.int32).max:
        index = index.int()
    return index, before.detach().flatten()[index.long()].clone()
