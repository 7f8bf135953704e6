"""Targets: the layer that stands in the place of a norm, and what its weight and bias become.

A trained model shall compute as nearly as possible what it did. With s x + t the affine map nearest
to the norm's value over the calibration data (`normfx/calibration/affine.py`), w its weight and b
its bias, a layer that is y = w' (x - m) / sqrt(v + eps) + b' in evaluation gets

    | layer | m | v | w' / w | (b' - b) / w |
    | --- | --- | --- | --- | --- |
    | unified, power without groups | 0 | E[x^2] | s sqrt(v + eps) | t |
    | power with groups | 0 | E[y^2] | sqrt(v + eps) | 0 |
    | batch | E[x] | var(x) | s sqrt(v + eps) | t + s E[x] |

so the first and the last are w (s x + t) + b: the sizes of the channels, which the layers after
were trained on, are in the weight. A PowerNorm with group scaling is w x / rms(x) + b, whatever v
is. Without statistics, and for all other layers, weight and bias stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import normfx.nn as layers
from normfx.conversion.sources import Fit, Source


@dataclass(frozen=True, slots=True)
class Made:
    """A new layer.

    Attributes:
        layer: it.
        factor: what the effective weight is multiplied by, one number for each channel; or None.
        shift: times the effective weight, what is added to the bias; or None.
        holder: the module that has weight and bias, if it is not the layer.
    """

    layer: nn.Module
    factor: Tensor | None = None
    shift: Tensor | None = None
    holder: nn.Module | None = None


Build: TypeAlias = Callable[[Source, nn.Module, "Fit | None", dict[str, Any]], Made]


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of layer.

    Attributes:
        layer: its class.
        build: makes one for a norm (and its module), with what is known of it, and the arguments
            of the layer's constructor.
        of_batch_norm: the only classes that can become this, with running statistics; (): any norm.
    """

    layer: type[nn.Module]
    build: Build
    of_batch_norm: tuple[type[nn.Module], ...] = ()

    def is_already(self, source: Source, module: nn.Module) -> bool:
        """Whether a norm needs no conversion: it is such a layer, or computes the same."""
        if self.layer is layers.MaskedBatchNorm:
            return source.statistic == "batch"
        if self.layer is layers.RMSNorm:
            return source.kind == "RMSNorm"
        return type(module) is self.layer


def _unified(source: Source, module: nn.Module, fit: Fit | None, options: dict[str, Any]) -> Made:
    layer = layers.UnifiedNorm(source.channels, **_usual(source), **options)
    if fit is None:
        return Made(layer)
    _fill(layer.running_var, fit.second)
    _fill(layer.buffer_x2, fit.second)
    root = (fit.second + layer.eps).sqrt()
    return Made(layer, fit.scale * root, fit.shift)


def _power(source: Source, module: nn.Module, fit: Fit | None, options: dict[str, Any]) -> Made:
    layer = layers.PowerNorm(source.channels, **_usual(source), **options)
    if fit is None:
        return Made(layer)
    second = fit.second if layer.groups is None else fit.out_second
    _fill(layer.running_phi, second.reshape(layer.running_phi.shape))
    root = (second + layer.eps).sqrt()
    if layer.groups is None:
        return Made(layer, fit.scale * root, fit.shift)
    return Made(layer, root)


def _batch(source: Source, module: nn.Module, fit: Fit | None, options: dict[str, Any]) -> Made:
    layer = layers.MaskedBatchNorm(source.channels, **_usual(source), **options)
    if fit is None:
        return Made(layer)
    _fill(layer.running_mean, fit.mean)
    _fill(layer.running_var, fit.variance)
    root = (fit.variance + layer.eps).sqrt()
    return Made(layer, fit.scale * root, fit.shift + fit.scale * fit.mean)


def _rms(source: Source, module: nn.Module, fit: Fit | None, options: dict[str, Any]) -> Made:
    given = {"bias": source.bias is not None, **_usual(source), **options}
    return Made(layers.RMSNorm(source.channels, **given))


def _alpha(source: Source, module: nn.Module, fit: Fit | None, options: dict[str, Any]) -> Made:
    layer = layers.AlphaBatchNorm.from_batch_norm(module, **options)
    return Made(layer, holder=layer.layer)


def _unmix(source: Source, module: nn.Module, fit: Fit | None, options: dict[str, Any]) -> Made:
    return Made(layers.UnMixTNS.from_batch_norm(module, **options))


def _usual(source: Source) -> dict[str, Any]:
    """Arguments of every layer: where the channels are, and the eps, if it means the same there.

    Running statistics are in float32 at least: in bfloat16 a momentum of 0.9 stops to move them.
    """
    dtype = torch.promote_types(source.dtype or torch.get_default_dtype(), torch.float32)
    held = {"device": source.device, "dtype": dtype}
    usual = {"channel_dim": source.channel_dim, **held}
    return usual if not source.eps else {**usual, "eps": source.eps}


def _fill(buffer: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        buffer.copy_(values.to(buffer.device))


_WITH_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)

TARGETS: dict[str, Target] = {
    "unified": Target(layers.UnifiedNorm, _unified),
    "power": Target(layers.PowerNorm, _power),
    "batch": Target(layers.MaskedBatchNorm, _batch),
    "rms": Target(layers.RMSNorm, _rms),
    "alpha": Target(layers.AlphaBatchNorm, _alpha, (*_WITH_STATISTICS, nn.BatchNorm3d)),
    "unmix": Target(layers.UnMixTNS, _unmix, _WITH_STATISTICS),
}
