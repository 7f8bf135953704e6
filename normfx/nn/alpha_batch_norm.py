"""alpha-BN: a trained BatchNorm whose statistics are mixed with those of the test batch.

You et al., "Test-time Batch Statistics Calibration for Covariate Shift", arXiv 2110.04065. With a
the weight of the *test batch* (the paper's symbol may be the weight of the source):

    mean = (1 - a) * running_mean + a * mean of the batch
    var  = (1 - a) * running_var  + a * unbiased variance of the batch
    y = (x - mean) / sqrt(var + eps) * weight + bias

No gradient passes the statistics, and the trained ones never change. a = 1 is BN-test; with
a = n / (N + n) it is the mixture of Schneider et al. 2020 with a prior of N samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfx.nn.channels import Channels, statistics_dtype
from normfx.nn.moments import channel_moments, trained_batch_norm, unbiased
from normfx.nn.state import is_first_pass


class AlphaBatchNorm(nn.Module):
    """The same in training and in evaluation.

    Shapes:
        x: (batch, channels, ...), more than one position for each channel.

    State: layer.*, the trained BatchNorm; norm.running_mean, norm.running_var (C,) and
    norm.num_batches_tracked, the statistics of the last test batch.

    Args:
        channels: C.
        weight_of_test_batch: a.
        eps: added to the variance.
        sync: sum the statistics over the ranks of the default process group, if there is one.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
    """

    def __init__(
        self,
        channels: int,
        *,
        weight_of_test_batch: float = 0.1,
        eps: float = 1e-5,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= weight_of_test_batch <= 1:
            raise ValueError(
                f"AlphaBatchNorm: expected weight_of_test_batch from 0 (source statistics) to 1 "
                f"(batch statistics), got {weight_of_test_batch}"
            )
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layer: Any = nn.BatchNorm2d(channels, eps=eps, **made)
        self.norm: Any = nn.BatchNorm2d(channels, affine=False, momentum=1.0, **made)
        self.weight_of_test_batch = weight_of_test_batch
        self.sync = sync

    @classmethod
    def from_batch_norm(cls, norm: Any, weight_of_test_batch: float = 0.1) -> AlphaBatchNorm:
        """Takes over a trained BatchNorm: its parameters, statistics, eps, dtype and device."""
        source = trained_batch_norm(norm, "AlphaBatchNorm")
        made = cls(
            source.num_features,
            weight_of_test_batch=weight_of_test_batch,
            eps=source.eps,
            device=source.running_mean.device,
            dtype=source.running_mean.dtype,
        )
        # An affine-free BatchNorm keeps the ones and zeros it stands for.
        made.layer.load_state_dict({**made.layer.state_dict(), **source.state_dict()})
        return made.train(source.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes with mixed statistics; notes those of this batch."""
        source, a = self.layer, self.weight_of_test_batch
        channels = Channels(x, source.num_features, 1, "AlphaBatchNorm")
        wide = x.to(statistics_dtype(x))
        with torch.no_grad():
            mean, variance, count = channel_moments(wide, channels, self.sync)
            variance = unbiased(variance, count)
            if is_first_pass():
                self.norm.running_mean.copy_(mean)
                self.norm.running_var.copy_(variance)
                self.norm.num_batches_tracked.add_(1)
            mean = (1 - a) * source.running_mean + a * mean
            variance = (1 - a) * source.running_var + a * variance
        z = (wide - channels.align(mean)) * channels.align(torch.rsqrt(variance + source.eps))
        return (z * channels.align(source.weight) + channels.align(source.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, as `print` shows them."""
        return f"weight_of_test_batch={self.weight_of_test_batch}"
