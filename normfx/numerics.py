"""Numerics: how far a result is from the exact one, and how far it may be.

    error(got) <= max(2 * error(eager), 1 ulp)

The exact result is that of a run in float64. `docs/numerics.md` says why the bound is this one; it
is the only one, for the tests and for `normfx.verify`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A fold rounds its weights once more than eager does: twice eager's error is what is promised.
FACTOR = 2.0

# No rule may change the function itself by more than float32 can tell from one: statistics are
# computed in at least that.
MEANING = torch.finfo(torch.float32).eps

_SPECIALS = {"NaN": torch.isnan, "+inf": torch.isposinf, "-inf": torch.isneginf}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor beside eager's and the exact one.

    Attributes:
        error: the largest distance from the exact result.
        eager: that of eager.
        size: the largest absolute value of the exact result, which errors are relative to.
        ulp: one unit in the last place of a number of this size.
        problem: what no distance can say: another shape or dtype, NaN at other places; or "".
    """

    error: float = 0.0
    eager: float = 0.0
    size: float = 0.0
    ulp: float = 0.0
    problem: str = ""

    @property
    def allowed(self) -> float:
        """The largest error that the contract admits."""
        return max(FACTOR * self.eager, self.ulp)

    @property
    def within(self) -> bool:
        """Whether the contract holds."""
        return not self.problem and self.error <= self.allowed

    @property
    def error_ulp(self) -> float:
        """The error in units in the last place."""
        return _share(self.error, self.ulp)

    @property
    def eager_ulp(self) -> float:
        """Eager's error in units in the last place."""
        return _share(self.eager, self.ulp)

    @property
    def relative(self) -> float:
        """The error as a share of the largest value."""
        return _share(self.error, self.size)

    def joined(self, other: Comparison) -> Comparison:
        """This and another of the same tensor on other inputs: the larger errors of the two."""
        if self.problem or other.problem:
            return self if self.problem else other
        share = _share(self.ulp, other.ulp) if other.ulp else 1.0  # the sizes are nearly the same
        return Comparison(
            max(self.error, other.error * share),
            max(self.eager, other.eager * share),
            self.size,
            self.ulp,
        )

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return f"error {self.error:.3g}, eager {self.eager:.3g}, ulp {self.ulp:.3g}"


def _share(part: float, whole: float) -> float:
    """A quotient, where nothing of nothing is nothing."""
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf


def compare(got: Tensor, eager: Tensor, exact: Tensor, *, scale: float | None = None) -> Comparison:
    """Holds one tensor against eager's and the exact one.

    Shapes:
        got, eager, exact: the same; another shape of `got` is a problem.

    Dtypes:
        exact: float64, or any that is not floating; then equality is asked for.

    Args:
        got: what is judged.
        eager: what the model itself computes in the same dtype.
        exact: the result of a run in float64.
        scale: the size that one ulp is relative to; without it, the largest absolute value of
            `exact`.
    """
    if got.shape != eager.shape:
        return Comparison(problem=f"shape {tuple(got.shape)}, eager has {tuple(eager.shape)}")
    if got.dtype != eager.dtype:
        return Comparison(problem=f"{got.dtype}, eager has {eager.dtype}")
    if not (got.is_floating_point() or got.is_complex()):
        return Comparison(problem="" if torch.equal(got, eager) else "differs from eager")
    got, eager, exact = (_real(t) for t in (got, eager, exact))
    for name, special in _SPECIALS.items():
        if not torch.equal(special(got), special(eager)):
            return Comparison(problem=f"{name} at other places than eager")
    usable = torch.isfinite(eager) & torch.isfinite(exact)
    if not usable.any():
        return Comparison()
    reference = exact.double()[usable]
    size = reference.abs().max().item() if scale is None else scale
    return Comparison(
        error=(got.double()[usable] - reference).abs().max().item(),
        eager=(eager.double()[usable] - reference).abs().max().item(),
        size=size,
        ulp=torch.finfo(got.dtype).eps * size,
    )


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def ulp_error(y: Tensor, exact: Tensor) -> float:
    """Largest |y - exact| / (eps * max(|exact|, rms of its row)).

    The row's root mean square keeps an element that happens to be near zero from counting as a huge
    error: the sum that made it was rounded at the scale of its neighbours.

    Shapes:
        y, exact: (..., cols).

    Dtypes:
        y: the dtype that is judged; exact: float64.
    """
    scale = torch.maximum(exact.abs(), exact.square().mean(-1, keepdim=True).sqrt())
    # An all-zero row has no scale; the smallest normal number makes any error there huge.
    scale = scale.clamp_min(torch.finfo(y.dtype).tiny)
    return ((y.double() - exact).abs() / (torch.finfo(y.dtype).eps * scale)).max().item()
