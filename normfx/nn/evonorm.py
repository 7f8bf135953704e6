"""EvoNorm: normalization and activation in one, found by search.

Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv 2004.02967. Statistics
of images (B, C, H, W): `b` the biased variance of a channel over (B, H, W), `i` that of a channel
of one image, `g` that of a group of channels of one image; `qi` and `qg` mean squares.

    B0  x / max(sqrt(b + eps), v * x + sqrt(i + eps))      S0  x * sigmoid(v * x) / sqrt(g + eps)
    B1  x / max(sqrt(b + eps), (x + 1) * sqrt(qi + eps))   S1  silu(x) / sqrt(g + eps)
    B2  x / max(sqrt(b + eps), sqrt(qi + eps) - x)         S2  silu(x) / sqrt(qg + eps)

and then * weight + bias. Nothing is centred. In evaluation b is `running_var`, which moves by
`momentum` towards the *unbiased* variance in training. Without the activation a variant is its
affine alone; S0a, S1a and S2a keep the division then and drop only the activation. Names and
defaults are timm's (the paper's code has eps 1e-5 throughout and a biased running variance).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfx.nn.channels import Channels, statistics_dtype
from normfx.nn.moments import channel_moments, unbiased
from normfx.nn.state import is_first_pass

_BATCH = ("B0", "B1", "B2")
_SAMPLE = ("S0", "S1", "S2", "S0a", "S1a", "S2a")
_LARGE_EPS = ("B0", "S0a", "S1a", "S2a")


class EvoNorm(nn.Module):
    """One of the nine variants.

    Shapes:
        x: (batch, channels, height, width); any number of dims after the channels works.

    State: weight, bias (C,); v (C,) in B0, S0 and S0a with the activation; running_var (C,) in the
    B variants.

    Args:
        channels: C.
        variant: "B0", "B1", "B2", "S0", "S1", "S2", "S0a", "S1a" or "S2a".
        eps: added to each statistic; by default 1e-3 for B0 and the `a` variants, else 1e-5.
        momentum: the weight of the *new* value in running_var.
        apply_act: whether there is an activation.
        groups: of the S variants.
        sync: sum the statistics of the batch over the ranks of the default process group.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
    """

    running_var: Tensor

    def __init__(
        self,
        channels: int,
        variant: str = "B0",
        *,
        eps: float | None = None,
        momentum: float = 0.1,
        apply_act: bool = True,
        groups: int = 32,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in _BATCH + _SAMPLE:
            raise ValueError(
                f"EvoNorm: expected a variant of {', '.join(_BATCH + _SAMPLE)}, got {variant!r}"
            )
        if variant in _SAMPLE and (groups < 1 or channels % groups):
            raise ValueError(
                f"EvoNorm: expected a number of groups that divides {channels} channels, got "
                f"{groups}; pass groups="
            )
        self.channels = channels
        self.variant = variant
        self.eps = (1e-3 if variant in _LARGE_EPS else 1e-5) if eps is None else eps
        self.momentum = momentum
        self.apply_act = apply_act
        self.groups = groups
        self.sync = sync
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(channels, **made))
        self.bias = nn.Parameter(torch.zeros(channels, **made))
        if apply_act and variant in ("B0", "S0", "S0a"):
            self.v = nn.Parameter(torch.ones(channels, **made))
        if variant in _BATCH:
            self.register_buffer("running_var", torch.ones(channels, **made))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes and activates; in training the B variants also note the variance."""
        channels = Channels(x, self.channels, 1, "EvoNorm")
        wide = x.to(statistics_dtype(x))
        if self.variant in _BATCH:
            y = wide / self._batch_divisor(wide, channels) if self.apply_act else wide
        elif self.apply_act or self.variant.endswith("a"):
            y = self._activated(wide, channels) * self._sample_scale(wide)
        else:
            y = wide
        return (y * channels.align(self.weight) + channels.align(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.channels}, {self.variant}, eps={self.eps}, apply_act={self.apply_act}"

    def _batch_divisor(self, x: Tensor, channels: Channels) -> Tensor:
        variance = self._batch_variance(x, channels) if self.training else self.running_var
        batch = channels.align((variance.to(x.dtype) + self.eps).sqrt())
        space = tuple(range(2, x.dim()))
        if self.variant == "B0":
            own = (x.var(space, correction=0, keepdim=True) + self.eps).sqrt()
            return torch.maximum(batch, channels.align(self.v) * x + own)
        own = (x.square().mean(space, keepdim=True) + self.eps).sqrt()
        return torch.maximum(batch, (x + 1) * own if self.variant == "B1" else own - x)

    def _batch_variance(self, x: Tensor, channels: Channels) -> Tensor:
        """The biased variance of each channel; notes the unbiased one."""
        _, variance, count = channel_moments(x, channels, self.sync)
        if is_first_pass():
            with torch.no_grad():
                new = self.momentum * unbiased(variance, count)
                self.running_var.copy_(new + (1 - self.momentum) * self.running_var)
        return variance

    def _activated(self, x: Tensor, channels: Channels) -> Tensor:
        if not self.apply_act:
            return x
        if self.variant in ("S0", "S0a"):
            return x * (channels.align(self.v) * x).sigmoid()
        return F.silu(x)

    def _sample_scale(self, x: Tensor) -> Tensor:
        """The inverse root of the statistic of a group, at each channel."""
        grouped = x.unflatten(1, (self.groups, -1))
        dims = tuple(range(2, grouped.dim()))
        if self.variant in ("S2", "S2a"):
            statistic = grouped.square().mean(dims, keepdim=True)
        else:
            statistic = grouped.var(dims, correction=0, keepdim=True)
        return torch.rsqrt(statistic + self.eps).expand_as(grouped).flatten(1, 2)
