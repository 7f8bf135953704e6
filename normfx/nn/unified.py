"""Unified Normalization: trains on smoothed batch statistics, and is a constant affine afterwards.

Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers", ACM MM 2022,
arXiv 2208.01313. Names, shapes and the order of updates are those of the released `UN1d`. Step t,
channel c, m = mean of x^2 over the tokens, M the window:

    v = geometric mean of the last M of m           m alone in warm-up and for an outlier
    y = weight * x / sqrt(v + eps) + bias
    running_var = momentum * running_var + (1 - momentum) * v

No mean is subtracted. At inference v is `running_var`, so that y = x * scale + bias folds into the
linear layers that read it. With filtration, a batch is an outlier, for all channels, if in any

    arithmetic mean - geometric mean of the window > M * V

where V is the variance of sqrt(m) over the window *before* this batch and over all channels. (The
paper has the variance of the same window, of one channel: then the inequality can never hold, since
AM - GM <= M * Var(sqrt) for any sample.) An outlier is normalized by its own m, stays out of the
window, and enters `running_var`.

The backward pass is approximate. With z = x / sqrt(v + eps) and rho = sqrt(v + eps) over
sqrt(running_var + eps), within [1/5, 5] (1 until step 1000, in warm-up and for an outlier):

    g = dy * weight * rho                     q = mean of g * z over all positions
    psi = EMA of the arithmetic mean of the last M of q          q alone for an outlier
    dx = (g - psi * z) / sqrt(v + eps)        dweight = rho * sum of dy * z

It is the exact gradient of the channel RMS for a window of 1, and for no other.

The state advances when the gradient arrives (see `state.py`), at once where none is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfx.nn import launched
from normfx.nn.channels import Channels, statistics_dtype
from normfx.nn.ranks import across_ranks
from normfx.nn.state import is_first_pass, keep, now

# The released code compensates the gradient from here on, and by no more than this.
COMPENSATION_STARTS = 1000
COMPENSATION_LIMIT = 5.0


class UnifiedNorm(nn.Module):
    """y = weight * x / sqrt(v + eps) + bias, with one v for each channel.

    Shapes:
        x: (batch, tokens, channels) or (tokens, channels); with `channel_dim=1` images (batch,
            channels, height, width). Any other rank works too.
        pad_mask: x's without the channels, True where x is padding. Padding is left out of the
            statistic of the forward pass (and, as released, not of the backward pass).

    State: weight, bias, running_var, ema_gz (C,); buffer_x2, buffer_gz (window, C); iters,
    skip_counter (1,) int64. A checkpoint of another window loads: the window is then filled with
    its running statistic. For fine-tuning call `restart_warmup`.

    Args:
        channels: C.
        window: how many steps are smoothed over: of both passes, or (forward, backward).
        warmup_steps: steps at the start without smoothing.
        outlier_filtration: whether outliers stay out of the window. The paper has it on for
            images and off for text.
        eps: added to v.
        momentum: the weight of the *old* value in `running_var`.
        channel_dim: where the channels are.
        moment_floor: the least m that enters a geometric mean. With 0, as released, one batch in
            which a channel is all zero makes that channel's v zero for a whole window.
        sync: sum the statistics over the ranks of the default process group, if there is one.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
    """

    running_var: Tensor
    ema_gz: Tensor
    iters: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        channels: int,
        *,
        window: int | Sequence[int] = 4,
        warmup_steps: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
        channel_dim: int = -1,
        moment_floor: float = 0.0,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        forward, backward = (window, window) if isinstance(window, int) else window
        if channels < 1 or forward < 1 or backward < 1:
            raise ValueError(
                f"UnifiedNorm: expected at least one channel and windows of at least 1, got "
                f"channels={channels}, window={window}; a window of 1 is no smoothing"
            )
        self.channels = channels
        self.windows = (forward, backward)
        self.warmup_steps = warmup_steps
        self.outlier_filtration = outlier_filtration
        self.eps = eps
        self.momentum = momentum
        self.channel_dim = channel_dim
        self.moment_floor = moment_floor
        self.sync = sync

        def filled(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, device=device, dtype=dtype or torch.get_default_dtype())

        def counter() -> Tensor:
            return torch.zeros(1, device=device, dtype=torch.int64)

        self.weight = nn.Parameter(filled(1.0, channels))
        self.bias = nn.Parameter(filled(0.0, channels))
        self.register_buffer("running_var", filled(1.0, channels))
        self.register_buffer("ema_gz", filled(0.0, channels))
        self.register_buffer("iters", counter())
        self.register_buffer("buffer_x2", filled(0.0, forward, channels))
        self.register_buffer("buffer_gz", filled(0.0, backward, channels))
        self.register_buffer("skip_counter", counter())

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalizes; in training also notes the statistics of this batch."""
        channels = Channels(x, self.channels, self.channel_dim, "UnifiedNorm")
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return (x * channels.align(scale) + channels.align(self.bias)).to(x.dtype)
        with torch.no_grad():
            batch = self._statistics(self._moment(x, pad_mask, channels))
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, self.weight, self.bias)):
            inverse = torch.rsqrt(batch.v + self.eps)
            kept = keep(torch.stack((batch.moment, batch.v, batch.rho, inverse)))
            # Without filtration it is a constant, which a compiler need not keep.
            outlier = keep(batch.outlier) if self.outlier_filtration else batch.outlier
            return _Normalize.apply(
                x, self.weight, self.bias, kept, outlier, self._state(), self._settings(), channels
            )
        if is_first_pass():
            with torch.no_grad():
                _advance(self._state(), batch, self._settings(), self.iters + 1)
        z = x.to(batch.v.dtype) * channels.align(torch.rsqrt(batch.v + self.eps))
        return (z * channels.align(self.weight) + channels.align(self.bias)).to(x.dtype)

    def restart_warmup(self) -> None:
        """Sets the step to 0, as fine-tuning wants: the statistics of the old data fade out."""
        self.iters.zero_()

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return (
            f"{self.channels}, window={self.windows}, warmup_steps={self.warmup_steps}, "
            f"outlier_filtration={self.outlier_filtration}, eps={self.eps}, "
            f"momentum={self.momentum}, channel_dim={self.channel_dim}"
        )

    def _moment(self, x: Tensor, pad_mask: Tensor | None, channels: Channels) -> Tensor:
        """The mean of x^2 over the positions that count; running_var where there are none."""
        padding = None if pad_mask is None else channels.align_mask(pad_mask, x, "UnifiedNorm")
        total = across_ranks(square_sums(x.detach(), channels, pad_mask, padding), self.sync)
        total, count = total[:-1], total[-1:]
        return torch.where(count > 0, total / count, self.running_var.to(total.dtype))

    def _statistics(self, moment: Tensor) -> _Batch:
        """What this batch is divided by, and whether it is an outlier."""
        size, dtype = self.windows[0], moment.dtype
        window, running = self.buffer_x2.to(dtype), self.running_var.to(dtype)
        step = self.iters + 1
        filled = _put(window, moment, step)
        geometric = filled.clamp(min=self.moment_floor).log().mean(0).exp()
        outlier = torch.zeros_like(step, dtype=torch.bool)
        if self.outlier_filtration and size > 1:
            far = (filled.mean(0) - geometric > size * window.sqrt().var()).any()
            outlier = far & (step >= self.warmup_steps)
        alone = outlier | (step <= size) | (step < self.warmup_steps) | (size == 1)
        v = torch.where(alone, moment, geometric)
        ratio = (v + self.eps).sqrt() / (running + self.eps).sqrt()
        ratio = ratio.clamp(1 / COMPENSATION_LIMIT, COMPENSATION_LIMIT)
        plain = outlier | (step <= max(COMPENSATION_STARTS, self.warmup_steps)) | (size == 1)
        return _Batch(moment, v, torch.where(plain, 1.0, ratio), outlier)

    def _state(self) -> _State:
        return _State(
            self.running_var,
            self.ema_gz,
            self.iters,
            self.buffer_x2,
            self.buffer_gz,
            self.skip_counter,
        )

    def _settings(self) -> _Settings:
        return _Settings(self.eps, self.momentum, self.warmup_steps, self.windows[0], self.sync)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes a checkpoint of another window: its slots have no counterpart here."""
        fitted = dict(state_dict)
        for window, running in (("buffer_x2", "running_var"), ("buffer_gz", "ema_gz")):
            given, known = fitted.get(prefix + window), fitted.get(prefix + running)
            own = getattr(self, window)
            if given is None or known is None or known.shape != own.shape[1:]:
                continue
            if given.shape != own.shape and given.shape[1:] == own.shape[1:]:
                fitted[prefix + window] = known.expand_as(own).clone()
        super()._load_from_state_dict(fitted, prefix, *args, **kwargs)


def square_sums(
    x: Tensor, channels: Channels, pad_mask: Tensor | None, padding: Tensor | None
) -> Tensor:
    """The sums of squares over the positions that count, and behind them their number: (C + 1,).

    Args:
        x: the input.
        channels: where its channels are.
        pad_mask: over positions, True where x is padding, or None.
        padding: the same so that it broadcasts against x.
    """
    if launched.is_launched(x) and not x.requires_grad:
        h = launched.flat(x, channels)
        counted = None if pad_mask is None else launched.flat_mask(~pad_mask, h)
        n, _, squares = launched.operators().channel_moments(h, counted, False, 1)[0].unbind()
        return torch.cat((squares, n[:1]))
    square = x.to(statistics_dtype(x)).square()
    count = square.new_full((1,), channels.positions)
    if pad_mask is not None and padding is not None:
        square = torch.where(padding, 0.0, square)
        count = (~pad_mask).sum().to(square.dtype).reshape(1)
    return torch.cat((channels.sum(square), count))


class _Batch(NamedTuple):
    """What the forward pass found: (C,) each, and (1,)."""

    moment: Tensor
    v: Tensor
    rho: Tensor
    outlier: Tensor


class _State(NamedTuple):
    """The buffers, under the names of the released code."""

    running_var: Tensor
    ema_gz: Tensor
    iters: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor


class _Settings(NamedTuple):
    eps: float
    momentum: float
    warmup_steps: int
    window: int
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
        outlier: Tensor,
        state: _State,
        settings: _Settings,
        channels: Channels,
    ) -> Tensor:
        # x and not z: the layers around keep x anyway.
        ctx.save_for_backward(x, weight, kept, outlier)
        # Not saved tensors: they change between the passes, and are wanted as they are then.
        ctx.state, ctx.settings, ctx.channels = state, settings, channels
        # Of what a checkpoint runs again, the first run has advanced the state or is to do so.
        ctx.advanced = not is_first_pass()
        inverse = kept[3]
        if launched.is_launched(x):
            return launched.affine(x, channels, inverse * weight, bias)
        z = x.to(kept.dtype) * channels.align(inverse)
        return (z * channels.align(weight) + channels.align(bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, kept, outlier = ctx.saved_tensors
        settings, channels = ctx.settings, ctx.channels
        moment, v, rho, inverse = kept.unbind()
        is_launched = launched.is_launched(x)
        if is_launched:
            wide, d = launched.flat(x, channels), launched.flat(dy, channels)
            dbias, dz = launched.operators().channel_sums(d, wide, None, False)[:2]
        else:
            wide, d = x.to(v.dtype), dy.to(v.dtype)
            dbias, dz = channels.sum(d), channels.sum(d * wide)
        dz = dz * inverse
        scale = weight.to(v.dtype) * rho
        total = torch.cat((dz, dz.new_full((1,), channels.positions)))
        total = across_ranks(total, settings.sync)
        q = scale * total[:-1] / total[-1:]

        first = True
        if not torch.compiler.is_compiling():
            # With retain_graph=True there is a second backward pass of the same forward pass.
            first, ctx.advanced = not ctx.advanced, True
        state = _State(*(now(t, q) for t in ctx.state))
        step = state.iters + 1 if first else state.iters
        psi = _smoothed(ctx.state, state, q, outlier, settings, step)
        if first:
            _advance(ctx.state, _Batch(moment, v, rho, outlier), settings, step, state)
        # Stacked, the two factors are computed once for each channel, and not again for each token.
        a, b = torch.stack((scale * inverse, -psi * inverse * inverse)).unbind()
        if is_launched:
            dx = launched.operators().channel_affine(d, wide, a, b, None, None, None)
            dx = launched.unflat(dx, x, channels)
        else:
            dx = d * channels.align(a) + wide * channels.align(b)
        return dx.to(x.dtype), (rho * dz).to(weight.dtype), dbias.to(weight.dtype), *[None] * 5


def _smoothed(
    state: _State, known: _State, q: Tensor, outlier: Tensor, settings: _Settings, step: Tensor
) -> Tensor:
    """What replaces q in the gradient; notes q in the window of the backward pass.

    A gradient that overflowed (the step that a loss scaler skips) is not noted: it would stay.
    """
    size = state.buffer_gz.shape[0]
    skip = outlier | (settings.window == 1)
    old, slots = known.ema_gz.to(q.dtype), known.buffer_gz.to(q.dtype)
    window = _put(slots, torch.where(skip, old, q), step)
    alone = skip | (step <= size) | (step < settings.warmup_steps)
    recent = torch.where(alone, q, window.mean(0))
    ema = settings.momentum * old + (1 - settings.momentum) * recent
    finite = q.isfinite().all()
    state.buffer_gz.copy_(torch.where(finite, window, slots))
    state.ema_gz.copy_(torch.where(finite, ema, old))
    return torch.where(skip, recent, ema)


def _advance(
    state: _State, batch: _Batch, settings: _Settings, step: Tensor, known: _State | None = None
) -> None:
    """Notes a batch in the state of the forward pass, unless it is not finite.

    Args:
        state: what is changed.
        batch: what the forward pass found.
        settings: of the layer.
        step: the number of this batch.
        known: the state to begin with, if not `state`.
    """
    known = known or state
    dtype = batch.moment.dtype
    running, slots = known.running_var.to(dtype), known.buffer_x2.to(dtype)
    entry = torch.where(batch.outlier, running, batch.moment)
    moved = settings.momentum * running + (1 - settings.momentum) * batch.v
    counted = known.skip_counter + batch.outlier.to(torch.int64)
    finite = batch.moment.isfinite().all()
    state.buffer_x2.copy_(torch.where(finite, _put(slots, entry, step), slots))
    state.running_var.copy_(torch.where(finite, moved, running))
    state.skip_counter.copy_(counted)
    state.iters.copy_(step)


def _put(window: Tensor, entry: Tensor, step: Tensor) -> Tensor:
    """A ring (slots, C) with its slot of this step replaced."""
    slots = torch.arange(window.shape[0], device=window.device)
    return torch.where((slots == step % window.shape[0]).unsqueeze(1), entry, window)
