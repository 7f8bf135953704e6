"""Error of several versions of one model, measured side by side.

Errors are taken against a float64 run of the original model, because eager is itself rounded: a
compiled model that differs from eager may well be the more accurate of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normfx.numerics import FACTOR, ulp_error


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Distance of one output from eager's and from float64's.

    Attributes:
        from_eager: Largest absolute difference from the eager output.
        from_float64: Largest absolute difference from the float64 output.
        error_ulp: The difference from float64 in units in the last place, see `ulp_error`.
    """

    from_eager: float
    from_float64: float
    error_ulp: float


def accuracy(y: Tensor, eager: Tensor, exact: Tensor) -> Accuracy:
    """Compare an output with eager's and with the float64 run's. NaN stays NaN, and fails."""
    return Accuracy(
        from_eager=(y - eager).abs().max().item(),
        from_float64=(y.double() - exact).abs().max().item(),
        error_ulp=ulp_error(y, exact),
    )


def keeps_promise(compiled: Accuracy, eager: Accuracy) -> bool:
    """Whether the compiled error is at most twice eager's own, or one ulp."""
    return compiled.error_ulp <= max(FACTOR * eager.error_ulp, 1.0)
