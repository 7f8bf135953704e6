"""Global Response Normalization: how strong a channel is beside the others, at each image.

Woo et al., "ConvNeXt V2", CVPR 2023, arXiv 2301.00808. G = the 2-norm of a channel of one image:

    y = x + x * G / (mean of G over the channels + eps) * weight + bias

Both parameters begin at zero, where it is the identity. State names are timm's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfx.nn.channels import Channels, statistics_dtype


class GlobalResponseNorm(nn.Module):
    """Shapes: x (batch, height, width, channels), or channels first. State: weight, bias (C,).

    Args:
        channels: C.
        eps: added to the mean of G.
        channels_last: where the channels are.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-6,
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.channel_dim = -1 if channels_last else 1
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.zeros(channels, **made))
        self.bias = nn.Parameter(torch.zeros(channels, **made))

    def forward(self, x: Tensor) -> Tensor:
        """Adds the normalized response."""
        channels = Channels(x, self.channels, self.channel_dim, "GlobalResponseNorm")
        wide = x.to(statistics_dtype(x))
        space = tuple(d for d in channels.others if d != 0)
        strength = torch.linalg.vector_norm(wide, 2, space, keepdim=True)
        relative = strength / (strength.mean(channels.dim, keepdim=True) + self.eps)
        response = wide * relative * channels.align(self.weight) + channels.align(self.bias)
        return (wide + response).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.channels}, eps={self.eps}, channels_last={self.channel_dim == -1}"
