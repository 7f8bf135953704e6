"""BatchNorm over the tokens of a batch, or the nodes and edges of a graph, without the padding.

    y = (x - mean) / sqrt(var + eps) * weight + bias

with mean and biased variance of each channel over all positions that are no padding. In evaluation
they are `running_mean` and `running_var`, which move by `momentum` towards the batch's (the
variance towards the unbiased one): a constant affine, which folds. State as `nn.BatchNorm1d`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfx.nn import launched
from normfx.nn.channels import Channels, statistics_dtype
from normfx.nn.moments import channel_moments, unbiased
from normfx.nn.state import is_first_pass


class MaskedBatchNorm(nn.Module):
    """BatchNorm with the channels where they are, and a mask.

    Shapes:
        x: (batch, tokens, channels), (tokens, channels), (nodes, channels) or (edges, channels);
            with `channel_dim=1` images.
        pad_mask: x's without the channels, True where x is padding. Padding is normalized with
            the statistics of the rest.

    State: weight, bias, running_mean, running_var (C,); num_batches_tracked () int64.

    A batch of padding alone leaves the running statistics as they are. Of a single position the
    variance is zero.

    Args:
        channels: C.
        eps: added to the variance.
        momentum: the weight of the *new* value.
        channel_dim: where the channels are.
        sync: sum the statistics over the ranks of the default process group, if there is one.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        channel_dim: int = -1,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.momentum = momentum
        self.channel_dim = channel_dim
        self.sync = sync
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(channels, **made))
        self.bias = nn.Parameter(torch.zeros(channels, **made))
        self.register_buffer("running_mean", torch.zeros(channels, **made))
        self.register_buffer("running_var", torch.ones(channels, **made))
        counter = torch.zeros((), device=device, dtype=torch.int64)
        self.register_buffer("num_batches_tracked", counter)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalizes; in training also notes the statistics of this batch."""
        channels = Channels(x, self.channels, self.channel_dim, "MaskedBatchNorm")
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            shift = self.bias - self.running_mean * scale
            return (x * channels.align(scale) + channels.align(shift)).to(x.dtype)
        is_launched = launched.is_launched(x, self.sync)
        wide = x if is_launched else x.to(statistics_dtype(x))
        padding = None
        if pad_mask is not None:
            padding = channels.align_mask(pad_mask, x, "MaskedBatchNorm")
        mean, variance, count = channel_moments(wide, channels, self.sync, padding)
        if is_first_pass():
            with torch.no_grad():
                self._note(mean, unbiased(variance, count), count)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        if is_launched:
            return launched.affine(x, channels, scale, self.bias, mean)
        y = (wide - channels.align(mean)) * channels.align(scale) + channels.align(self.bias)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}"

    def _note(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            moved = (1 - self.momentum) * running + self.momentum * new
            running.copy_(torch.where(count > 0, moved, running))
        self.num_batches_tracked.add_((count > 0).to(torch.int64).squeeze())


class GraphBatchNorm(nn.Module):
    """Two of them, side by side: one over the nodes of a batch of graphs, one over the edges.

    Shapes:
        nodes: (nodes, channels) of all graphs of the batch, one after the other, or (graphs,
            nodes, channels) with a mask; edges likewise.

    State: nodes.*, edges.* as MaskedBatchNorm.

    Args:
        channels: of the nodes.
        edge_channels: of the edges; by default those of the nodes.
        options: as of MaskedBatchNorm, for both.
    """

    def __init__(self, channels: int, edge_channels: int | None = None, **options: Any) -> None:
        super().__init__()
        self.nodes = MaskedBatchNorm(channels, **options)
        self.edges = MaskedBatchNorm(
            channels if edge_channels is None else edge_channels, **options
        )

    def forward(
        self,
        nodes: Tensor,
        edges: Tensor,
        node_mask: Tensor | None = None,
        edge_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalizes both."""
        return self.nodes(nodes, node_mask), self.edges(edges, edge_mask)
