"""Sources: what a module computes, where it is a norm for each channel and nothing else.

    y = norm(x) * (offset + factor * weight) + bias

The norms of torch and of `normfx.nn` are told by their type, and a subclass is none of them: it may
compute anything. Every other module is proved, see `proof.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import normfx.nn as layers
from normfx.calibration.statistics import SiteStatistics, Statistics
from normfx.record import Refusal


@dataclass(frozen=True, slots=True)
class Source:
    """A module that is a norm.

    Attributes:
        kind: the usual name.
        statistic: what it divides by: "variance", "mean-square" or "sum-square" of each row,
            "batch" for a BatchNorm, "unified" for a constant second moment.
        channels: how many.
        channel_dim: where they are, as in `normfx.nn`.
        eps: the number inside of the root, or None: it stands elsewhere, or is the dtype's own.
        weight: the parameter, or None.
        bias: the parameter, or None.
        factor: of the weight: a number, or one for each channel.
        offset: 1 where the model has 1 + weight.
        fit: of a layer whose statistics are given: the map that it is.
        device: of the module's parameters and buffers; None: it has none.
        dtype: likewise.
    """

    kind: str
    statistic: str
    channels: int
    channel_dim: int
    eps: float | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    factor: float | Tensor = 1.0
    offset: float = 0.0
    fit: Fit | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def beside(self, other: Tensor) -> Source:
        """The same with the device and dtype of a tensor."""
        return replace(self, device=other.device, dtype=other.dtype)

    def scale(self) -> Tensor:
        """Offset + factor * weight, in float64: (channels,)."""
        if self.weight is None:
            ones = torch.ones(self.channels, dtype=torch.float64, device=self.device)
            return self.offset + self.factor * ones
        held = self.weight.detach().double().reshape(-1).expand(self.channels)
        return self.offset + self.factor * held


class Fit(NamedTuple):
    """What data, or a layer itself, says of a norm; float64, (channels,) each.

    The norm's value before weight and bias is near scale * x + shift.

    Attributes:
        mean: of x.
        variance: of x, biased.
        second: E[x^2], smoothed where that was asked for.
        scale: s.
        shift: t.
        out_second: E[y^2] of the value.
    """

    mean: Tensor
    variance: Tensor
    second: Tensor
    scale: Tensor
    shift: Tensor
    out_second: Tensor

    @classmethod
    def of_site(cls, site: SiteStatistics, statistics: Statistics) -> Fit:
        """From a calibration, in the form that the statistics are to be used in."""
        held = site.moments
        out_second = held.out_square / held.rows.clamp_min(1) + held.out_mean.square()
        second = held.second if site.smoothed is None else site.smoothed.running
        scale, shift = site.affine(statistics.form)
        return cls(held.mean, held.variance, second, scale, shift, out_second)

    @classmethod
    def of_layer(cls, mean: Tensor, variance: Tensor, eps: float) -> Fit:
        """Of (x - mean) / sqrt(variance + eps)."""
        mean, variance = (held.detach().double().reshape(-1) for held in (mean, variance))
        scale = torch.rsqrt(variance + eps)
        out_second = scale.square() * variance
        return cls(mean, variance, variance + mean.square(), scale, -scale * mean, out_second)


def by_type(module: Any) -> Source | Refusal | None:
    """What a norm of torch or of `normfx.nn` computes; None for any other module."""
    if is_parametrized(module) and type(module).__bases__[0] in _READERS:
        return Refusal.COMPUTED
    read = _READERS.get(type(module))
    if read is None:
        return None
    if any(
        not isinstance(getattr(module, name, None), (nn.Parameter, type(None)))
        for name in ("weight", "bias")
    ):
        return Refusal.COMPUTED
    return placed(read(module), module)


def placed(source: Source | Refusal, module: nn.Module) -> Source | Refusal:
    """With the device and dtype of its module."""
    held = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return source.beside(held[0]) if held and isinstance(source, Source) else source


def _row(kind: str, statistic: str, channel_dim: int = -1) -> Callable[[Any], Source | Refusal]:
    def read(module: Any) -> Source | Refusal:
        shape = getattr(module, "normalized_shape", None)
        if shape is not None and len(shape) != 1:
            return Refusal.NOT_PER_CHANNEL
        channels = shape[0] if shape is not None else module.channels
        place = getattr(module, "channel_dim", channel_dim)
        weight, bias = module.weight, getattr(module, "bias", None)
        return Source(kind, statistic, channels, place, module.eps, weight, bias)

    return read


def _batch_norm(module: Any) -> Source:
    """Of torch's, or a MaskedBatchNorm."""
    channels = getattr(module, "num_features", None) or module.channels
    fit = None
    if module.running_mean is not None:
        fit = Fit.of_layer(module.running_mean, module.running_var, module.eps)
    place = getattr(module, "channel_dim", 1)
    weight, bias = module.weight, module.bias
    return Source("BatchNorm", "batch", channels, place, module.eps, weight, bias, fit=fit)


def _unified(module: Any) -> Source:
    fit = Fit.of_layer(torch.zeros_like(module.running_var), module.running_var, module.eps)
    return _of_layer(module, "UnifiedNorm", "unified", fit=fit)


def _power(module: Any) -> Source | Refusal:
    """Without group scaling a constant map; with one group an RMSNorm with constants behind it."""
    phi = module.running_phi.detach().double().reshape(-1)
    if module.groups is None:
        fit = Fit.of_layer(torch.zeros_like(phi), phi, module.eps)
        return _of_layer(module, "PowerNorm", "unified", fit=fit)
    if module.groups != 1:
        return Refusal.NOT_PER_CHANNEL
    source = _of_layer(module, "PowerNorm", "mean-square", factor=torch.rsqrt(phi + module.eps))
    return source


def _of_layer(module: Any, kind: str, statistic: str, **more: Any) -> Source:
    place, weight, bias = module.channel_dim, module.weight, module.bias
    return Source(kind, statistic, module.channels, place, module.eps, weight, bias, **more)


def _refused(code: Refusal) -> Callable[[Any], Refusal]:
    return lambda module: code


_READERS: dict[type, Callable[[Any], Source | Refusal]] = {
    nn.LayerNorm: _row("LayerNorm", "variance"),
    nn.RMSNorm: _row("RMSNorm", "mean-square"),
    layers.LayerNorm2d: _row("LayerNorm", "variance", 1),
    layers.RMSNorm: _row("RMSNorm", "mean-square"),
    layers.RMSNorm2d: _row("RMSNorm", "mean-square"),
    layers.SimpleNorm: _row("SimpleNorm", "variance"),
    layers.SimpleNorm2d: _row("SimpleNorm", "variance"),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    layers.MaskedBatchNorm: _batch_norm,
    layers.UnifiedNorm: _unified,
    layers.PowerNorm: _power,
    layers.AlphaBatchNorm: _refused(Refusal.MORE_THAN_NORM),
    layers.UnMixTNS: _refused(Refusal.MORE_THAN_NORM),
    nn.GroupNorm: _refused(Refusal.NOT_PER_CHANNEL),
    nn.InstanceNorm1d: _refused(Refusal.NOT_PER_CHANNEL),
    nn.InstanceNorm2d: _refused(Refusal.NOT_PER_CHANNEL),
    nn.InstanceNorm3d: _refused(Refusal.NOT_PER_CHANNEL),
}
