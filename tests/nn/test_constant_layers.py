"""A layer that is a constant affine in evaluation leaves no normalization behind, and no multiplication."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_agrees
from graph_text import stages_of
from torch import nn

import normfx.nn as N
from normfx import Refusal

STATIC = {
    "UnifiedNorm": lambda: N.UnifiedNorm(8),
    "PowerNorm without group scaling": lambda: N.PowerNorm(8, groups=None),
    "MaskedBatchNorm": lambda: N.MaskedBatchNorm(8),
}


def trained(norm):
    """Statistics and parameters away from where they begin."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        for name, buffer in norm.named_buffers():
            if name in ("running_var", "running_phi"):
                buffer.uniform_(0.5, 2)
            elif name == "running_mean":
                buffer.normal_()
    return norm


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("bias", [True, False])
def test_static_layer_folds_into_the_next_linear(name, bias):
    model = nn.Sequential(trained(STATIC[name]()), nn.Linear(8, 4, bias=bias)).eval()
    with torch.no_grad():
        texts, journal = stages_of(model, torch.randn(3, 5, 8))
    assert [site.actions for site in journal.sites] == [["telescope"]]
    called = {line.split(" = ")[1].split("(")[0] for line in texts["lower"].splitlines()[:-1]}
    assert called == {"linear"}, texts["lower"]
    assert_agrees(model, torch.randn(3, 5, 8))


def test_group_scaling_stays():
    model = nn.Sequential(trained(N.PowerNorm(8, groups=2)), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        texts, _ = stages_of(model, torch.randn(3, 5, 8))
    assert "mean" in texts["lower"] or "rms_norm" in texts["lower"]
    assert_agrees(model, torch.randn(3, 5, 8))


class Block(nn.Module):
    """Pre-norm: the stream goes on, the branch reads the norm twice."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(h)) * self.up(h))


def test_a_block_trained_with_unified_norm_has_no_norm_left():
    block = Block(N.UnifiedNorm(8, warmup_steps=2, window=2))
    for _ in range(5):
        block(torch.randn(3, 5, 8)).square().sum().backward()
    block.eval()
    with torch.no_grad():
        texts, journal = stages_of(block, torch.randn(3, 5, 8))
    assert [site.actions for site in journal.sites] == [["telescope"]]
    # One multiplication is the block's own; the norm's is gone.
    assert texts["lower"].count("= mul(") == 1
    assert "norm" not in texts["lower"]
    assert_agrees(block, torch.randn(3, 5, 8))


class Residual(nn.Module):
    """A norm whose result the next norm and the residual read, through a dropout (Swin's first)."""

    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Linear(8, 8), trained(N.UnifiedNorm(8))
        self.drop, self.block = nn.Dropout(0.1), Block(trained(N.UnifiedNorm(8)))

    def forward(self, x):
        return self.block(self.drop(self.first(self.embed(x))))


def test_a_norm_of_the_result_of_a_norm():
    model = Residual().eval()
    with torch.no_grad():
        _, journal = stages_of(model, torch.randn(3, 5, 8))
    actions = [site.actions for site in journal.sites]
    assert actions == [["fold-statistics-into-previous"], ["telescope"]]
    assert_agrees(model, torch.randn(3, 5, 8))


ONE_OPERATOR = {
    "images, then a convolution": (
        lambda: nn.Sequential(trained(N.UnifiedNorm(8, channel_dim=1)), nn.Conv2d(8, 4, 3)),
        (2, 8, 5, 5),
    ),
    "after a linear": (lambda: nn.Sequential(nn.Linear(8, 8), trained(N.UnifiedNorm(8))), (3, 8)),
    "after a convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), trained(N.MaskedBatchNorm(8, channel_dim=1))
        ),
        (2, 8, 5, 5),
    ),
    "standardized convolution": (lambda: trained(N.StdConv2d(8, 4, 3, padding=1)), (2, 8, 5, 5)),
    "scaled standardized convolution": (
        lambda: trained(N.ScaledStdConv2d(8, 4, 3, gamma="relu")),
        (2, 8, 5, 5),
    ),
    "scaled standardized linear": (lambda: trained(N.ScaledStdLinear(8, 4)), (3, 8)),
    "centred linear": (lambda: trained(N.ZeroMeanOutputLinear(8, 4)), (3, 8)),
    "companded linear": (lambda: N.compand(nn.Linear(8, 4), learned=True), (3, 8)),
}


@pytest.mark.parametrize("name", ONE_OPERATOR)
def test_one_operator_is_left(name):
    build, shape = ONE_OPERATOR[name]
    model, x = build().eval(), torch.randn(shape)
    with torch.no_grad():
        texts, _ = stages_of(model, x)
    called = [line.split(" = ")[1].split("(")[0] for line in texts["lower"].splitlines()[:-1]]
    assert len([op for op in called if op != "to"]) == 1, texts["lower"]
    assert_agrees(model, x)


def test_a_shift_stays_in_front_of_zero_padding():
    norm = trained(N.UnifiedNorm(8, channel_dim=1))
    model = nn.Sequential(norm, nn.Conv2d(8, 4, 3, padding=1)).eval()
    with torch.no_grad():
        _, journal = stages_of(model, torch.randn(2, 8, 5, 5))
    (site,) = journal.sites
    assert site.records[-1].code is Refusal.PADDING
    assert_agrees(model, torch.randn(2, 8, 5, 5))
