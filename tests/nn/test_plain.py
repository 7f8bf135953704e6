"""Layers without a statistic of the batch, beside their definitions; placement and parametrization."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import normfx.nn as N
from normfx.nn.standardized import GAMMA

C = 6


def roughened(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double()


def images():
    return torch.randn(2, C, 3, 5).double()


def test_norms_of_pixels():
    x = images()
    last = x.movedim(1, -1)
    norm = roughened(N.LayerNorm2d(C))
    expected = F.layer_norm(last, (C,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(norm(x).movedim(1, -1), expected)
    norm = roughened(N.RMSNorm2d(C))
    expected = F.rms_norm(last, (C,), norm.weight, 1e-6)
    torch.testing.assert_close(norm(x).movedim(1, -1), expected)
    norm = roughened(N.SimpleNorm2d(C))
    expected = last / (last.var(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x).movedim(1, -1), expected)


def test_simple_norm_needs_two_channels():
    with pytest.raises(ValueError, match="at least two channels, got 1"):
        N.SimpleNorm(1)


def test_filter_response():
    norm = roughened(N.FilterResponseNorm(C))
    x, align = images(), (1, C, 1, 1)
    z = x / (x.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    z = z * norm.weight.reshape(align) + norm.bias.reshape(align)
    torch.testing.assert_close(norm(x), torch.maximum(z, norm.tau.reshape(align)))
    assert "tau" not in N.FilterResponseNorm(C, thresholded_linear_unit=False).state_dict()


def test_global_response_begins_as_the_identity():
    x = images()
    torch.testing.assert_close(N.GlobalResponseNorm(C, channels_last=False)(x), x)
    norm = roughened(N.GlobalResponseNorm(C))
    last = x.movedim(1, -1)
    strength = last.square().sum((1, 2), keepdim=True).sqrt()
    relative = strength / (strength.mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(norm(last), last + last * relative * norm.weight + norm.bias)


def test_global_response_of_a_dead_channel_has_a_gradient():
    norm, x = roughened(N.GlobalResponseNorm(C)), torch.zeros(1, 3, 3, C).double().requires_grad_()
    norm(x).sum().backward()
    assert x.grad.isfinite().all()


def test_simple_rms():
    x = torch.randn(3, C).double()
    expected = F.rms_norm(x, (C,), None, 1e-6)
    torch.testing.assert_close(N.SimpleRMSNorm()(x), expected)
    torch.testing.assert_close(N.SimpleRMSNorm(C)(x), expected)


def test_compressed_is_the_rms_norm_of_the_whole_vector():
    whole = torch.randn(3, C + 1).double()
    whole = whole - whole.mean(-1, keepdim=True)
    expected = F.rms_norm(whole, (C + 1,), None, 1e-5)[:, :-1]
    torch.testing.assert_close(N.CRMSNorm(C)(whole[:, :-1]), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_zero_mean_output_is_what_layer_norm_makes_of_a_linear(bias):
    centred = N.ZeroMeanOutputLinear(C, 8, bias=bias).double()
    linear = nn.Linear(C, 8, bias=bias).double()
    linear.load_state_dict(centred.state_dict(), strict=True)
    x = torch.randn(3, C).double()
    torch.testing.assert_close(centred(x).mean(-1), torch.zeros(3).double())
    torch.testing.assert_close(
        F.rms_norm(centred(x), (8,), None, 1e-5), F.layer_norm(linear(x), (8,), None, None, 1e-5)
    )


def test_standardized_weights():
    x = images()
    for layer in (
        N.StdConv2d(C, 4, 3, groups=2, bias=False).double(),
        roughened(N.ScaledStdConv2d(C, 4, 3, groups=2, gamma="relu")),
        roughened(N.ScaledStdLinear(5, 4, gamma=1.5)),
    ):
        weight = layer.weight.detach().flatten(1)
        fan_in = weight.shape[1]
        expected = weight - weight.mean(1, keepdim=True)
        expected = expected / (weight.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        if hasattr(layer, "gain"):
            gamma = 1.5 if isinstance(layer, nn.Linear) else 1.7139588594436646
            expected = expected * layer.gain.detach().flatten(1) * gamma / math.sqrt(fan_in)
        used = layer.standardized_weight().detach()
        torch.testing.assert_close(used.flatten(1), expected)
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(layer(x), F.linear(x, used, layer.bias))
        else:
            torch.testing.assert_close(layer(x), F.conv2d(x, used, layer.bias, groups=2))
    assert N.ScaledStdConv2d(C, 4, 3).gain.shape == (4, 1, 1, 1)
    assert N.ScaledStdConv2d(C, 4, 3, gain_init=0.0)(x.float()).abs().max() < 1
    with pytest.raises(ValueError, match=r"expected gamma to be a number or one of .*got 'swish'"):
        N.ScaledStdConv2d(C, 4, 3, gamma="swish")


@pytest.mark.parametrize(
    ("blocks", "alpha", "post"),
    [
        (12, 0.25, 3),
        (24, 0.25, 6),
        (10, 0.25, 2),
        (100, 0.29, 29),
        (4, 0.0, 0),
        (4, 1.0, 4),
        (0, 0.5, 0),
    ],
)
def test_mix_ln(blocks, alpha, post):
    placements = N.mix_ln(blocks, alpha)
    expected = [N.Placement.POST] * post + [N.Placement.PRE] * (blocks - post)
    assert placements == expected
    assert N.mix_ln([nn.Identity()] * blocks, alpha) == expected
    names = [
        f"model.layers.{i}.{'post_feedforward' if p is N.Placement.POST else 'input'}_layernorm.weight"
        for i, p in enumerate(placements)
    ]
    shared = [f"model.layers.{i}.post_attention_layernorm.weight" for i in range(blocks)]
    assert N.placements_of(shared + names) == expected


def test_mix_ln_residual():
    h, branch, norm = torch.randn(2, C), nn.Linear(C, C), nn.RMSNorm(C, 1e-6)
    torch.testing.assert_close(N.Placement.POST.residual(h, branch, norm), norm(h + branch(h)))
    torch.testing.assert_close(N.Placement.PRE.residual(h, branch, norm), h + branch(norm(h)))


def test_mix_ln_bad_arguments():
    with pytest.raises(ValueError, match=r"alpha from 0 .* got 4 and 2"):
        N.mix_ln(4, 2)
    both = ["layers.0.input_layernorm.weight", "layers.0.post_feedforward_layernorm.weight"]
    with pytest.raises(ValueError, match="keys of both"):
        N.placements_of(both)
    with pytest.raises(ValueError, match="in every block from 0 on"):
        N.placements_of(["layers.1.input_layernorm.weight"])


@pytest.mark.parametrize("learned", [False, True])
def test_compander(learned):
    linear = nn.Linear(C, 4).double()
    weight = linear.weight.detach().clone()
    N.compand(linear, learned=learned, slope=3.0)
    torch.testing.assert_close(linear.weight, weight)
    (compander,) = linear.parametrizations.weight
    bound = 2 * weight.abs().max()
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(1e6)
    assert (linear.weight.abs() < bound).all()
    v = torch.zeros(1, 1).double().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compander(v), v)[0], torch.full_like(v, 3.0))
    linear(torch.randn(2, C).double()).sum().backward()
    assert len(list(compander.parameters())) == 2 * learned
    parametrize.remove_parametrizations(linear, "weight")
    assert isinstance(linear.weight, nn.Parameter)


def test_compander_bound():
    linear = nn.Linear(C, 4)
    with pytest.raises(ValueError, match="give a larger bound"):
        N.compand(linear, bound=1e-4)
    with pytest.raises(ValueError, match="expected a positive bound and slope"):
        N.WeightCompander(0.0)
    nn.init.zeros_(linear.weight)
    N.compand(linear)
    assert (linear.weight == 0).all()


@pytest.mark.parametrize("name", GAMMA)
def test_gamma_is_one_over_the_deviation_of_the_activation(name):
    n = torch.linspace(-12, 12, 200_001).double()
    density = torch.exp(-n.square() / 2) / math.sqrt(2 * math.pi)
    functions = {"identity": lambda v: v, "log_sigmoid": F.logsigmoid, "sigmoid": torch.sigmoid}
    value = functions.get(name, getattr(F, name, None))(n)
    mean = torch.trapezoid(value * density, n)
    deviation = (torch.trapezoid(value.square() * density, n) - mean.square()).sqrt()
    # The table's numbers are timm's, which were drawn at random.
    assert GAMMA[name] * deviation.item() == pytest.approx(1, rel=5e-3)
