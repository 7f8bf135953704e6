"""CRMSNorm: RMSNorm of a vector whose sum is zero and whose last entry is left out.

Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers", NeurIPS 2023, arXiv 2305.14858. Of d
numbers with the sum zero, u has the first d - 1; the last is -sum(u):

    y = u / sqrt((sum of u^2 + (sum of u)^2) / d + eps)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfx.nn.channels import statistics_dtype


class CRMSNorm(nn.Module):
    """Shapes: u (..., width), the compressed vector. No state.

    Args:
        width: of the compressed vector, d - 1.
        eps: added to the mean square of the whole vector.
    """

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, u: Tensor) -> Tensor:
        """Normalizes each token."""
        if u.shape[-1] != self.width:
            raise ValueError(
                f"CRMSNorm: expected a compressed vector of {self.width} channels in the last dim, "
                f"got an input of shape {tuple(u.shape)}; the width is one less than that of the "
                f"RMSNorm it stands for"
            )
        wide = u.to(statistics_dtype(u))
        left_out = wide.sum(-1, keepdim=True)
        total = wide.square().sum(-1, keepdim=True) + left_out.square()
        return (wide * torch.rsqrt(total / (self.width + 1) + self.eps)).to(u.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.width}, eps={self.eps}"
