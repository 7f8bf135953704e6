"""SimpleRMSNorm: RMSNorm without parameters, of TransNormerLLM (arXiv 2307.14995).

    y = x / sqrt(mean of x^2 + eps)              over the channels

The authors' later code, with eps under the root and float32 inside; the earlier has 1e-8 outside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfx.nn.channels import statistics_dtype


class SimpleRMSNorm(nn.Module):
    """Shapes: x (..., width). No state.

    Args:
        width: of the last dim, or None: any. Nothing depends on it.
        eps: added to the mean square.
    """

    def __init__(self, width: int | None = None, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes each token."""
        if self.width is not None and x.shape[-1] != self.width:
            raise ValueError(
                f"SimpleRMSNorm: expected {self.width} channels in the last dim, got an input of "
                f"shape {tuple(x.shape)}; construct it with another width, or with None"
            )
        wide = x.to(statistics_dtype(x))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.width}, eps={self.eps}"
