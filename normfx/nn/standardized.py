"""Layers that standardize their weight: no statistic of the activations at all.

Mean and biased variance of each output channel's weight, over its fan-in:

    StdConv2d         W' = (W - mean) / sqrt(var + eps)
    ScaledStdConv2d   W' = gain * gamma * (W - mean) / sqrt(fan_in * (var + eps))

Weight standardization is arXiv 1903.10520, the scaled form arXiv 2101.08692 (NF-ResNet). gamma
makes up for what the activation before it takes from the variance. The state is timm's: gamma is
none of it. At inference W' is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 1 / the standard deviation of activation(n) for a normal n, as timm has them.
GAMMA = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "softsign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}


def standardized(weight: Tensor, eps: float) -> Tensor:
    """A weight with the mean 0 and the biased variance 1 (but for eps) of each output channel.

    Shapes:
        weight: (out, ...). The result is weight's.
    """
    dims = tuple(range(1, weight.dim()))
    variance, mean = torch.var_mean(weight, dims, correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(variance + eps)


class StdConv2d(nn.Conv2d):
    """Arguments, shapes and state of `nn.Conv2d`.

    Args:
        eps: added to the variance of the weight.
    """

    def __init__(self, *args: Any, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution really uses."""
        return standardized(self.weight, self.eps)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the standardized weight."""
        return self._conv_forward(input, self.standardized_weight(), self.bias)


class ScaledStdConv2d(nn.Conv2d):
    """Arguments and shapes of `nn.Conv2d`; its state and gain (out, 1, 1, 1).

    Args:
        gamma: of the activation before it: a number, or a name in `GAMMA`.
        eps: added to the variance of the weight.
        gain_init: of the gain; 0 for the last layer of a residual branch.
    """

    def __init__(
        self,
        *args: Any,
        gamma: float | str = 1.0,
        eps: float = 1e-6,
        gain_init: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.scale = _gamma(gamma) * self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.full_like(self.weight[:, :1, :1, :1], gain_init).detach())

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution really uses."""
        return standardized(self.weight, self.eps) * (self.gain * self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the standardized weight."""
        return self._conv_forward(input, self.standardized_weight(), self.bias)


class ScaledStdLinear(nn.Linear):
    """Arguments and shapes of `nn.Linear`; its state and gain (out, 1).

    Args:
        gamma: of the activation before it: a number, or a name in `GAMMA`.
        eps: added to the variance of the weight.
        gain_init: of the gain.
    """

    def __init__(
        self,
        *args: Any,
        gamma: float | str = 1.0,
        eps: float = 1e-6,
        gain_init: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.scale = _gamma(gamma) * self.in_features**-0.5
        self.gain = nn.Parameter(torch.full_like(self.weight[:, :1], gain_init).detach())

    def standardized_weight(self) -> Tensor:
        """The weight that the layer really uses."""
        return standardized(self.weight, self.eps) * (self.gain * self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """The linear map with the standardized weight."""
        return F.linear(input, self.standardized_weight(), self.bias)


def _gamma(gamma: float | str) -> float:
    if isinstance(gamma, str):
        if gamma not in GAMMA:
            raise ValueError(
                f"expected gamma to be a number or one of {', '.join(GAMMA)}, got {gamma!r}"
            )
        return GAMMA[gamma]
    return float(gamma)
