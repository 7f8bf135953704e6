"""Layers of `normfx.nn` whose statistics the channel kernels take, beside the same layers without them."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from assertions import assert_within_contract

pytest.importorskip("triton")

from normfx import nn as layers
from normfx.nn import launched

pytestmark = pytest.mark.usefixtures("interpreter")

C = 6
CASES = {
    "UnifiedNorm, tokens": (lambda: layers.UnifiedNorm(C, window=2, warmup_steps=2), (2, 19, C)),
    "UnifiedNorm, images": (
        lambda: layers.UnifiedNorm(C, window=2, warmup_steps=2, channel_dim=1),
        (2, C, 5, 7),
    ),
    "PowerNorm": (lambda: layers.PowerNorm(C, warmup_steps=2, batch_first=True), (2, 19, C)),
    "MaskedBatchNorm": (lambda: layers.MaskedBatchNorm(C), (2, 19, C)),
    "EvoNorm B0": (lambda: layers.EvoNorm(C, "B0"), (3, C, 4, 4)),
    "EvoNorm B2": (lambda: layers.EvoNorm(C, "B2"), (3, C, 4, 4)),
}
MASKED = ("UnifiedNorm, tokens", "UnifiedNorm, images", "PowerNorm", "MaskedBatchNorm")


@contextmanager
def counted(monkeypatch):
    """Lets the layers launch kernels on a CPU, and counts them."""
    calls = []
    operators = launched.operators()
    for name in ("channel_moments", "channel_sums", "channel_affine"):
        own = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *a, _own=own: (calls.append(1), _own(*a))[1])
    monkeypatch.setattr(launched, "DEVICES", ("cpu",))
    yield calls
    monkeypatch.undo()


def trained(layer, inputs, masks, wide):
    """Three steps: outputs, gradients and state."""
    layer = copy.deepcopy(layer).to(wide)
    found = {}
    for step, (x, mask) in enumerate(zip(inputs, masks, strict=True)):
        leaf = x.detach().to(wide, copy=True).requires_grad_()
        y = layer(leaf) if mask is None else layer(leaf, mask)
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(step))
        (y * probe.to(wide)).sum().backward()
        found[f"output {step}"], found[f"gradient {step}"] = y.detach(), leaf.grad
    found |= {name: p.grad for name, p in layer.named_parameters()}
    return found | dict(layer.named_buffers())


def compare(layer, inputs, masks, monkeypatch):
    eager = trained(layer, inputs, masks, torch.float32)
    exact = trained(layer, inputs, masks, torch.float64)
    with counted(monkeypatch) as calls:
        got = trained(layer, inputs, masks, torch.float32)
    assert calls
    for name, mine in got.items():
        # a sum over 38 positions in another order, as in `test_channel.py`: each of its at most 6 roundings is half an
        # ulp of the sum of sizes at most, which for the gradients of parameters is the sum of |probe * z| over them
        sizes = exact[name].abs().max().item()
        is_summed = name in dict(layer.named_parameters()) or "gz" in name
        scale = 3 * max(sizes, 38.0 * len(inputs) if is_summed else sizes)
        assert_within_contract(mine, eager[name], exact[name], scale=scale, what=name)


@pytest.mark.parametrize("name", CASES)
def test_training(name, monkeypatch):
    make, shape = CASES[name]
    compare(make(), [torch.randn(shape) + 3 for _ in range(3)], [None] * 3, monkeypatch)


@pytest.mark.parametrize("name", MASKED)
def test_training_with_padding(name, monkeypatch):
    make, shape = CASES[name]
    channel = shape.index(C)
    inputs = [torch.randn(shape) for _ in range(3)]
    masks = [torch.rand(*shape[:channel], *shape[channel + 1 :]) > 0.7 for _ in range(3)]
    compare(make(), inputs, masks, monkeypatch)


def test_both_regions_are_of_one_reading(monkeypatch):
    x, mask = torch.randn(2, C, 5, 7) + 3, (torch.rand(2, 1, 5, 7) > 0.6).float()
    layer = layers.RegionNormBinary(C)

    def run(wide):
        leaf = x.detach().to(wide, copy=True).requires_grad_()
        y = layer(leaf, mask.to(wide))
        (y * y.detach().sin()).sum().backward()
        return y.detach(), leaf.grad

    eager, exact = run(torch.float32), run(torch.float64)
    with counted(monkeypatch) as calls:
        got = run(torch.float32)
    assert len(calls) == 1, "the moments; the gradient at them calls the operator itself"
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        assert_within_contract(mine, theirs, truth, scale=3 * truth.abs().max().item())


def test_half_precision_is_rounded_once(monkeypatch):
    layer, x = layers.MaskedBatchNorm(C), torch.randn(40, C).bfloat16() + 3
    eager = copy.deepcopy(layer)(x)
    exact = copy.deepcopy(layer).double()(x.double())
    with counted(monkeypatch):
        got = layer(x)
    assert_within_contract(got.detach(), eager.detach(), exact.detach())


def test_not_on_a_cpu_and_not_in_a_compiled_graph(monkeypatch):
    x = torch.randn(4, C)
    assert not launched.is_launched(x)
    with counted(monkeypatch) as calls:
        assert not launched.is_launched(x.double())
        torch.compile(layers.MaskedBatchNorm(C), backend="eager", fullgraph=True)(x)
        assert not calls


def test_not_under_vmap(monkeypatch):
    layer, x = layers.UnifiedNorm(C).eval().requires_grad_(False), torch.randn(3, 4, C)
    with counted(monkeypatch) as calls:
        seen = torch.vmap(lambda t: torch.full_like(t, launched.is_launched(t)))(x)
        assert not seen.any()
        assert torch.vmap(layer)(x).shape == x.shape
        assert not calls
