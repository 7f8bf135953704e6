"""What each normalization is, in float64 and in the words of its definition. Imports nothing from normfx."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int = 1
) -> Tensor:
    axes = tuple(range(-dims, 0))
    x = x.double()
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    return _affine((x - mean) / (variance + eps).sqrt(), weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    return _affine(x / ((x**2).mean(-1, keepdim=True) + eps).sqrt(), weight, None)


def l2_norm(x: Tensor, eps: float, dim: int = -1) -> Tensor:
    """x / max(|x|, eps), as `torch.nn.functional.normalize` has it."""
    x = x.double()
    length = (x**2).sum(dim, keepdim=True).sqrt()
    return x / torch.where(length > eps, length, torch.full_like(length, eps))


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    grouped = x.double().reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(-1, keepdim=True)
    return _channels(((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape), weight, bias)


def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return group_norm(x, x.shape[1], weight, bias, eps)


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, weight, bias, eps: float) -> Tensor:
    """With given statistics, as in eval mode."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    normal = (x.double() - mean.double().view(shape)) / (variance.double().view(shape) + eps).sqrt()
    return _channels(normal, weight, bias)


def batch_norm_training(x: Tensor, weight, bias, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """With the statistics of the batch; these are returned too, the variance unbiased, as running statistics take it."""
    axes = [d for d in range(x.dim()) if d != 1]
    wide = x.double()
    mean = wide.mean(axes)
    variance = wide.var(axes, correction=0)
    count = x.numel() // x.shape[1]
    return batch_norm(x, mean, variance, weight, bias, eps), mean, variance * count / (count - 1)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight.double()
    return x if bias is None else x + bias.double()


def _channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    return _affine(
        x,
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
    )
