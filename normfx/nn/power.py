"""PowerNorm: the running mean square of each channel in place of the batch's.

Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020, arXiv
2003.07845. Names, shapes and the order of updates are those of the released `MaskPowerNorm`. Step
t, channel c, v = mean of x^2 over the tokens (x after group scaling):

    z = x / sqrt(v + eps)                     in the first `warmup_steps`
    z = x / sqrt(running_phi + eps)           later, with the value before this step
    y = weight * z + bias
    running_phi = running_phi * (t - 1) / t + v / t        for t < warmup_steps, and then always
    running_phi = alpha_forward * running_phi + (1 - alpha_forward) * v

    g = dy * weight - (1 - alpha_backward) * ema_gz * z
    dx = g / sqrt(v + eps)                    v is this batch's, also after the warm-up
    ema_gz = ema_gz + mean of g * z over all positions

Group scaling comes first, in training and in evaluation: x over the root mean square of each token
over a group of channels. It is a reduction that stays at inference; `groups=None` leaves it out,
and then the layer in evaluation is a constant affine. `variant="PN-V"` is the paper's first form:
the batch's own v with the exact gradient, and a running_phi only for evaluation.

The state advances when the gradient arrives (see `state.py`), at once where none is asked for.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfx.nn import launched
from normfx.nn.channels import Channels, statistics_dtype
from normfx.nn.ranks import across_ranks
from normfx.nn.state import is_first_pass, keep, now
from normfx.nn.unified import square_sums

GROUP_SCALING_EPS = 1e-5


class PowerNorm(nn.Module):
    """y = weight * x / sqrt(phi + eps) + bias, with one phi for each channel.

    Shapes:
        x: (time, batch, channels), or (batch, time, channels) with `batch_first`, or (tokens,
            channels); with `channel_dim=1` images.
        pad_mask: (batch, time), True where x is padding, which is left out of v (and, as released,
            not of the backward pass).

    State: weight, bias (C,); running_phi, ema_gz (1, C, 1, 1); iters (1,) int64.

    Args:
        channels: C.
        groups: of group scaling, or None: no group scaling.
        warmup_steps: steps at the start that are normalized by the batch's own v.
        eps: added to v and to running_phi.
        alpha_forward: the weight of the *old* value in running_phi.
        alpha_backward: what is left of ema_gz at each step.
        group_scaling_eps: added to the mean square of a group.
        variant: "PN" or "PN-V".
        batch_first: whether x has the batch in front of the time.
        channel_dim: where the channels are.
        sync: sum the statistics over the ranks of the default process group, if there is one.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
    """

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor

    def __init__(
        self,
        channels: int,
        *,
        groups: int | None = 1,
        warmup_steps: int = 10000,
        eps: float = 1e-5,
        alpha_forward: float = 0.9,
        alpha_backward: float = 0.9,
        group_scaling_eps: float = GROUP_SCALING_EPS,
        variant: Literal["PN", "PN-V"] = "PN",
        batch_first: bool = False,
        channel_dim: int = -1,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups is not None and (groups < 1 or channels % groups):
            raise ValueError(
                f"PowerNorm: expected a number of groups that divides {channels} channels, got "
                f"{groups}; the released models use the number of attention heads, and None is no "
                f"group scaling"
            )
        if variant not in ("PN", "PN-V"):
            raise ValueError(f"PowerNorm: expected variant 'PN' or 'PN-V', got {variant!r}")
        self.channels = channels
        self.groups = groups
        self.warmup_steps = warmup_steps
        self.eps = eps
        self.alpha_forward = alpha_forward
        self.alpha_backward = alpha_backward
        self.group_scaling_eps = group_scaling_eps
        self.variant = variant
        self.batch_first = batch_first
        self.channel_dim = channel_dim
        self.sync = sync
        made: dict[str, Any] = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.weight = nn.Parameter(torch.ones(channels, **made))
        self.bias = nn.Parameter(torch.zeros(channels, **made))
        self.register_buffer("running_phi", torch.ones(1, channels, 1, 1, **made))
        self.register_buffer("ema_gz", torch.zeros(1, channels, 1, 1, **made))
        self.register_buffer("iters", torch.zeros(1, device=device, dtype=torch.int64))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalizes; in training also notes the statistics of this batch."""
        channels = Channels(x, self.channels, self.channel_dim, "PowerNorm")
        out = x.dtype
        if self.groups is not None:
            x = group_scaled(x, self.groups, channels.dim, self.group_scaling_eps)
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_phi.reshape(-1) + self.eps)
            return (x * channels.align(scale) + channels.align(self.bias)).to(out)
        exact = self.variant == "PN-V"
        moment = self._moment(x if exact else x.detach(), pad_mask, channels)
        settings = self._settings()
        state = _State(self.running_phi, self.ema_gz, self.iters)
        if exact:
            if is_first_pass():
                with torch.no_grad():
                    _advance(state, moment, settings, self.iters + 1)
            return self._normalized(x, moment, channels).to(out)
        divisor = torch.where(
            self.iters + 1 <= self.warmup_steps, moment, self.running_phi.reshape(-1)
        ).to(moment.dtype)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, self.weight, self.bias)):
            kept = keep(torch.stack((moment, divisor)).detach())
            return _Normalize.apply(x, self.weight, self.bias, kept, state, settings, channels).to(
                out
            )
        if is_first_pass():
            with torch.no_grad():
                _advance(state, moment, settings, self.iters + 1)
        return self._normalized(x, divisor, channels).to(out)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return (
            f"{self.channels}, groups={self.groups}, warmup_steps={self.warmup_steps}, "
            f"eps={self.eps}, variant={self.variant}, channel_dim={self.channel_dim}"
        )

    def _normalized(self, x: Tensor, v: Tensor, channels: Channels) -> Tensor:
        z = x.to(v.dtype) * channels.align(torch.rsqrt(v + self.eps))
        return z * channels.align(self.weight) + channels.align(self.bias)

    def _moment(self, x: Tensor, pad_mask: Tensor | None, channels: Channels) -> Tensor:
        """The mean of x^2 over the positions that count; running_phi where there are none."""
        padding = None
        if pad_mask is not None:
            layer = "PowerNorm"
            if not self.batch_first and x.dim() == 3 and channels.dim == 2 and pad_mask.dim() == 2:
                pad_mask = pad_mask.transpose(0, 1)
                layer = "PowerNorm, for time first its mask (batch, time) transposed"
            padding = channels.align_mask(pad_mask, x, layer)
        total = across_ranks(square_sums(x, channels, pad_mask, padding), self.sync)
        total, count = total[:-1], total[-1:]
        return torch.where(count > 0, total / count, self.running_phi.reshape(-1).to(total.dtype))

    def _settings(self) -> _Settings:
        return _Settings(
            self.eps, self.alpha_forward, self.alpha_backward, self.warmup_steps, self.sync
        )


