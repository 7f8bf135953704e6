"""LayerNorm and RMSNorm over the channels of images: each pixel by itself.

    LayerNorm2d   (x - mean) / sqrt(var + eps) * weight + bias       over dim 1
    RMSNorm2d     x / sqrt(mean of x^2 + eps) * weight               over dim 1

`nn.GroupNorm(1, C)`, which is sometimes called the same, is over height and width too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfx.nn.channels import Channels, statistics_dtype


class LayerNorm2d(nn.LayerNorm):
    """Shapes: x (batch, channels, height, width). State: weight, bias (C,).

    Args:
        channels: C.
        eps: added to the variance.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps=eps, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes each pixel."""
        Channels(input, self.normalized_shape[0], 1, "LayerNorm2d")
        last = input.movedim(1, -1)
        normalized = F.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps)
        return normalized.movedim(-1, 1)


class RMSNorm2d(nn.Module):
    """Shapes: x (batch, channels, height, width). State: weight (C,).

    Args:
        channels: C.
        eps: added to the mean square.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes each pixel."""
        channels = Channels(x, self.channels, 1, "RMSNorm2d")
        # Not F.rms_norm: that warns where autocast gives it another dtype than the weight's.
        wide = x.to(statistics_dtype(x))
        scaled = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + self.eps)
        return (scaled * channels.align(self.weight)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.channels}, eps={self.eps}"
