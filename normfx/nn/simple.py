"""SimpleNorm: by the standard deviation, without subtracting the mean.

    y = x / sqrt(var + eps) * weight            var unbiased, over the channels

What timm's `RmsNorm` computed until the end of 2024, kept there under this name. It is no RMSNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfx.nn.channels import Channels, statistics_dtype


class SimpleNorm(nn.Module):
    """Shapes: x (..., channels). State: weight (C,).

    Args:
        channels: C, at least 2.
        eps: added to the variance.
        channel_dim: where the channels are.
        device: of the parameter.
        dtype: of the parameter.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(
                f"SimpleNorm: expected at least two channels, got {channels}; the unbiased "
                f"variance of one number is undefined"
            )
        self.channels = channels
        self.eps = eps
        self.channel_dim = channel_dim
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes."""
        channels = Channels(x, self.channels, self.channel_dim, type(self).__name__)
        wide = x.to(statistics_dtype(x))
        variance = wide.var(channels.dim, correction=1, keepdim=True)
        scaled = wide * torch.rsqrt(variance + self.eps)
        return (scaled * channels.align(self.weight)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.channels}, eps={self.eps}"


class SimpleNorm2d(SimpleNorm):
    """Shapes: x (batch, channels, height, width). State: weight (C,).

    Args:
        channels: C, at least 2.
        eps: added to the variance.
        device: of the parameter.
        dtype: of the parameter.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps, channel_dim=1, device=device, dtype=dtype)
