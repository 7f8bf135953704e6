"""Test time: BatchNorms that adapt, beside the layers of normfx.nn that compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from assertions import STRICT, assert_within_contract, compiled
from models import roughened
from torch import nn

import normfx
from normfx import OptionError
from normfx.nn import AlphaBatchNorm, MaskedBatchNorm, UnMixTNS

C = 5
ALPHA = {"kind": "alpha-bn", "weight_of_test_batch": 0.3}
UNMIX = {"kind": "unmix-tns", "components": 4, "momentum": 0.2, "seed": 3}


def network(dtype=torch.float32, **options) -> nn.Sequential:
    torch.manual_seed(2)
    parts = [nn.Conv2d(3, C, 3), nn.BatchNorm2d(C, **options), nn.ReLU(), nn.Conv2d(C, 4, 1)]
    return roughened(nn.Sequential(*parts)).to(dtype).eval()


def alpha(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    made[1] = AlphaBatchNorm.from_batch_norm(made[1], 0.3)
    return made


def unmix(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    made[1] = UnMixTNS.from_batch_norm(made[1], components=4, generator=generator)
    made[1].momentum = 0.2
    return made


def images(*shape: int) -> torch.Tensor:
    shape = shape or (3, 3, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 2 + 1


def run(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(("how", "layer"), [(ALPHA, alpha), (UNMIX, unmix)], ids=["alpha", "unmix"])
def test_it_computes_what_the_layer_does(how, layer):
    model = network()
    fast, eager, exact = compiled(model, test_time=how), layer(model), layer(model.double())
    model.float()
    for x in (images(), images(), 5 * images() - 2, images(3, 3, 9, 4), images(7, 3, 6, 6)):
        got = run(fast, x)
        assert_within_contract(got, run(eager, x), run(exact, x.double()))
    assert normfx.report().sites[0].actions == ["test-time-norm"]
    assert (run(fast, images()) - run(model, images())).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("how", "layer"), [(ALPHA, alpha), (UNMIX, unmix)], ids=["alpha", "unmix"])
def test_dtypes(how, layer, dtype):
    model, x = network(dtype), images().to(dtype)
    exact = run(layer(network(dtype).double()), x.double())
    expected = run(layer(model), x)
    assert_within_contract(run(compiled(model, test_time=how), x), expected, exact)


@pytest.mark.parametrize("how", [ALPHA, UNMIX], ids=["alpha", "unmix"])
def test_without_affine(how):
    model, x = network(affine=False), images()
    layer = alpha if how is ALPHA else unmix
    got = run(compiled(model, test_time=how), x)
    assert_within_contract(
        got, run(layer(model), x), run(layer(network(affine=False).double()), x.double())
    )


@pytest.mark.inductor
@pytest.mark.parametrize(("how", "layer"), [(ALPHA, alpha), (UNMIX, unmix)], ids=["alpha", "unmix"])
def test_through_inductor(how, layer):
    model = network()
    eager, exact = layer(model), layer(network().double())
    fast = torch.compile(model, backend="normfx", options={"strict": True, "test_time": how})
    for x in (images(), 3 * images(), images()):
        assert_within_contract(run(fast, x), run(eager, x), run(exact, x.double()))


def test_dynamic_shapes():
    model = network()
    eager, exact = alpha(model), alpha(network().double())
    fast = compiled(model, dynamic=True, test_time=ALPHA)
    for shape in ((2, 3, 6, 6), (5, 3, 4, 9), (3, 3, 7, 7)):
        x = images(*shape)
        assert_within_contract(run(fast, x), run(eager, x), run(exact, x.double()))


def test_one_position_a_channel():
    model = roughened(nn.Sequential(nn.BatchNorm1d(C))).eval()
    layer = AlphaBatchNorm.from_batch_norm(model[0], 0.3)
    x = torch.randn(1, C)
    got = run(compiled(model, test_time=ALPHA), x)
    exact = run(copy.deepcopy(layer).double(), x.double())
    assert_within_contract(got, run(layer, x), exact)


def test_hard_inputs():
    model = network(torch.float64)
    fast, eager = compiled(model, test_time=ALPHA), alpha(model)
    for x in (
        torch.zeros(2, 3, 6, 6),
        images() * 1e-3 + 1e4,
        images().transpose(2, 3),
        torch.full((2, 3, 6, 6), float("nan")),
    ):
        x = x.double()
        got, expected = run(fast, x), run(eager, x)
        assert torch.equal(got.isnan(), expected.isnan())
        # in float64 both round some ten times, relative to the largest input
        limit = 64 * torch.finfo(torch.float64).eps * x.nan_to_num().abs().max() ** 2
        assert (got - expected).nan_to_num().abs().max() <= limit


def test_alpha_has_gradients_and_none_through_the_statistics():
    model, x = network(torch.float64), images().double()
    eager = alpha(model)
    results = []
    for call, owner in ((compiled(model, test_time=ALPHA), model), (eager, eager)):
        x = x.detach().requires_grad_()
        owner.zero_grad()
        call(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in owner.parameters())])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= 1e3 * torch.finfo(
            torch.float64
        ).eps * theirs.abs().max()


def test_components_go_on_in_another_graph_and_begin_anew_with_another_option():
    model, x = network(), images()
    eager = unmix(model)
    run(compiled(model, test_time=UNMIX), x)
    run(eager, x)
    torch._dynamo.reset()
    got = run(compiled(model, test_time=UNMIX), x)
    moved = run(eager, x)
    assert_within_contract(got, moved, moved.double())
    got = run(compiled(model, test_time={**UNMIX, "momentum": 0.0}), x)
    fresh = run(unmix(model), x)
    assert_within_contract(got, fresh, fresh.double())


def test_the_model_is_not_changed():
    model = network()
    before = copy.deepcopy(model.state_dict())
    for how in (ALPHA, UNMIX):
        run(compiled(model, test_time=how), images())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[k], held) for k, held in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "how", "code"),
    [
        (nn.Sequential(MaskedBatchNorm(C)), ALPHA, "needs-batch-norm"),
        (nn.Sequential(nn.BatchNorm1d(C)), UNMIX, "no-image"),
        (nn.Sequential(nn.BatchNorm1d(C)), {**ALPHA, "off": True}, "rule-off"),
    ],
)
def test_refused(model, how, code):
    model = roughened(model).eval()
    how = dict(how)
    rules = {"rules": []} if how.pop("off", False) else {}
    x = torch.randn(6, C)
    fast = compiled(model, test_time=how, **rules)
    assert torch.equal(run(fast, x), run(compiled(model, **rules), x))
    (record,) = [r for r in normfx.report().sites[0].records if r.rule == "test-time-norm"]
    assert not record.changed
    assert record.code.value == code


class Computed(nn.Module):
    """A BatchNorm that somebody adapts already."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = roughened(nn.BatchNorm1d(C)).eval()

    def forward(self, x):
        norm = self.norm
        mean, variance = 0.5 * (norm.running_mean + x.mean(0)), norm.running_var
        return torch.nn.functional.batch_norm(x, mean, variance, norm.weight, norm.bias)


