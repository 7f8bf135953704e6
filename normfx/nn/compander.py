"""Weight compander: a weight that is bounded, and steep near zero.

arXiv 2306.16993. Every weight is a function of a trained value v,

    w = a * arctan(v / b)

so that |w| < a * pi / 2, and a small change of a small v moves w away from zero. The abstract has
the function in words alone (bounded, steep at zero, parameters that may be learned), and no code is
released: this form has these properties, and is not confirmed to be theirs.

At inference w is a constant: the parametrization is computed once and dropped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class WeightCompander(nn.Module):
    """A parametrization for `torch.nn.utils.parametrize`.

    State: a, b () float, as parameters if they are learned, else as buffers.

    Args:
        bound: what |w| stays below, a * pi / 2.
        slope: of w at v = 0, a / b; above 1 it is steep.
        learned: whether a and b are trained.
        device: of a and b.
        dtype: of a and b.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        bound: float,
        slope: float = 2.0,
        *,
        learned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not bound > 0 or not slope > 0:
            raise ValueError(
                f"WeightCompander: expected a positive bound and slope, got bound={bound}, "
                f"slope={slope}; the bound has to lie above the largest weight"
            )
        limit = bound * 2 / math.pi
        for name, value in (("a", limit), ("b", limit / slope)):
            held = torch.tensor(value, device=device, dtype=dtype or torch.get_default_dtype())
            if learned:
                self.register_parameter(name, nn.Parameter(held))
            else:
                self.register_buffer(name, held)

    def forward(self, v: Tensor) -> Tensor:
        """The weight."""
        return self.a * torch.atan(v / self.b)

    def right_inverse(self, w: Tensor) -> Tensor:
        """The value that gives a weight; runs when a weight is registered or assigned."""
        with torch.no_grad():
            if bool((w.abs() >= self.a * (math.pi / 2)).any()):
                raise ValueError(
                    f"WeightCompander: expected weights below {float(self.a) * math.pi / 2:.6g}, "
                    f"got one of {float(w.abs().max()):.6g}; give a larger bound"
                )
            return self.b * torch.tan(w / self.a)


def compand(
    module: nn.Module,
    name: str = "weight",
    *,
    bound: float | None = None,
    slope: float = 2.0,
    learned: bool = False,
) -> nn.Module:
    """Registers a WeightCompander on a weight; the weight keeps its value.

    Args:
        module: with the weight.
        name: of the weight.
        bound: by default twice the largest absolute value of the weight.
        slope: of the weight at zero.
        learned: whether the compander's parameters are trained.

    Returns:
        The module.
    """
    weight = getattr(module, name)
    if bound is None:
        largest = float(weight.detach().abs().max())
        bound = 2 * largest if largest > 0 else 1.0
    made = WeightCompander(bound, slope, learned=learned, device=weight.device, dtype=weight.dtype)
    return parametrize.register_parametrization(module, name, made)
