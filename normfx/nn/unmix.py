"""UnMix-TNS: test-time normalization that keeps K components of the statistics apart.

Tomar et al., "Un-Mixing Test-Time Normalization Statistics", ICLR 2024. Components mu_k, s_k of the
mean and variance; of each instance b the mean m_b and biased variance v_b over space:

    p_bk = softmax over k of cos(m_b, mu_k) / 0.07
    M_bk = (1 - p) mu_k + p m_b               S_bk = (1 - p) s_k + p v_b
    mean_b = mean of M over k                 var_b = mean of S + mean of M^2 - (mean of M)^2
    y = (x - mean_b) / sqrt(var_b + eps) * weight + bias

and then, at every call, also in evaluation:

    mu_k += momentum * mean over b of p_bk (m_b - mu_k)       s_k += likewise with v_b

The momentum is that of the BatchNorm it replaces, for a batch of `batch_size` out of
`batch_size_max`: 1 - (1 - bn_momentum) ^ (batch_size / batch_size_max).

A checkpoint around this layer would recompute it with the components already moved: it is made for
test time, and is not to be put into one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfx.nn.channels import Channels, statistics_dtype
from normfx.nn.moments import trained_batch_norm
from normfx.nn.ranks import across_ranks
from normfx.nn.state import is_first_pass, keep


class UnMixTNS(nn.Module):
    """The same in training and in evaluation.

    Shapes:
        x: (batch, channels, height, width). With `dims=1` (batch, channels) or (batch, channels,
            length), which is normalized with the source statistics and adapts nothing.

    State: weight, bias, source_mean, source_var (C,); running_means_mat, running_vars_mat (K, C).

    Args:
        channels: C.
        components: K.
        batch_norm_momentum: of the BatchNorm it replaces.
        batch_size: of the batches to come.
        batch_size_max: the batch size at which the momentum is the BatchNorm's.
        eps: added to the variance.
        temperature: of the softmax.
        dims: 2 for images, 1 for what replaces a BatchNorm1d.
        sync: average the movement over the ranks of the default process group, if there is one.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
    """

    source_mean: Tensor
    source_var: Tensor
    running_means_mat: Tensor
    running_vars_mat: Tensor

    def __init__(
        self,
        channels: int,
        *,
        components: int = 16,
        batch_norm_momentum: float = 0.1,
        batch_size: int = 64,
        batch_size_max: int = 64,
        eps: float = 1e-5,
        temperature: float = 0.07,
        dims: int = 2,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if components < 1 or dims not in (1, 2):
            raise ValueError(
                f"UnMixTNS: expected at least one component and dims of 1 or 2, got "
                f"components={components}, dims={dims}"
            )
        self.channels = channels
        self.eps = eps
        self.temperature = temperature
        self.dims = dims
        self.sync = sync
        self.momentum = 1 - (1 - batch_norm_momentum) ** (batch_size / batch_size_max)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(channels, **made))
        self.bias = nn.Parameter(torch.zeros(channels, **made))
        self.register_buffer("source_mean", torch.zeros(channels, **made))
        self.register_buffer("source_var", torch.ones(channels, **made))
        self.register_buffer("running_means_mat", torch.zeros(components, channels, **made))
        self.register_buffer("running_vars_mat", torch.ones(components, channels, **made))

    @classmethod
    def from_batch_norm(
        cls, norm: Any, *, generator: torch.Generator | None = None, **options: Any
    ) -> UnMixTNS:
        """Takes over a trained BatchNorm, and spreads the components around its statistics.

        Args:
            norm: BatchNorm1d or BatchNorm2d with running statistics.
            generator: of the random spread.
            options: as of the constructor.
        """
        source = trained_batch_norm(norm, "UnMixTNS")
        made = cls(
            source.num_features,
            batch_norm_momentum=0.1 if source.momentum is None else source.momentum,
            eps=source.eps,
            dims=1 if isinstance(norm, nn.BatchNorm1d) else 2,
            device=source.running_mean.device,
            dtype=source.running_mean.dtype,
            **options,
        )
        with torch.no_grad():
            if source.affine:
                made.weight.copy_(source.weight)
                made.bias.copy_(source.bias)
            made.source_mean.copy_(source.running_mean)
            made.source_var.copy_(source.running_var)
            made.reset_components(generator)
        return made.train(source.training)

    @torch.no_grad()
    def reset_components(self, generator: torch.Generator | None = None) -> None:
        """Spreads the components so that their mixture has the source's variance."""
        count = self.running_means_mat.shape[0]
        means, variances = components_of(self.source_mean, self.source_var, count, generator)
        self.running_means_mat.copy_(means)
        self.running_vars_mat.copy_(variances)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes each instance; moves the components towards the batch."""
        channels = Channels(x, self.channels, 1, "UnMixTNS")
        wide = x.to(statistics_dtype(x))
        if self.dims == 1:
            scale = self.weight * torch.rsqrt(self.source_var + self.eps)
            shift = self.bias - self.source_mean * scale
            return (wide * channels.align(scale) + channels.align(shift)).to(x.dtype)
        if x.dim() != 4:
            raise ValueError(
                f"UnMixTNS: expected images (batch, channels, height, width), got an input of "
                f"shape {tuple(x.shape)}; for a replaced BatchNorm1d construct it with dims=1"
            )
        variance, mean = torch.var_mean(wide, (2, 3), correction=0)
        # Copies: the components move below, and a backward pass wants them as they were.
        means = keep(self.running_means_mat.to(wide.dtype))
        variances = keep(self.running_vars_mat.to(wide.dtype))
        p, centre, total = mixed(mean, variance, means, variances, self.temperature)
        if is_first_pass():
            self._move(p, mean.detach(), variance.detach(), means, variances)
        z = (wide - centre[..., None, None]) * torch.rsqrt(total + self.eps)[..., None, None]
        return (z * channels.align(self.weight) + channels.align(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return (
            f"{self.channels}, components={self.running_means_mat.shape[0]}, "
            f"momentum={self.momentum:.6g}, eps={self.eps}, dims={self.dims}"
        )

    @torch.no_grad()
    def _move(
        self, p: Tensor, mean: Tensor, variance: Tensor, means: Tensor, variances: Tensor
    ) -> None:
        instances = mean.new_full((1,), mean.shape[0])
        count = across_ranks(instances, self.sync)
        for running, old, new in (
            (self.running_means_mat, means, mean),
            (self.running_vars_mat, variances, variance),
        ):
            moved = across_ranks((p * (new.unsqueeze(1) - old)).sum(0), self.sync) / count
            running.copy_(old + self.momentum * moved)


def components_of(
    mean: Tensor, variance: Tensor, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Means and variances of components whose mixture has a mean and a variance: (K, C) each."""
    shape = (count, *mean.shape)
    if count == 1:
        return mean.expand(shape), variance.expand(shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(variance)
    spread = (0.5 * count / (count - 1)) ** 0.5 * variance.sqrt()
    return mean + spread * noise, (0.5 * variance).expand(shape)


def mixed(
    mean: Tensor, variance: Tensor, means: Tensor, variances: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of each component in each instance, and the statistics of the mixture.

    Shapes:
        mean, variance: (B, C), of the instances. means, variances: (K, C), of the components.
        Returns (B, K, 1), (B, C) and (B, C).
    """
    with torch.no_grad():
        alike = F.cosine_similarity(mean.unsqueeze(1), means.unsqueeze(0), dim=-1)
        p = torch.softmax(alike / temperature, 1).unsqueeze(-1)
    mixture = torch.lerp(means.unsqueeze(0), mean.unsqueeze(1), p)
    spread = torch.lerp(variances.unsqueeze(0), variance.unsqueeze(1), p)
    centre = mixture.mean(1)
    return p, centre, spread.mean(1) + mixture.square().mean(1) - centre.square()
