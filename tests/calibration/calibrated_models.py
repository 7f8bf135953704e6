"""Models that the tests of calibration share."""

from __future__ import annotations

import torch
from models import roughened
from torch import nn


class Spelled(nn.Module):
    """An RMSNorm written out, with a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(width), Spelled(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x)))) + self.second(x)


class Net(nn.Module):
    """Pre-norm blocks, and a last norm; takes (batch, tokens, width) and maybe a mask."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.final = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x))


NAMES = ["blocks.0.norm", "blocks.0.second", "blocks.1.norm", "blocks.1.second", "final"]


def net(width: int = 8, depth: int = 2) -> nn.Module:
    torch.manual_seed(5)
    return roughened(Net(width, depth)).eval()


def batches(count: int = 6, tokens: int = 4, width: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, width, generator=generator) + 0.5 for _ in range(count)]


def inputs_of(model: nn.Module, name: str, data) -> torch.Tensor:
    """What a module reads over the data, by a hook."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
