"""Every layer of normfx.nn with an input: what the tests of common properties run over."""

from __future__ import annotations

import torch

import normfx.nn as N

WIDTH = 6


def tokens():
    return torch.randn(3, 5, WIDTH)


def images():
    return torch.randn(3, WIDTH, 4, 4)


def region_mask():
    return (torch.arange(4) < 2).float().expand(3, 1, 4, 4)


# name -> (constructor, input, further arguments)
LAYERS = {
    "UnifiedNorm": (lambda: N.UnifiedNorm(WIDTH, warmup_steps=3, window=2), tokens, ()),
    "UnifiedNorm filtering": (
        lambda: N.UnifiedNorm(WIDTH, warmup_steps=3, window=(2, 3), outlier_filtration=True),
        tokens,
        (),
    ),
    "UnifiedNorm masked": (
        lambda: N.UnifiedNorm(WIDTH, warmup_steps=3, window=2),
        tokens,
        (torch.arange(5).expand(3, 5) > 3,),
    ),
    "UnifiedNorm images": (
        lambda: N.UnifiedNorm(WIDTH, warmup_steps=3, window=2, channel_dim=1),
        images,
        (),
    ),
    "PowerNorm": (lambda: N.PowerNorm(WIDTH, groups=2, warmup_steps=3), tokens, ()),
    "PowerNorm masked": (
        lambda: N.PowerNorm(WIDTH, groups=None, warmup_steps=2, batch_first=True),
        tokens,
        (torch.arange(5).expand(3, 5) > 3,),
    ),
    "PowerNorm PN-V": (lambda: N.PowerNorm(WIDTH, variant="PN-V"), tokens, ()),
    "MaskedBatchNorm": (lambda: N.MaskedBatchNorm(WIDTH), tokens, ()),
    "MaskedBatchNorm masked": (
        lambda: N.MaskedBatchNorm(WIDTH),
        tokens,
        (torch.arange(5).expand(3, 5) > 3,),
    ),
    "EvoNorm B0": (lambda: N.EvoNorm(WIDTH, "B0"), images, ()),
    "EvoNorm B1": (lambda: N.EvoNorm(WIDTH, "B1"), images, ()),
    "EvoNorm B2": (lambda: N.EvoNorm(WIDTH, "B2"), images, ()),
    "EvoNorm S0": (lambda: N.EvoNorm(WIDTH, "S0", groups=2), images, ()),
    "EvoNorm S2a": (lambda: N.EvoNorm(WIDTH, "S2a", groups=2), images, ()),
    "FilterResponseNorm": (lambda: N.FilterResponseNorm(WIDTH), images, ()),
    "GlobalResponseNorm": (
        lambda: N.GlobalResponseNorm(WIDTH, channels_last=False),
        images,
        (),
    ),
    "RegionNormBinary": (lambda: N.RegionNormBinary(WIDTH), images, (region_mask(),)),
    "RegionNormBasic": (lambda: N.RegionNormBasic(WIDTH), images, (region_mask(),)),
    "RegionNormLearnable": (lambda: N.RegionNormLearnable(WIDTH, threshold=0.5), images, ()),
    "LayerNorm2d": (lambda: N.LayerNorm2d(WIDTH), images, ()),
    "RMSNorm2d": (lambda: N.RMSNorm2d(WIDTH), images, ()),
    "SimpleNorm": (lambda: N.SimpleNorm(WIDTH), tokens, ()),
    "SimpleNorm2d": (lambda: N.SimpleNorm2d(WIDTH), images, ()),
    "SimpleRMSNorm": (lambda: N.SimpleRMSNorm(WIDTH), tokens, ()),
    "CRMSNorm": (lambda: N.CRMSNorm(WIDTH), tokens, ()),
    "AlphaBatchNorm": (lambda: N.AlphaBatchNorm(WIDTH), images, ()),
    "UnMixTNS": (lambda: N.UnMixTNS(WIDTH, components=3), images, ()),
    "StdConv2d": (lambda: N.StdConv2d(WIDTH, 4, 3, padding=1), images, ()),
    "ScaledStdConv2d": (lambda: N.ScaledStdConv2d(WIDTH, 4, 3, gamma="relu"), images, ()),
    "ScaledStdLinear": (lambda: N.ScaledStdLinear(WIDTH, 4), tokens, ()),
    "ZeroMeanOutputLinear": (lambda: N.ZeroMeanOutputLinear(WIDTH, 4), tokens, ()),
    "WeightCompander": (lambda: N.compand(torch.nn.Linear(WIDTH, 4), learned=True), tokens, ()),
}

# Their output depends on a state that each call moves: activation checkpointing is not for them.
MOVES_AT_TEST_TIME = {"UnMixTNS"}


def made(name):
    """The layer in float64 with parameters and statistics away from where they begin."""
    build, example, further = LAYERS[name]
    layer = build().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)
        if name == "UnMixTNS":
            layer.running_means_mat.normal_()
    return layer, lambda: example().double(), further


def step(call, layer, x, further):
    """One forward and one backward pass: what came out of both."""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = call(x, *further)
    generator = torch.Generator().manual_seed(7)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def assert_same(got, expected, what, exact=True):
    assert got.keys() == expected.keys(), what
    for name, value in got.items():
        # One rounding apart where another order of summation is allowed; else the same bits.
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {}
        torch.testing.assert_close(
            value,
            expected[name],
            equal_nan=True,
            msg=lambda t, n=name: f"{what}: {n}: {t}",
            **tolerance,
        )
