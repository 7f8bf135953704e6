"""Filter Response Normalization: each channel of each image by its own root mean square.

Singh and Krishnan, CVPR 2020, arXiv 1911.09737. q = mean of x^2 over height and width:

    y = max(x / sqrt(q + eps) * weight + bias, tau)

The maximum with the learned threshold, the thresholded linear unit, is optional.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfx.nn.channels import Channels, statistics_dtype


class FilterResponseNorm(nn.Module):
    """Shapes: x (batch, channels, height, width). State: weight, bias, tau (C,).

    Args:
        channels: C.
        eps: added to the mean square.
        thresholded_linear_unit: whether there is the maximum with tau; without it there is no tau.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        thresholded_linear_unit: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(channels, **made))
        self.bias = nn.Parameter(torch.zeros(channels, **made))
        self.tau = nn.Parameter(torch.zeros(channels, **made)) if thresholded_linear_unit else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes."""
        channels = Channels(x, self.channels, 1, "FilterResponseNorm")
        wide = x.to(statistics_dtype(x))
        square = wide.square().mean(tuple(range(2, x.dim())), keepdim=True)
        y = wide * torch.rsqrt(square + self.eps)
        y = y * channels.align(self.weight) + channels.align(self.bias)
        if self.tau is not None:
            y = torch.maximum(y, channels.align(self.tau))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.channels}, eps={self.eps}, thresholded_linear_unit={self.tau is not None}"
