"""Proof: hand-written norms are told by what they compute, and near misses stay."""

from __future__ import annotations

import norms_by_hand as by_hand
import pytest
import torch
from norms_by_hand import Between, C
from torch import nn

from normfx import calibrate, convert
from normfx.conversion.proof import Proofs
from normfx.conversion.sources import Source
from normfx.record import Refusal


@pytest.mark.parametrize(
    ("make", "kind", "eps", "affine", "place"),
    [
        (by_hand.Llama, "RMSNorm", 1e-6, ("weight", None, 1.0, 0.0), -1),
        (by_hand.Gemma, "RMSNorm", 1e-6, ("weight", None, 1.0, 1.0), -1),
        (by_hand.Tf, "LayerNorm", 1e-5, ("gamma", "beta", 1.0, 0.0), -1),
        (by_hand.Pixels, "LayerNorm", 1e-6, ("weight", "bias", 1.0, 0.0), 1),
    ],
)
def test_norms_by_hand(make, kind, eps, affine, place):
    module = make()
    source = Proofs()(module, None)
    assert isinstance(source, Source)
    assert (source.kind, source.eps, source.channel_dim, source.channels) == (kind, eps, place, C)
    weight, bias, factor, offset = affine
    assert source.weight is getattr(module, weight)
    assert source.bias is (None if bias is None else getattr(module, bias))
    assert (source.factor, source.offset) == (factor, offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    for make in (by_hand.Llama, by_hand.Gemma, by_hand.Tf):
        source = Proofs()(make().to(dtype), None)
        assert isinstance(source, Source)
        assert source.dtype is dtype


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (by_hand.Gated, "further-arguments"),
        (by_hand.Dropped, "more-than-a-norm"),
        (by_hand.Added, "more-than-a-norm"),
        (by_hand.Counting, "more-than-a-norm"),
        (by_hand.ByRank, "more-than-a-norm"),
        (by_hand.Softplus, "parameter-computed"),
        (by_hand.Frozen, "no-statistic"),
    ],
)
def test_near_misses(make, code):
    model = Between(make())
    record = convert(model, "unified")
    assert record.swapped == []
    assert [kept.code.value for kept in record.kept] == [code]
    assert type(model.norm) is make


@pytest.mark.parametrize("module", [by_hand.Cubed(), nn.Linear(C, C), nn.Dropout(), by_hand.Bare()])
def test_no_norms(module):
    assert Proofs()(module, None) is None


def test_a_trial_call_leaves_the_module_alone():
    module = by_hand.Counting().train()
    module.register_forward_hook(lambda *_: pytest.fail("the hook ran"))
    state = torch.get_rng_state()
    assert Proofs()(by_hand.Dropped(), None) is Refusal.MORE_THAN_NORM
    Proofs()(module, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.calls.item() == 0
    assert module.training


def test_modules_that_differ_in_numbers_share_a_proof(monkeypatch):
    import normfx.conversion.proof as proof

    proved = []
    inner = proof._prove
    monkeypatch.setattr(proof, "_prove", lambda *args: proved.append(1) or inner(*args))
    proofs, first, second = Proofs(), by_hand.Llama(), by_hand.Llama()
    assert proofs(first, None).weight is first.weight
    assert proofs(second, None).weight is second.weight
    assert len(proved) == 1
    second.variance_epsilon = 1e-3
    assert proofs(second, None).eps == 1e-3
    assert len(proved) == 2
    second.forward = lambda x: x.pow(2)
    assert proofs(second, None) is None
    assert len(proved) == 3


def test_a_weight_plus_one_comes_back():
    torch.manual_seed(0)
    model = Between(by_hand.Gemma()).double().eval()
    weight = model.norm.weight
    before, batches = weight.detach().clone(), [torch.randn(3, 7, 5, dtype=torch.float64)]
    statistics = calibrate(model, batches)
    record = convert(model, "unified", statistics=statistics)
    assert model.norm.weight is weight
    with torch.no_grad():
        model.norm.weight[0] *= 2
    record.undo()
    # (1 + w) doubled, at the one channel that was trained
    assert torch.equal(weight[1:], before[1:])
    assert abs(weight[0].item() - (2 * (1 + before[0].item()) - 1)) <= 1e-15
    assert type(model.norm) is by_hand.Gemma


def test_an_l2_norm_is_an_rms_norm_with_a_factor():
    class L2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(1, 2, C))

        def forward(self, x):
            return self.scale * x / x.square().sum(-1, keepdim=True).sqrt()

    model = Between(L2()).double()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    expected = model(x)
    scale, values = model.norm.scale, model.norm.scale.detach().clone()
    record = convert(model, "rms", eps=1e-300)
    assert model.norm.weight is scale
    assert (model(x) - expected).abs().max() <= 1e-14
    record.undo()
    assert torch.equal(scale, values)
