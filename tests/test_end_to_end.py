"""Small models through the whole pipeline and Inductor."""

from __future__ import annotations

import copy

import pytest
import torch
from assertions import assert_agrees, assert_within_contract
from models import roughened
from torch import nn

import normfx

pytestmark = pytest.mark.inductor


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).logits


def test_llama():
    tokens = torch.randint(0, 101, (4, 16))
    assert_agrees(Logits(roughened(small_llama())), tokens, options={"lowering": "inductor"})
    sites = normfx.report().sites
    assert [site.kind for site in sites] == ["RMSNorm"] * 5
    assert all(site.actions[0] == "fold-affine-into-linear" for site in sites)
    # what reads the products is elementwise, but for the head's, which are the result
    assert ["defer-scale" in site.actions for site in sites] == [True, True, True, True, False]


def test_conv_net():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    assert_agrees(
        roughened(model).eval(), torch.randn(16, 3, 10, 10), options={"lowering": "inductor"}
    )
    assert [site.kind for site in normfx.report().sites] == ["BatchNorm", "GroupNorm"]


def test_weights_are_live_through_inductor():
    model = roughened(
        nn.Sequential(
            nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.RMSNorm(32), nn.Linear(32, 8)
        )
    )
    fast, x = torch.compile(model, backend="normfx", options={"strict": True}), torch.randn(64, 32)
    with torch.no_grad():
        for _ in range(3):
            assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert len(normfx.report().graphs) == 1


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = roughened(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)))

    def forward(self, x):
        return self.head(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_a_constant_made_in_the_forward():
    assert_agrees(Constant(), torch.randn(16, 8), options={"lowering": "inductor"})


def test_freezing_keeps_the_folds():
    """Parameters are then attributes of the graph, and Inductor folds what is made from them."""
    with torch._inductor.config.patch(freezing=True):
        assert_agrees(Constant(), torch.randn(16, 8), options={"lowering": "inductor"})
    assert [site.actions for site in normfx.report().sites] == [["fold-affine-into-linear"]]
    assert normfx.report().graphs[0].hoisted == 0


def test_freezing_keeps_folds_that_rely_on_values():
    stack = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
    model = roughened(nn.Sequential(*stack)).eval()
    with torch._inductor.config.patch(freezing=True):
        assert_agrees(model, torch.randn(2, 3, 12, 12), options={"lowering": "inductor"})
    assert normfx.report().sites[0].actions == ["fold-statistics-into-next"]
