"""Lower: which form of a norm Inductor gets."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_within_contract
from graph_text import stages_of
from models import roughened
from torch import nn


def lowered(model, *inputs, grad: bool = False) -> str:
    with torch.set_grad_enabled(grad):
        texts, _ = stages_of(model, *inputs, rules=[])
    return texts["lower"]


def test_a_short_row_gets_its_two_passes_spelled_out():
    text = lowered(nn.LayerNorm(1024), torch.randn(4, 1024))
    assert "layer_norm" not in text
    assert "var(" not in text
    assert text.count("mean(") == text.count("sum(") == 1


def test_a_long_row_stays_an_operator():
    assert "layer_norm" in lowered(nn.LayerNorm(1025), torch.randn(4, 1025))


def test_with_gradients_it_stays_an_operator():
    assert "layer_norm" in lowered(nn.LayerNorm(8), torch.randn(4, 8), grad=True)


def test_groups_stay_an_operator():
    assert "group_norm" in lowered(nn.GroupNorm(2, 8), torch.randn(4, 8, 3))


def test_a_row_of_symbolic_size_is_spelled_out():
    """As before: ATen's operator wants its size as a number."""

    def model(x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:])

    x = torch.randn(4, 8)
    torch._dynamo.mark_dynamic(x, 1)
    text = lowered(model, x)
    assert text.count("mean(") == text.count("sum(") == 1


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_passes_are_as_exact_as_eager(dtype):
    """Rows with a large mean, constant rows and rows of zeros among them."""
    model = roughened(nn.LayerNorm(96)).to(dtype)
    x = torch.randn(64, 96)
    x[:16] += 100
    x[16:20] = 3.0
    x[20:24] = 0.0
    x = x.to(dtype)
    with torch.no_grad():
        got = torch.compile(model, backend="normfx", options={"strict": True})(x)
        exact = nn.LayerNorm(96).double()
        exact.load_state_dict(model.state_dict())
        assert_within_contract(got, model(x), exact(x.double()))
