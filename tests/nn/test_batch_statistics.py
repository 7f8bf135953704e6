"""Layers whose statistics are of the batch, beside their definitions: BatchNorm, EvoNorm, regions, test time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfx.nn as N

C = 4


def roughened(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double()


def test_without_a_mask_it_is_torch_batch_norm():
    mine, theirs = roughened(N.MaskedBatchNorm(C)), nn.BatchNorm1d(C).double()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    for training in (True, True, False):
        mine.train(training), theirs.train(training)
        x = torch.randn(3, 5, C).double().requires_grad_()
        flat = x.detach().flatten(0, 1).requires_grad_()
        y, z = mine(x), theirs(flat)
        torch.testing.assert_close(y.flatten(0, 1), z)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(x.grad.flatten(0, 1), flat.grad)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


def test_a_mask_leaves_padding_out():
    mine, theirs = roughened(N.MaskedBatchNorm(C)), nn.BatchNorm1d(C).double()
    theirs.load_state_dict(mine.state_dict())
    x, mask = torch.randn(3, 5, C).double(), torch.rand(3, 5) < 0.4
    spoilt = torch.where(mask.unsqueeze(-1), torch.inf, x)
    torch.testing.assert_close(mine(spoilt, mask)[~mask], theirs(x[~mask]))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_of_one_position_or_none(rows):
    norm = roughened(N.MaskedBatchNorm(C))
    before = copy.deepcopy(norm.state_dict())
    y = norm(torch.randn(rows, C).double())
    torch.testing.assert_close(y, norm.bias.expand(rows, C))
    assert all(buffer.isfinite().all() for buffer in norm.buffers())
    if rows == 0:
        torch.testing.assert_close(norm.state_dict(), before)


def test_nodes_and_edges():
    norm = N.GraphBatchNorm(C, 2).double()
    nodes, edges = torch.randn(7, C).double(), torch.randn(9, 2).double()
    got = norm(nodes, edges)
    torch.testing.assert_close(got[0], F.batch_norm(nodes, None, None, training=True))
    torch.testing.assert_close(got[1], F.batch_norm(edges, None, None, training=True))
    assert next(iter(norm.state_dict())) == "nodes.weight"


def evonorm_definition(x, variant, v, eps, groups):
    b = x.var((0, 2, 3), correction=0, keepdim=True)
    i = x.var((2, 3), correction=0, keepdim=True)
    qi = x.square().mean((2, 3), keepdim=True)
    grouped = x.unflatten(1, (groups, -1))
    g = grouped.var((2, 3, 4), correction=0, keepdim=True)
    qg = grouped.square().mean((2, 3, 4), keepdim=True)
    g, qg = (s.expand_as(grouped).flatten(1, 2) for s in (g, qg))
    v = v.reshape(1, -1, 1, 1)
    return {
        "B0": lambda: x / torch.maximum((b + eps).sqrt(), v * x + (i + eps).sqrt()),
        "B1": lambda: x / torch.maximum((b + eps).sqrt(), (x + 1) * (qi + eps).sqrt()),
        "B2": lambda: x / torch.maximum((b + eps).sqrt(), (qi + eps).sqrt() - x),
        "S0": lambda: x * (v * x).sigmoid() / (g + eps).sqrt(),
        "S1": lambda: F.silu(x) / (g + eps).sqrt(),
        "S2": lambda: F.silu(x) / (qg + eps).sqrt(),
    }[variant.removesuffix("a")]()


@pytest.mark.parametrize("variant", ["B0", "B1", "B2", "S0", "S1", "S2", "S0a", "S1a", "S2a"])
def test_evonorm(variant):
    norm = roughened(N.EvoNorm(C, variant, groups=2))
    x = torch.randn(3, C, 5, 5).double()
    v = getattr(norm, "v", torch.ones(C))
    expected = evonorm_definition(x, variant, v, norm.eps, 2)
    align = (1, C, 1, 1)
    expected = expected * norm.weight.reshape(align) + norm.bias.reshape(align)
    torch.testing.assert_close(norm(x), expected)
    assert norm.eps == (1e-3 if variant in ("B0", "S0a", "S1a", "S2a") else 1e-5)
    assert hasattr(norm, "v") == (variant in ("B0", "S0", "S0a"))


def test_evonorm_running_variance():
    norm = N.EvoNorm(C, "B1").double()
    x = torch.randn(3, C, 5, 5).double()
    norm(x)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


def test_evonorm_bad_arguments():
    with pytest.raises(ValueError, match=r"expected a variant of .*got 'B3'"):
        N.EvoNorm(C, "B3")
    with pytest.raises(ValueError, match="groups that divides 4 channels, got 3"):
        N.EvoNorm(C, "S0", groups=3)


def test_region_is_its_closed_form():
    norm = N.RegionNormBinary(C)
    x, mask = torch.randn(2, C, 5, 5).double(), (torch.rand(2, 1, 5, 5) < 0.3).double()
    expected = torch.zeros_like(x)
    for region in (mask, 1 - mask):
        inside = region.bool().expand(2, C, 5, 5)
        for c in range(C):
            values = x[:, c][inside[:, c]]
            eps = norm.eps * x[:, c].numel() / values.numel()
            normalized = (values - values.mean()) / (values.var(correction=0) + eps).sqrt()
            expected[:, c][inside[:, c]] = normalized
    torch.testing.assert_close(norm(x, mask), expected)


def test_region_of_nothing_and_of_everything():
    norm, x = N.RegionNormBinary(C), torch.randn(2, C, 5, 5).double().requires_grad_()
    expected = F.batch_norm(x, None, None, training=True)
    for mask in (torch.zeros(2, 1, 5, 5), torch.ones(2, 1, 5, 5)):
        y = norm(x, mask)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        assert x.grad.isfinite().all()


def test_region_mask_of_another_shape():
    norm, x = N.RegionNormBasic(C), torch.randn(2, C, 5, 5)
    with pytest.raises(ValueError, match=r"a mask \(batch, 1, height, width\) of the same batch"):
        norm(x, torch.zeros(2, C, 5, 5))
    with pytest.raises(ValueError, match="odd kernel_size, got 4"):
        N.RegionNormLearnable(C, kernel_size=4)


def test_region_betas_are_added_everywhere():
    norm = roughened(N.RegionNormBasic(C))
    x, mask = torch.zeros(2, C, 5, 5).double(), (torch.rand(2, 1, 5, 5) < 0.3).double()
    expected = (norm.foreground_beta + norm.background_beta).reshape(1, C, 1, 1)
    torch.testing.assert_close(norm(x, mask), expected.expand_as(x))


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_alpha_batch_norm(a):
    source = nn.BatchNorm2d(C).double()
    source(torch.randn(8, C, 5, 5).double() * 2 + 1)
    roughened(source).eval()
    norm = N.AlphaBatchNorm.from_batch_norm(source, a)
    x = torch.randn(2, C, 5, 5).double()
    mean = (1 - a) * source.running_mean + a * x.mean((0, 2, 3))
    variance = (1 - a) * source.running_var + a * x.var((0, 2, 3))
    expected = F.batch_norm(x, mean, variance, source.weight, source.bias)
    before = copy.deepcopy(norm.layer.state_dict())
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.layer.state_dict(), before)
    torch.testing.assert_close(norm.norm.running_var, x.var((0, 2, 3)))
    if a == 0:
        torch.testing.assert_close(norm(x), source(x))


def test_alpha_batch_norm_without_affine_and_out_of_range():
    source = nn.BatchNorm2d(C, affine=False)
    norm = N.AlphaBatchNorm.from_batch_norm(source)
    torch.testing.assert_close(norm.layer.weight, torch.ones(C))
    with pytest.raises(ValueError, match=r"from 0 .* to 1 .*got 1.5"):
        N.AlphaBatchNorm(C, weight_of_test_batch=1.5)


def test_unmix_begins_with_the_statistics_of_the_source():
    source = roughened(nn.BatchNorm2d(C))
    source.running_mean.normal_()
    source.running_var.uniform_(0.5, 2)
    generator = torch.Generator().manual_seed(1)
    norm = N.UnMixTNS.from_batch_norm(source, components=4096, generator=generator)
    means, variances = norm.running_means_mat, norm.running_vars_mat
    torch.testing.assert_close(means.mean(0), source.running_mean, rtol=0.05, atol=0.05)
    total = variances.mean(0) + means.var(0, correction=0)
    torch.testing.assert_close(total, source.running_var, rtol=0.1, atol=0.0)
    one = N.UnMixTNS.from_batch_norm(source, components=1)
    torch.testing.assert_close(one.running_means_mat[0], source.running_mean)


def test_unmix_of_one_component_is_its_definition():
    norm = roughened(N.UnMixTNS(C, components=1))
    x = torch.randn(3, C, 5, 5).double()
    mean, variance = x.mean((2, 3)), x.var((2, 3), correction=0)
    align = (1, C, 1, 1)
    expected = (x - mean[..., None, None]) / (variance[..., None, None] + norm.eps).sqrt()
    expected = expected * norm.weight.reshape(align) + norm.bias.reshape(align)
    torch.testing.assert_close(norm(x), expected)  # p is 1: the statistics are the instance's
    torch.testing.assert_close(norm.running_means_mat[0], norm.momentum * mean.mean(0))


def test_unmix_in_one_dimension_adapts_nothing():
    source = roughened(nn.BatchNorm1d(C)).eval()
    norm = N.UnMixTNS.from_batch_norm(source, components=3)
    before = copy.deepcopy(norm.state_dict())
    for x in (torch.randn(6, C).double(), torch.randn(6, C, 7).double()):
        torch.testing.assert_close(norm(x), source(x))
    torch.testing.assert_close(norm.state_dict(), before)
    with pytest.raises(ValueError, match="construct it with dims=1"):
        N.UnMixTNS(C)(torch.randn(6, C))


@pytest.mark.parametrize("adapted", [N.AlphaBatchNorm, N.UnMixTNS])
def test_a_source_without_statistics(adapted):
    for source in (nn.BatchNorm2d(C, track_running_stats=False), nn.LayerNorm(C)):
        with pytest.raises(ValueError, match="a BatchNorm with running statistics, got"):
            adapted.from_batch_norm(source)
