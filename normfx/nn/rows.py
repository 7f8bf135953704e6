"""Norms of each row of channels by itself: each token, or each pixel of an image.

    LayerNorm2d                (x - mean) / sqrt(var + eps) * weight + bias
    RMSNorm, RMSNorm2d         x / sqrt(mean of x^2 + eps) * weight + bias
    SimpleNorm, SimpleNorm2d   x / sqrt(var + eps) * weight             var unbiased

all over the channels, which are the last dim, or with 2d dim 1 of images. `nn.GroupNorm(1, C)`,
which is sometimes called the first, is over height and width too. SimpleNorm is what timm's
`RmsNorm` computed until the end of 2024, kept there under this name; it is no RMSNorm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfx.nn.channels import Channels, statistics_dtype


class _RowNorm(nn.Module):
    """y = x / sqrt(S + eps) * weight + bias, with one S for each row."""

    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        eps: float,
        *,
        bias: bool,
        channel_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.channel_dim = channel_dim
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        made = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)

    def _square(self, x: Tensor, dim: int) -> Tensor:
        """S, of size one along `dim`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes each row."""
        channels = Channels(x, self.channels, self.channel_dim, type(self).__name__)
        # Not F.rms_norm: that warns where autocast gives it another dtype than the weight's.
        wide = x.to(statistics_dtype(x))
        y = wide * torch.rsqrt(self._square(wide, channels.dim) + self.eps)
        y = y * channels.align(self.weight)
        return (y if self.bias is None else y + channels.align(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.channels}, eps={self.eps}"


class RMSNorm(_RowNorm):
    """Shapes: x (..., channels), or channels where `channel_dim` is. State: weight (C,), bias (C,).

    `nn.RMSNorm` has no bias, and its channels are the last dim.

    Args:
        channels: C.
        eps: added to the mean square.
        bias: whether it has one.
        channel_dim: where the channels are.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        bias: bool = False,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels, eps, bias=bias, channel_dim=channel_dim, device=device, dtype=dtype
        )

    def _square(self, x: Tensor, dim: int) -> Tensor:
        """The mean square."""
        return x.square().mean(dim, keepdim=True)


class RMSNorm2d(RMSNorm):
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
        super().__init__(channels, eps, channel_dim=1, device=device, dtype=dtype)


class SimpleNorm(_RowNorm):
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
        if channels < 2:
            raise ValueError(
                f"SimpleNorm: expected at least two channels, got {channels}; the unbiased "
                f"variance of one number is undefined"
            )
        super().__init__(
            channels, eps, bias=False, channel_dim=channel_dim, device=device, dtype=dtype
        )

    def _square(self, x: Tensor, dim: int) -> Tensor:
        """The unbiased variance."""
        return x.var(dim, correction=1, keepdim=True)


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
