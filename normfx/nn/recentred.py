"""A linear layer whose output has the mean zero: what writes into a recentred residual stream.

Jiang et al., arXiv 2305.14858, `LinearZeroMeanOutput`. With the means over the outputs:

    y = (W - mean(W)) x + (b - mean(b))

A LayerNorm of a sum of such outputs is an RMSNorm. The parameters stay as they are, and get the
gradient that they would get in front of the LayerNorm.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ZeroMeanOutputLinear(nn.Linear):
    """Arguments, shapes and state of `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """The linear map, centred over its outputs."""
        weight = self.weight - self.weight.mean(0, keepdim=True)
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return F.linear(input, weight, bias)
