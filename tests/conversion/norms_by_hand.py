"""Norm modules as libraries write them, and modules that are nearly one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

C = 8


def vector(low: float = 0.5, high: float = 1.5) -> nn.Parameter:
    return nn.Parameter(torch.linspace(low, high, C))


class Llama(nn.Module):
    """Half precision in, the weight after the downcast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = vector(), 1e-6

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


class Gemma(nn.Module):
    """A weight around zero, plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = vector(-0.5, 0.5), 1e-6

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class Tf(nn.Module):
    """A LayerNorm with other names."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta, self.eps = vector(), vector(-1, 1), 1e-5

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.gamma * (x - mean) / torch.sqrt(variance + self.eps) + self.beta


class Pixels(nn.LayerNorm):
    """A subclass of nn.LayerNorm that is none: over the channels of images."""

    def __init__(self) -> None:
        super().__init__(C, eps=1e-6)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Scale(nn.Module):
    """ScaleNorm: an L2 norm with one number for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(2.5))
        self.like = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return self.g * self.like * F.normalize(x, dim=-1)


class Bare(nn.Module):
    """An RMSNorm without parameters."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Gated(Llama):
    """Takes a gate too: what it computes depends on that."""

    def forward(self, hidden_states, gate=None):
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


class Dropped(Llama):
    """With dropout after it: not the same in training."""

    def forward(self, hidden_states):
        return F.dropout(super().forward(hidden_states), 0.5, self.training)


class Added(Llama):
    """With a residual."""

    def forward(self, hidden_states):
        return hidden_states + super().forward(hidden_states)


class Counting(Llama):
    """With a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden_states):
        self.calls.add_(1)
        return super().forward(hidden_states)


class ByRank(Llama):
    """Over another dim, if there are four."""

    def forward(self, hidden_states):
        if hidden_states.dim() == 4:
            hidden_states = hidden_states - hidden_states.mean(-1, keepdim=True)
        return super().forward(hidden_states)


class Softplus(Llama):
    """Its weight is computed."""

    def forward(self, hidden_states):
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-6)
        return hidden_states * scale * F.softplus(self.weight)


class Frozen(nn.Module):
    """A constant map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = vector(), vector(-1, 1)
        self.register_buffer("mean", torch.linspace(-1, 1, C))
        self.register_buffer("var", torch.linspace(0.5, 2, C))

    def forward(self, x):
        return (x - self.mean) * torch.rsqrt(self.var + 1e-5) * self.weight + self.bias


class Cubed(nn.Module):
    """No norm at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = vector()

    def forward(self, x):
        return self.weight * x.pow(3)


class Between(nn.Module):
    """A norm of tokens between two linear layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, C), norm, nn.Linear(C, 4)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))
