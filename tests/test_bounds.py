"""Bounds: a bound holds for every input, and what has none is not given one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from normfx.analyses.bounds import Bounds
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal


def bound_of(function: Any, *inputs: torch.Tensor, dynamic: bool = False) -> float | None:
    """The bound of the function's only result."""
    found: list[float | None] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]):
        def observe(stage: str, module: fx.GraphModule) -> None:
            if stage == "recognise":
                (result,) = module.graph.output_node().all_input_nodes
                found.append(Bounds(module.graph).of(result))

        rewrite(gm, Options(), Journal(), observe=observe)
        return gm

    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (only,) = found
    return only


BOUNDED = {
    "sigmoid": (lambda x: x.sigmoid(), 1),
    "tanh": (torch.tanh, 1),
    "softmax": (lambda x: x.softmax(-1), 1),
    "clamp": (lambda x: x.clamp(-2, 3), 3),
    "hardtanh": (lambda x: F.hardtanh(x, -4.0, 3.0), 4),
    "relu6": (F.relu6, 6),
    "views": (lambda x: x.tanh().mT.reshape(-1)[1:][None].expand(2, -1), 1),
    "part": (lambda x: x.tanh().chunk(2, -1)[1], 1),
    "cat": (lambda x: torch.cat([x.tanh(), x.clamp(-2, 2)]), 2),
    "sum": (lambda x: x.tanh() + x.sigmoid(), 2),
    "difference": (lambda x: torch.sub(x.tanh(), x.sigmoid(), alpha=-3), 4),
    "product": (lambda x: x.tanh() * -3.0 * x.clamp(-2, 2), 6),
    "cast": (lambda x: x.tanh().to(torch.bfloat16), 1),
    "gelu": (lambda x: F.gelu(x.clamp(-5, 5)), 5),
    "mean": (lambda x: x.tanh().mean(0), 1),
    "rms-norm": (lambda x: F.rms_norm(x, (8,), eps=1e-6), 8**0.5),
    "scaled": (lambda x: 2 * F.rms_norm(x, (8,), eps=1e-6), 2 * 8**0.5),
    "layer-norm": (lambda x: F.layer_norm(x, (8,)), 8**0.5),
    "group-norm": (lambda x: F.group_norm(x, 2), 2),
    "l2-norm": (lambda x: F.normalize(x, dim=-1), 1),
}


@pytest.mark.parametrize("case", BOUNDED)
def test_bounded(case):
    function, expected = BOUNDED[case]
    spikes = torch.zeros(4, 8)
    spikes[:, 3] = 1e6
    stated = bound_of(function, spikes)
    assert stated == pytest.approx(expected)
    for x in (spikes, -spikes, 100 * torch.randn(4, 8), torch.zeros(4, 8)):
        assert function(x).abs().max() <= expected * (1 + 2**-6)


NOT_BOUNDED = {
    "input": lambda x: x * 1.0,
    "relu": torch.relu,
    "gelu": F.gelu,
    "one-sided": lambda x: x.clamp(min=-1.0),
    "one-of-two": lambda x: x.tanh() + x,
    "beside": lambda x: torch.cat([x.tanh(), x]),
    "tensor-ends": lambda x: torch.clamp(x, x.sum(), x.mean()),
    "infinite-end": lambda x: x.clamp(-float("inf"), 1.0),
    "quotient": lambda x: x.tanh() / x,
    "sum-over": lambda x: x.tanh().sum(-1),
    "beyond-the-dtype": lambda x: x.clamp(-1e5, 1e5).half(),
    "bits": lambda x: x.tanh().view(torch.int32),
    "square-of-another-scale": lambda x: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    ),
    "variance-uncentred": lambda x: x * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-5),
}


@pytest.mark.parametrize("case", NOT_BOUNDED)
def test_not_bounded(case):
    assert bound_of(NOT_BOUNDED[case], torch.randn(4, 8)) is None


def test_a_norm_with_a_weight_is_not_bounded():
    assert bound_of(nn.LayerNorm(8), torch.randn(4, 8)) is None


def test_dropout_is_bounded_where_it_is_off():
    x = torch.randn(4, 8)
    assert bound_of(lambda x: F.dropout(x.tanh(), 0.5, training=False), x) == 1
    assert bound_of(lambda x: F.dropout(x.tanh(), 0.5, training=True), x) is None


def test_a_norm_over_a_symbolic_size_is_not_bounded():
    norm = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)  # noqa: E731
    assert bound_of(norm, torch.randn(4, 8), dynamic=True) is None
    assert bound_of(lambda x: norm(x.tanh()).tanh(), torch.randn(4, 8), dynamic=True) == 1


def test_a_long_way_is_not_bounded():
    def deep(x):
        x = x.tanh()
        for _ in range(100):
            x = -x
        return x

    assert bound_of(deep, torch.randn(4, 8)) is None


def test_what_is_written_to_is_not_bounded():
    def written(x):
        u = x.tanh()
        u[0].mul_(1e6)
        return u * 1.0

    assert bound_of(written, torch.randn(4, 8)) is None
