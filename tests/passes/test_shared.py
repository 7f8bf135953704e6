"""Values inside of a norm that others read: kept, and computed once.

Each case is a function whose results are made with inner values of a norm; the reductions of the graph are counted
before and after.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_agrees
from torch import nn

import normfx
from normfx import graph as g
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal

aten = torch.ops.aten
REDUCTIONS = {
    aten.mean,
    aten.sum,
    aten.var,
    aten.std,
    aten.var_mean,
    aten.std_mean,
    aten.linalg_vector_norm,
    aten.layer_norm,
    aten.rms_norm,
}


class Inner(nn.Module):
    """A function of x with a weight and a bias for the last dim, and for the channels."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.function(self, x + self.bias)  # so that gradients flow through x


def mean_and_rstd(m, x):
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)
    return (x - mean) * rstd * m.weight + m.bias, mean, rstd


def centred(m, x):
    """The centred value goes on without the norm: as a residual."""
    mean = x.mean(-1, keepdim=True)
    h = x - mean
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * m.weight + h


def mean_of_an_rms(m, x):
    square = (x * x).mean(-1, keepdim=True)
    return x * torch.rsqrt(square + 1e-6) * m.weight, square


def deviation(m, x):
    deviation, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (deviation + 1e-6), deviation, mean


def length(m, x):
    length = x.norm(dim=-1, keepdim=True)
    return x / (length + 1e-6), length


def floored_length(m, x):
    length = x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return x / length, length


def unbiased_for_the_running_statistics(m, x):
    variance, mean = torch.var_mean(x, (0, 2, 3))
    n = x.numel() // x.shape[1]
    scale = m.scale * torch.rsqrt(variance * ((n - 1) / n) + 1e-5)
    y = x * scale.view(1, -1, 1, 1) + (m.shift - mean * scale).view(1, -1, 1, 1)
    return y, 0.1 * mean, 0.1 * variance


def statistics_of_channels(m, x):
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    h = (x - mean.view(1, -1, 1, 1)) / torch.sqrt(variance.view(1, -1, 1, 1) + 1e-5)
    return h, mean, variance


def two_affine_parts(m, x):
    mean = x.mean(-1, keepdim=True)
    h = (x - mean) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return h * m.weight + m.bias, h * m.bias


def two_norms_of_one_statistic(m, x):
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return (x - mean) * rstd * m.weight + m.bias, (x - mean) * rstd * m.bias


def the_same_norm_twice(m, x):
    return F.rms_norm(x, (8,), m.weight) + 1, F.rms_norm(x, (8,), m.weight) * 2


# name -> (function, norms, reductions that are left)
CASES = {
    "mean-and-rstd": (mean_and_rstd, 1, 2),
    "centred": (centred, 1, 2),
    "mean-square": (mean_of_an_rms, 1, 1),
    "deviation": (deviation, 1, 1),
    "length": (length, 1, 1),
    "floored-length": (floored_length, 1, 1),
    "running-statistics": (unbiased_for_the_running_statistics, 1, 1),
    "statistics-of-channels": (statistics_of_channels, 1, 2),
    "two-affine-parts": (two_affine_parts, 1, 2),
    "two-norms-of-one-statistic": (two_norms_of_one_statistic, 2, 2),
    "the-same-norm-twice": (the_same_norm_twice, 2, 1),
}


def reductions(gm):
    return sum(g.packet(node) in REDUCTIONS for node in gm.graph.nodes)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", CASES)
def test_what_others_read_is_computed_once(case, grad):
    function, norms, left = CASES[case]
    counted: dict[str, int] = {}

    def count(stage, gm):
        counted[stage] = reductions(gm)

    def backend(gm, _):
        rewrite(gm, Options(strict=True), Journal(), observe=count)
        return gm.forward

    with torch.set_grad_enabled(grad):
        torch.compile(Inner(function), backend=backend)(torch.randn(4, 6, 5, 8))
    assert counted["lower"] == left <= counted["capture"]
    torch._dynamo.reset()
    normfx.reset()
    assert_agrees(Inner(function), torch.randn(4, 6, 5, 8), grad=grad)
    assert len(normfx.report().sites) == norms


def test_zero_rows_keep_their_gradient():
    """`norm` has a gradient of zero at a zero row, a square root none: what is given must not change that."""
    model = Inner(length)
    x = torch.randn(4, 6, 5, 8)
    x[0] = 0
    x.requires_grad_()
    got = x.detach().clone().requires_grad_()
    sum(y.sum() for y in model(x)).backward()
    fast = torch.compile(model, backend="normfx", options={"lowering": "eager", "strict": True})
    sum(y.sum() for y in fast(got)).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(torch.isfinite(got.grad), torch.isfinite(x.grad))


def test_a_write_between_two_norms_keeps_both():
    def written(m, x):
        x = x * 1
        first = F.rms_norm(x, (8,), m.weight)
        x[0].mul_(2)
        return first, F.rms_norm(x, (8,), m.weight)

    assert_agrees(Inner(written), torch.randn(4, 6, 5, 8))
    assert len(normfx.report().sites) == 2