def test_statistics_that_are_computed_stay():
    model, x = Computed(), torch.randn(6, C)
    assert_within_contract(
        run(compiled(model, test_time=ALPHA), x),
        run(model, x),
        run(copy.deepcopy(model).double(), x.double()),
    )
    codes = [r.code.value for r in normfx.report().sites[0].records if r.rule == "test-time-norm"]
    assert codes == ["affine-not-constant"]


def test_unmix_is_for_inference():
    model, x = network(), images()
    fast = compiled(model, test_time=UNMIX)
    expected = model(x)
    assert_within_contract(fast(x), expected, expected.double())
    (record,) = [r for r in normfx.report().sites[0].records if r.rule == "test-time-norm"]
    assert record.code.value == "needs-grad"


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_inside_of_a_checkpoint():
    model, x = Checkpointed(), images()
    for how, layer in ((ALPHA, alpha), (UNMIX, None)):
        expected = run(model.inner if layer is None else layer(model.inner), x)
        got = run(compiled(model, test_time=how), x)
        assert_within_contract(got, expected, expected.double())
    (record,) = [r for r in normfx.report().sites[-1].records if r.rule == "test-time-norm"]
    assert record.code.value == "inside-a-body"


def test_verify_holds_what_comes_after_to_it():
    model, x = network(), images()
    with torch.no_grad():
        verified = normfx.verify(model, options={"test_time": ALPHA})(x)
    assert verified.ok, str(verified)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("alpha", "expected one of 'alpha-bn', 'unmix-tns', or a mapping .*, got 'alpha'"),
        ({"weight_of_test_batch": 0.1}, "with that as its 'kind'"),
        (3, "got 3"),
        ({"kind": "alpha-bn", "weight": 1}, "unknown entry of the option 'test_time' 'weight'"),
        ({**ALPHA, "weight_of_test_batch": 1.5}, "number from 0 to 1, got 1.5"),
        ({**ALPHA, "weight_of_test_batch": "a"}, "weight_of_test_batch to be a number"),
        ({**UNMIX, "components": 2.5}, "components to be a whole number from 1, got 2.5"),
        ({**UNMIX, "components": 0}, "whole number from 1, got 0"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(OptionError, match=message):
        normfx.Options.parse({**STRICT, "test_time": given})


def test_names_alone():
    assert normfx.Options.parse({"test_time": "alpha-bn"}).test_time.weight_of_test_batch == 0.1
    assert normfx.Options.parse({"test_time": None}).test_time is None
