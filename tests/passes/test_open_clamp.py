"""Open clamp: a clamp with infinite bounds is left out for as long as they are, and no other is."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_agrees, compiled
from expecttest import assert_expected_inline
from graph_text import stages_of
from models import roughened
from torch import nn

import normfx

RULE = "drop-open-clamp"
FOLD = "fold-affine-into-linear"


class Clamped(nn.Module):
    """A norm, a clamp with bounds in buffers, and a linear layer."""

    def __init__(self, low=-math.inf, high=math.inf) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8), nn.Linear(8, 4)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def clamp(self, y):
        return torch.clamp(y, self.low, self.high)

    def forward(self, x):
        return self.linear(self.clamp(self.norm(x)))


def test_golden():
    with torch.no_grad():
        texts, journal = stages_of(Clamped(), torch.randn(64, 8), rules=[RULE, "hoist"])
    assert_expected_inline(
        texts["hoist"],
        """\
v0 = norm(in1, in0, None, None, None, None, None, RMSNorm over [1], eps 1.19209e-07)
v1 = linear(v0, in4, in5)
return [v1]
""",
    )
    assert journal.sites[0].kind == "RMSNorm"


@pytest.mark.parametrize(
    "clamp",
    [
        lambda m, y: torch.clamp(y, min=m.low),
        lambda m, y: torch.clamp(y, max=m.high),
        lambda m, y: y.clamp_min(m.low).clamp_max(m.high),
        lambda m, y: y.clamp(-math.inf, math.inf),
        lambda m, y: y.clamp(m.low, m.high).clamp(m.low.expand(8), m.high.reshape(1)),
    ],
    ids=["min", "max", "one-by-one", "numbers", "twice"],
)
def test_what_is_left_out(clamp):
    model = roughened(Clamped())
    model.clamp = lambda y: clamp(model, y)
    assert_agrees(model, torch.randn(64, 8))
    assert FOLD in normfx.report().sites[0].actions


@pytest.mark.parametrize(
    "clamp",
    [
        lambda m, y: y.clamp(m.low, m.high - math.inf),  # NaN
        lambda m, y: y.clamp(m.high, m.high),
        lambda m, y: y.clamp(m.low, m.high.clamp(max=2.0)),
        lambda m, y: y.clamp(m.low.double().expand(8), m.high.double()).to(y.dtype),
        lambda m, y: y.clamp(y.new_full((), -math.inf) - y[0, 0].abs(), m.high),
    ],
    ids=["nan", "one-bound", "finite", "wider", "computed"],
)
def test_what_stays(clamp):
    model = roughened(Clamped())
    model.clamp = lambda y: clamp(model, y)
    assert_agrees(model, torch.randn(64, 8))
    assert normfx.report().sites[0].refusals[-1] == "reader-not-linear"


def test_bounds_that_are_measured_later():
    model = roughened(Clamped())
    fast, x = compiled(model), torch.randn(64, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        model.high.fill_(0.5)
        with pytest.warns(UserWarning, match="property that they have lost"):
            assert torch.equal(fast(x), model(x))
        model.high.fill_(math.inf)
        torch.testing.assert_close(fast(x), model(x))


def test_a_result_that_is_written_to_is_a_tensor_of_its_own():
    class Writes(Clamped):
        def forward(self, x):
            y = self.norm(x)
            z = self.clamp(y)
            z += 1
            return self.linear(y), z

    assert_agrees(roughened(Writes()), torch.randn(64, 8))


def test_what_is_returned_is_a_tensor_of_its_own():
    class Returns(Clamped):
        def forward(self, x):
            return self.clamp(x)

    model, x = Returns(), torch.randn(4, 8)
    with torch.no_grad():
        compiled(model)(x).zero_()
    assert x.abs().sum() > 0


def test_not_with_gradients():
    assert_agrees(roughened(Clamped()), torch.randn(64, 8), grad=True)
