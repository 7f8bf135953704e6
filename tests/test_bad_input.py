"""Inputs that break careless rewrites, and models that are no models of norms."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_agrees, assert_within_contract, compiled
from models import head, roughened
from torch import nn

import normfx


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_zero_rows(grad, dynamic):
    model = head()
    with torch.set_grad_enabled(grad):
        got = compiled(model, dynamic=dynamic)(torch.randn(0, 8))
    assert got.shape == (0, 4)
    if grad:
        got.sum().backward()
        assert model[0].weight.grad.eq(0).all()


def test_one_column():
    assert_agrees(head(1), torch.randn(64, 1))
    assert_agrees(head(1, norm=nn.RMSNorm), torch.randn(64, 1))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_nan_and_infinity_stay_in_their_rows(special, norm):
    model, x = head(norm=norm), torch.randn(64, 8)
    x[3, 2] = special
    with torch.no_grad():
        got, eager = compiled(model)(x), model(x)
    assert torch.equal(got.isnan(), eager.isnan())
    assert not got[torch.arange(64) != 3].isnan().any()


def spelled_rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def llama_rms_norm(x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "norm", [spelled_rms_norm, llama_rms_norm, lambda x: F.normalize(x, dim=-1)]
)
def test_nan_and_infinity_in_spelled_norms(special, norm):
    x = torch.randn(64, 8)
    x[3, 2] = special
    assert_within_contract(compiled(norm)(x), norm(x), norm(x.double()))


@pytest.mark.parametrize(
    "norm",
    [llama_rms_norm, lambda x: F.layer_norm(x, (8,)), lambda x: F.rms_norm(x, (8,), eps=1e-6)],
)
def test_half_rows_that_overflow_when_squared(norm):
    x = (1000 * torch.randn(64, 8)).half()
    got = compiled(norm)(x)
    assert got.isfinite().all()
    wide = x.double()
    # the Llama spelling takes its statistics in float32, whatever it is given
    assert_within_contract(got, norm(x), norm(wide).double())
    assert len(normfx.report().sites) == 1


def test_half_statistics_that_overflow_may_only_get_better():
    """x^2 overflows in float16, so eager gives zeros; statistics are computed in float32, as for any half input."""
    x = (1000 * torch.randn(64, 8)).half()
    got, exact = compiled(spelled_rms_norm)(x), spelled_rms_norm(x.double())
    eager_error = (spelled_rms_norm(x).double() - exact).abs().max()
    assert got.dtype is torch.float16
    assert (got.double() - exact).abs().max() <= eager_error


class Named(NamedTuple):
    value: torch.Tensor
    rows: int


class ManyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = head()

    def forward(self, x, scale=1.0, flag=None):
        y = self.head(x) * scale
        return {
            "y": y,
            "none": None,
            "number": 3,
            "text": "norm",
            "named": Named(y + 1, x.shape[0]),
            "flag": flag,
            "x": x,
        }


@pytest.mark.parametrize("grad", [False, True])
def test_outputs_that_are_no_tensors(grad):
    model, x = ManyOutputs(), torch.randn(64, 8)
    with torch.set_grad_enabled(grad):
        got, eager = compiled(model)(x, scale=2.0, flag="on"), model(x, scale=2.0, flag="on")
    assert list(got) == list(eager)
    assert got["none"] is None
    assert (got["number"], got["text"], got["flag"]) == (3, "norm", "on")
    assert isinstance(got["named"], Named)
    assert got["named"].rows == 64
    assert got["x"] is x


@pytest.mark.parametrize("grad", [False, True])
def test_no_norm_at_all(grad):
    assert_agrees(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 8), grad=grad
    )
    (graph,) = normfx.report().graphs
    assert graph.sites == []
    assert graph.near_misses == []
    assert graph.hoisted == 0


def test_no_tensor_at_all():
    assert compiled(lambda number: number + 1)(1) == 2


def test_integer_inputs():
    model = roughened(nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 4)))
    assert_agrees(model, torch.randint(0, 7, (64,)))


def test_integer_mean_is_no_norm():
    def centred(x):
        return x - x.sum(-1, keepdim=True)

    x = torch.randint(0, 7, (6, 8))
    assert torch.equal(compiled(centred)(x), centred(x))


def test_scalar_input():
    def scaled(x):
        return x * torch.rsqrt(x.pow(2).mean() + 1e-6)

    x = torch.tensor(3.0)
    assert_within_contract(compiled(scaled)(x), scaled(x), scaled(x.double()))


def test_complex_input():
    def scaled(x):
        return x / (x.abs().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    x = torch.randn(6, 8, dtype=torch.complex64)
    got, eager = compiled(scaled)(x), scaled(x)
    exact = scaled(x.to(torch.complex128))
    assert_within_contract(*(torch.view_as_real(value) for value in (got, eager, exact)))


def test_not_contiguous():
    assert_agrees(head(), torch.randn(8, 64).t())


def test_a_module_list_of_a_hundred_norms_is_one_graph():
    model = roughened(nn.Sequential(*[nn.LayerNorm(8) for _ in range(100)]))
    x = torch.randn(4, 8)
    with torch.no_grad():
        compiled(model)(x)
    assert len(normfx.report().sites) == 100