def group_scaled(
    x: Tensor, groups: int, channel_dim: int = -1, eps: float = GROUP_SCALING_EPS
) -> Tensor:
    """X over the root mean square of each token over each group of channels.

    Shapes:
        x: any, with a multiple of `groups` channels in `channel_dim`. The result is x's.
    """
    dim = channel_dim % x.dim()
    grouped = x.unflatten(dim, (groups, -1))
    wide = grouped.to(statistics_dtype(x))
    scaled = wide * torch.rsqrt(wide.square().mean(dim + 1, keepdim=True) + eps)
    return scaled.flatten(dim, dim + 1).to(x.dtype)


class _State(NamedTuple):
    """The buffers, under the names of the released code."""

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor


class _Settings(NamedTuple):
    eps: float
    alpha_forward: float
    alpha_backward: float
    warmup_steps: int
    sync: bool


class _Normalize(torch.autograd.Function):
    """The normalization with the approximate gradient, which advances the state on its way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        kept: Tensor,
        state: _State,
        settings: _Settings,
        channels: Channels,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, kept)
        # Not saved tensors: they change between the passes, and are wanted as they are then.
        ctx.state, ctx.settings, ctx.channels = state, settings, channels
        # Of what a checkpoint runs again, the first run has advanced the state or is to do so.
        ctx.advanced = not is_first_pass()
        inverse = torch.rsqrt(kept[1] + settings.eps)
        if launched.is_launched(x):
            return launched.affine(x, channels, inverse * weight, bias)
        z = x.to(kept.dtype) * channels.align(inverse)
        return (z * channels.align(weight) + channels.align(bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, kept = ctx.saved_tensors
        settings, channels = ctx.settings, ctx.channels
        moment, divisor = kept.unbind()
        inverse = torch.rsqrt(divisor + settings.eps)
        is_launched = launched.is_launched(x)
        if is_launched:
            z, d = launched.flat(x, channels), launched.flat(dy, channels)
            dbias, dz, zz = launched.operators().channel_sums(d, z, None, True).unbind()
            dz, zz = inverse * dz, inverse * inverse * zz
        else:
            z = x.to(kept.dtype) * channels.align(inverse)
            d = dy.to(kept.dtype)
            dz, zz = channels.sum(d * z), channels.sum(z * z)
            dbias = channels.sum(d)

        first = True
        if not torch.compiler.is_compiling():
            # With retain_graph=True there is a second backward pass of the same forward pass.
            first, ctx.advanced = not ctx.advanced, True
        state = _State(*(now(t, dz) for t in ctx.state))
        ema = state.ema_gz.reshape(-1).to(kept.dtype)
        correction = (1 - settings.alpha_backward) * ema
        wide = weight.to(kept.dtype)
        # The sum of g * z is made of sums that are needed anyway, but for that of z * z.
        total = wide * dz - correction * zz
        total = torch.cat((total, total.new_full((1,), channels.positions)))
        total = across_ranks(total, settings.sync)
        moved = ema + total[:-1] / total[-1:]
        # A gradient that overflowed (the step that a loss scaler skips) would stay.
        moved = torch.where(moved.isfinite().all(), moved, ema)
        ctx.state.ema_gz.copy_(moved.reshape(ctx.state.ema_gz.shape))
        if first:
            _advance(ctx.state, moment, settings, state.iters + 1, state)
        last = torch.rsqrt(moment + settings.eps)
        if is_launched:
            a, b = wide * last, -correction * inverse * last
            dx = launched.operators().channel_affine(d, z, a, b, None, None, None)
            dx = launched.unflat(dx, x, channels)
        else:
            g = d * channels.align(wide) - channels.align(correction) * z
            dx = g * channels.align(last)
        return dx.to(x.dtype), dz.to(weight.dtype), dbias.to(weight.dtype), *[None] * 4


def _advance(
    state: _State, moment: Tensor, settings: _Settings, step: Tensor, known: _State | None = None
) -> None:
    """Notes a batch in the running mean square, unless it is not finite.

    Args:
        state: what is changed.
        moment: the batch's mean square.
        settings: of the layer.
        step: the number of this batch.
        known: the state to begin with, if not `state`.
    """
    known = known or state
    old = phi = known.running_phi.reshape(-1).to(moment.dtype)
    averaged = phi * (step - 1) / step + moment / step
    phi = torch.where(step < settings.warmup_steps, averaged, phi)
    phi = settings.alpha_forward * phi + (1 - settings.alpha_forward) * moment
    phi = torch.where(moment.isfinite().all(), phi, old)
    state.running_phi.copy_(phi.reshape(state.running_phi.shape))
    state.iters.copy_(step)
