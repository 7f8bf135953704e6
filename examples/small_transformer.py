"""A pre-norm transformer with a choice of norms, small enough to train on one core.

The blocks of `train_char_lm.py`, `train_digits_vit.py` and `remove_layernorm.py`. Every norm is
read by linear layers alone, so that one which is a constant affine at inference folds away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfx.nn import MaskedBatchNorm, PowerNorm, UnifiedNorm

INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a transformer.

    Attributes:
        width: channels of the residual stream.
        depth: blocks; there are two norms in each, and one after the last.
        heads: of the attention, which divide the width.
        causal: whether a token sees only those before it.
    """

    width: int
    depth: int
    heads: int
    causal: bool = False


def norm_layers(
    shape: Shape, warmup_steps: int, *, outlier_filtration: bool = False
) -> dict[str, Callable[[], nn.Module]]:
    """A constructor for each choice of norm, with the defaults of its authors.

    UN's outlier filtration is on for images and off for text, as its authors have it. Two defaults
    are of a length: UN and PowerNorm take plain batch statistics in their first steps,
    4000 and 8000 of some 50,000 and more in the released configurations. Here it is `warmup_steps`.

    The released PowerNorm scales each token over as many groups of channels as there are heads;
    that part stays at inference.
    """
    width = shape.width
    return {
        "LN": lambda: nn.LayerNorm(width),
        "RMS": lambda: nn.RMSNorm(width, eps=1e-5),
        "BN": lambda: MaskedBatchNorm(width),
        "PN": lambda: PowerNorm(
            width, groups=shape.heads, warmup_steps=warmup_steps, batch_first=True
        ),
        "UN": lambda: UnifiedNorm(
            width, warmup_steps=warmup_steps, outlier_filtration=outlier_filtration
        ),
    }


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v in each head. Shapes: (batch, tokens, width), in and out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.causal = shape.heads, shape.causal
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Shapes: (batch, tokens, width)."""

    def __init__(self, shape: Shape, new_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention_norm, self.attention = new_norm(), Attention(shape)
        self.mlp_norm = new_norm()
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """One step of the residual stream."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Blocks and a last norm.

    Shapes: (batch, tokens, width), in and out.
    """

    def __init__(self, shape: Shape, new_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(shape, new_norm) for _ in range(shape.depth)))
        self.last_norm = new_norm()

    def forward(self, x: Tensor) -> Tensor:
        """The stream after the last norm."""
        return self.last_norm(self.blocks(x))


def initialise(model: nn.Module, depth: int) -> None:
    """GPT-2's: normal weights of std 0.02, over sqrt(2 depth) where a block writes to the stream.

    It draws in the order of the modules, which norms have no part in: one seed gives models with
    different norms the same weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            writes = name.endswith((".attention.out", ".down"))
            std = INIT_STD / math.sqrt(2 * depth) if writes else INIT_STD
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rises linearly over a twentieth of the steps, then falls as a cosine to a tenth."""
    rise = max(steps // 20, 1)
    if step < rise:
        return peak * (step + 1) / rise
    fallen = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))
    return peak * (0.1 + 0.9 * fallen)


def optimizer_for(model: nn.Module, peak: float) -> torch.optim.AdamW:
    """AdamW as GPTs are trained: weight decay 0.1, and none for vectors (biases, norms)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99))
