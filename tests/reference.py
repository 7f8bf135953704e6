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


def row_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None = None,
    *,
    statistic: str = "variance",
    centre: bool = True,
    correction: int = 0,
    eps: float = 1e-5,
    eps_place: str = "inside",
    scale: float = 1.0,
    activation: str = "none",
    gate_place: str = "none",
) -> Tensor:
    """act(scale * (t - mean) / root * weight + bias) over the last dim, with a gate at one of its places.

    "before": silu(gate) * x is normalized. "after": the result is multiplied by silu(gate). "swish": x * sigmoid(gate * x)
    is divided by the root of x.
    """
    x = x.double()
    if gate is not None:
        gate = gate.double()
    if gate_place == "before":
        x = x * gate * torch.sigmoid(gate)
    n = x.shape[-1]
    mean = x.mean(-1, keepdim=True)
    if statistic == "variance":
        square = ((x - mean) ** 2).sum(-1, keepdim=True) / (n - correction)
    elif statistic == "compressed":  # of n + 1 numbers whose sum is zero
        square = ((x**2).sum(-1, keepdim=True) + x.sum(-1, keepdim=True) ** 2) / (n + 1)
    else:
        square = (x**2).sum(-1, keepdim=True) / (n if statistic == "mean-square" else 1)
    if eps_place == "inside":
        root = (square + eps).sqrt()
    elif eps_place == "floor-inside":
        root = square.clamp_min(eps).sqrt()
    else:
        # a root of zero has the slope zero, as the norm and the deviation of torch have it
        zero = square == 0
        root = torch.where(zero, square, torch.where(zero, torch.ones_like(square), square).sqrt())
        root = root + eps if eps_place == "outside" else root.clamp_min(eps)
    top = x * torch.sigmoid(gate * x) if gate_place == "swish" else x
    top = top - mean if centre else top
    y = ACTIVATIONS[activation](_affine(scale * top / root, weight, bias))
    return y * gate * torch.sigmoid(gate) if gate_place == "after" else y


ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": lambda y: y * torch.sigmoid(y),
    "gelu": lambda y: y * (1 + torch.erf(y / 2**0.5)) / 2,
    "gelu-tanh": lambda y: y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2,
    "sigmoid": torch.sigmoid,
}


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
