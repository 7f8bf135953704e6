"""Region Normalization: the masked and the unmasked part of an image, each by itself.

Yu et al., "Region Normalization for Image Inpainting", AAAI 2020, arXiv 1911.10375. For a region m
of S pixels out of n, with its mean and biased variance:

    rn(x, m) = m * (x - mean) / sqrt(var + eps * n / S)           eps grows as the region shrinks

and y0 = rn(x, m) + rn(x, 1 - m). The statistics are of the current batch, also in evaluation.

    binary      y0
    basic       y0 * (m * (1 + foreground_gamma) + (1 - m) * (1 + background_gamma))
                + foreground_beta + background_beta      (both betas everywhere, as released)
    learnable   y0 * (1 + gamma) + beta, where m, gamma and beta come from the features:
                a = sigmoid(conv([mean of x, max of x over the channels])), m = a >= threshold,
                gamma = conv(a), beta = conv(a)

An empty region contributes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfx.nn import launched
from normfx.nn.channels import Channels, statistics_dtype
from normfx.nn.ranks import across_ranks

EPS = 1e-5


class _Regions(nn.Module):
    """What the three layers share."""

    def __init__(self, channels: int, *, eps: float = EPS, sync: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.sync = sync

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.channels}, eps={self.eps}"

    def _resized(self, mask: Tensor, x: Tensor) -> Tensor:
        """The mask at the size of the features, in the dtype of statistics."""
        Channels(x, self.channels, 1, type(self).__name__)
        if x.dim() != 4 or mask.dim() != 4 or mask.shape[:2] != (x.shape[0], 1):
            raise ValueError(
                f"{type(self).__name__}: expected features (batch, channels, height, width) and a "
                f"mask (batch, 1, height, width) of the same batch, got {tuple(x.shape)} and "
                f"{tuple(mask.shape)}; the mask is one channel of zeros and ones"
            )
        return F.interpolate(mask.detach().to(statistics_dtype(x)), x.shape[2:], mode="nearest")

    def _regions(self, x: Tensor, mask: Tensor) -> Tensor:
        if launched.is_launched(x, self.sync):
            return self._both(x, mask)
        return self._region(x, mask) + self._region(x, 1 - mask)

    def _both(self, x: Tensor, mask: Tensor) -> Tensor:
        """Both regions, whose moments come from one reading of x."""
        channels = Channels(x, self.channels, 1, type(self).__name__)
        h, marked = launched.flat(x, channels), mask > 0
        moments = launched.operators().channel_moments(h, marked.flatten(1), True, 2)
        n, mean, m2 = moments.unbind(1)
        size = n.clamp(min=1)
        scale = torch.rsqrt(m2 / size + self.eps * channels.positions / size)
        means, scales = ([channels.align(of) for of in both] for both in (mean, scale))
        return (x - torch.where(marked, *means)) * torch.where(marked, *scales)

    def _region(self, x: Tensor, mask: Tensor) -> Tensor:
        channels = Channels(x, self.channels, 1, type(self).__name__)
        grid = mask.new_full((1,), channels.positions)
        total = torch.cat((channels.sum(x * mask), mask.sum().reshape(1), grid))
        total = across_ranks(total, self.sync)
        size, grid = total[-2:-1].clamp(min=1), total[-1:]
        centred = (x - channels.align(total[:-2] / size)) * mask
        variance = across_ranks(channels.sum(centred.square()), self.sync) / size
        return centred * channels.align(torch.rsqrt(variance + self.eps * grid / size))


class RegionNormBinary(_Regions):
    """The normalization alone.

    Shapes:
        x: (batch, channels, height, width).
        mask: (batch, 1, height, width) of zeros and ones, of any size: nearest neighbours are
            taken.

    No state.

    Args:
        channels: C.
        eps: added to the variance of the whole grid.
        sync: sum the statistics over the ranks of the default process group, if there is one.
    """

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Normalizes both regions."""
        wide = x.to(statistics_dtype(x))
        return self._regions(wide, self._resized(mask, x)).to(x.dtype)


class RegionNormBasic(_Regions):
    """RN-B: with a scale for each region.

    Shapes: as RegionNormBinary; the mask is 1 in the hole.

    State: foreground_gamma, foreground_beta, background_gamma, background_beta (C,), zeros.

    Args:
        channels: C.
        eps: added to the variance of the whole grid.
        sync: sum the statistics over the ranks of the default process group, if there is one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = EPS,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps=eps, sync=sync)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.foreground_gamma = nn.Parameter(torch.zeros(channels, **made))
        self.foreground_beta = nn.Parameter(torch.zeros(channels, **made))
        self.background_gamma = nn.Parameter(torch.zeros(channels, **made))
        self.background_beta = nn.Parameter(torch.zeros(channels, **made))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Normalizes both regions and scales each by its own."""
        m = self._resized(mask, x)
        align = Channels(x, self.channels, 1, "RegionNormBasic").align
        scale = m * (1 + align(self.foreground_gamma))
        scale = scale + (1 - m) * (1 + align(self.background_gamma))
        shift = align(self.foreground_beta) + align(self.background_beta)
        return (self._regions(x.to(m.dtype), m) * scale + shift).to(x.dtype)


class RegionNormLearnable(_Regions):
    """RN-L: the mask, the scale and the shift of each pixel come from the features.

    Shapes:
        x: (batch, channels, height, width).

    State: sa.conv1.weight (1, 2, k, k); sa.gamma_conv and sa.beta_conv: weight (1, 1, k, k), bias
    (1,).

    Args:
        channels: C.
        threshold: of the mask; no gradient passes it.
        kernel_size: k, odd.
        eps: added to the variance of the whole grid.
        sync: sum the statistics over the ranks of the default process group, if there is one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        threshold: float = 0.8,
        kernel_size: int = 7,
        eps: float = EPS,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps=eps, sync=sync)
        if kernel_size % 2 == 0:
            raise ValueError(
                f"RegionNormLearnable: expected an odd kernel_size, got {kernel_size}; an even one "
                f"would not keep the size of the features"
            )
        self.threshold = threshold
        self.sa = _SpatialAttention(kernel_size, {"device": device, "dtype": dtype})

    def forward(self, x: Tensor) -> Tensor:
        """Finds the regions, normalizes them and applies the pixels' affine."""
        Channels(x, self.channels, 1, "RegionNormLearnable")
        attention, gamma, beta = self.sa(x)
        wide = x.to(statistics_dtype(x))
        mask = (attention.detach() >= self.threshold).to(wide.dtype)
        return (self._regions(wide, mask) * (1 + gamma) + beta).to(x.dtype)


class _SpatialAttention(nn.Module):
    def __init__(self, kernel_size: int, made: dict[str, Any]) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=padding, bias=False, **made)
        self.gamma_conv = nn.Conv2d(1, 1, kernel_size, padding=padding, **made)
        self.beta_conv = nn.Conv2d(1, 1, kernel_size, padding=padding, **made)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True).values), 1)
        attention = self.conv1(seen).sigmoid()
        return attention, self.gamma_conv(attention), self.beta_conv(attention)
