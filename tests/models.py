"""Small models with affine parameters that are neither one nor zero."""

from __future__ import annotations

import torch
from torch import nn


def roughened(model: nn.Module) -> nn.Module:
    """The model with norms as training leaves them: scales and shifts of their own, running statistics too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            name = type(module).__name__
            if "Norm" not in name:
                continue
            for key, held in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                if held is not None and held.dtype.is_floating_point:
                    low = -1.0 if "bias" in key or "mean" in key else 0.5
                    held.copy_(torch.empty(held.shape).uniform_(low, 2.0, generator=generator))
    return model


def head(width: int = 8, out: int = 4, norm: type[nn.Module] = nn.LayerNorm) -> nn.Sequential:
    """A norm and the linear layer that reads it."""
    return roughened(nn.Sequential(norm(width), nn.Linear(width, out)))


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))
