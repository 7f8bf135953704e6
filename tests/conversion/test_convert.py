"""Convert: what is swapped, what the model then computes, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from models import roughened
from norms_by_hand import Bare, Between, C
from torch import nn

import normfx
from normfx import ConversionError, StatisticsError, calibrate, convert
from normfx.nn import AlphaBatchNorm, MaskedBatchNorm, PowerNorm, RMSNorm, UnifiedNorm, UnMixTNS


def data(count: int = 6, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 7, 5, generator=generator, dtype=dtype) + 0.5 for _ in range(count)]


def between(norm: nn.Module, dtype=torch.float64) -> Between:
    torch.manual_seed(3)
    return roughened(Between(norm)).to(dtype).eval()


def seen(model: Between, batches) -> torch.Tensor:
    """What the norm reads."""
    with torch.no_grad():
        return torch.cat([model.up(x).reshape(-1, C) for x in batches]).double()


def fitted(model: Between, batches) -> torch.Tensor:
    """The affine map nearest to the norm, by least squares, on what it reads."""
    x = seen(model, batches)
    with torch.no_grad():
        y = model.norm(x.to(model.up.weight.dtype)).double()
    centred, value = x - x.mean(0), y - y.mean(0)
    slope = (centred * value).sum(0) / centred.square().sum(0)
    return y.mean(0) + slope * centred


def assert_near(got: torch.Tensor, exact: torch.Tensor, dtype=torch.float64) -> None:
    """Sums over some hundred rows, and less than ten roundings after them: a thousand ulps in all."""
    scale = exact.abs().max()
    assert (got.double() - exact).abs().max() <= 1000 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("to", ["unified", "power", "batch"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm], ids=["LayerNorm", "RMSNorm"])
def test_the_converted_norm_is_the_nearest_affine_map(to, norm):
    model, batches = between(norm(C)), data()
    expected = fitted(model, batches)
    statistics = calibrate(model, batches)
    options = {"groups": None} if to == "power" else {}
    record = convert(model, to, statistics=statistics, **options)
    with torch.no_grad():
        assert_near(model.norm(seen(model, batches)), expected)
    (swap,) = record.swapped
    assert (swap.names, swap.kind, swap.layer) == (
        ("norm",),
        norm.__name__,
        type(model.norm).__name__,
    )
    assert 0 < swap.explained <= 1


def test_a_compiled_model_with_the_statistics_computes_the_same():
    model, batches = between(nn.LayerNorm(C)), data()
    statistics = calibrate(model, batches)
    options = {"statistics": statistics, "lowering": "eager", "strict": True}
    compiled = torch.compile(copy.deepcopy(model), backend="normfx", options=options)
    convert(model, "unified", statistics=statistics)
    with torch.no_grad():
        assert_near(model(batches[0]), compiled(batches[0]))


def test_statistics_of_the_unified_form_keep_the_weight():
    model, batches = between(nn.LayerNorm(C)), data()
    before = model.norm.weight.detach().clone()
    statistics = calibrate(model, batches, form="unified")
    convert(model, "unified", statistics=statistics)
    square = seen(model, batches).square().mean(0)
    assert_near(model.norm.running_var, square)
    assert_near(model.norm.weight.detach(), before)


def test_power_norm_with_group_scaling_is_the_rms_norm():
    model, batches = between(nn.RMSNorm(C, eps=1e-5)), data()
    expected = model(batches[0])
    convert(model, "power", statistics=calibrate(model, batches))
    assert model.norm.groups == 1
    assert_near(model(batches[0]), expected)


@pytest.mark.parametrize("to", ["unified", "power"])
def test_batch_norm_needs_no_statistics(to):
    model = between(nn.Identity())
    model.norm = MaskedBatchNorm(C).double()
    roughened(model).eval()
    expected = model(data()[0])
    convert(model, to, **({"groups": None} if to == "power" else {}))
    assert_near(model(data()[0]), expected)
    assert type(model.norm) is {"unified": UnifiedNorm, "power": PowerNorm}[to]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_batch_norm_of_images_keeps_its_channels(kind):
    rank = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}[kind]
    model = roughened(nn.Sequential(kind(C))).double().eval()
    x = torch.randn(3, C, *range(2, rank), dtype=torch.float64)
    expected = model(x)
    convert(model, "unified")
    assert model[0].channel_dim == 1
    assert_near(model(x), expected)


def test_unified_norm_becomes_a_batch_norm():
    model = between(UnifiedNorm(C))
    expected = model(data()[0])
    convert(model, "batch")
    assert type(model.norm) is MaskedBatchNorm
    assert_near(model(data()[0]), expected)


def test_layer_norm_becomes_an_rms_norm_with_its_bias():
    model = between(nn.LayerNorm(C))
    weight, bias = model.norm.weight, model.norm.bias
    convert(model, "rms")
    assert type(model.norm) is RMSNorm
    assert (model.norm.weight is weight, model.norm.bias is bias) == (True, True)
    x = seen(model, data()[:1])
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight + bias
    assert_near(model.norm(x), exact)


def test_alpha_and_unmix_take_a_batch_norm_over():
    images = torch.randn(3, C, 4, 4)
    for to, layer in (("alpha", AlphaBatchNorm), ("unmix", UnMixTNS)):
        model = roughened(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))).eval()
        options = {"generator": torch.Generator().manual_seed(2)} if to == "unmix" else {}
        weight = model[1].weight
        other = layer.from_batch_norm(model[1], **options)
        options = {"generator": torch.Generator().manual_seed(2)} if to == "unmix" else {}
        convert(model, to, **options)
        assert type(model[1]) is layer
        assert any(p is weight for p in model.parameters())
        assert torch.equal(model(images), other(model[0](images)))
        assert [kept.code.value for kept in convert(model, to).kept] == ["already-so"]
        assert [kept.code.value for kept in convert(model, "unified").kept] == ["more-than-a-norm"]
    model = nn.Sequential(nn.LayerNorm(C), nn.BatchNorm1d(C, track_running_stats=False))
    codes = [kept.code.value for kept in convert(model, "alpha").kept]
    assert codes == ["needs-batch-norm", "needs-batch-norm"]


# ------------------------------------------------------------------------ what is kept


def test_parameters_are_the_same_objects_and_an_optimizer_goes_on():
    model, batches = between(nn.LayerNorm(C)), data()
    weight, bias = model.norm.weight, model.norm.bias
    bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    record = convert(model, "unified", statistics=calibrate(model, batches))
    assert model.norm.weight is weight
    assert model.norm.bias is bias
    assert not bias.requires_grad
    assert record.new_parameters == {}
    before = weight.detach().clone()
    model(batches[0]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_a_bias_that_an_rms_norm_has_none_of_is_new():
    model, batches = between(nn.RMSNorm(C)), data()
    model.norm.weight.requires_grad_(False)
    record = convert(model, "unified", statistics=calibrate(model, batches))
    assert list(record.new_parameters) == ["norm.bias"]
    assert record.new_parameters["norm.bias"] is model.norm.bias
    assert not model.norm.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = between(nn.LayerNorm(C), dtype)
    batches = data(dtype=dtype)
    convert(model, "unified", statistics=calibrate(model, batches))
    assert model.norm.weight.dtype is model.norm.bias.dtype is dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert model.norm.running_var.dtype is wide
    assert model(batches[0]).dtype is dtype
    model.train()
    model(batches[0]).sum().backward()
    assert model.norm.weight.grad.dtype is dtype
    assert model.norm.running_var.dtype is wide


def test_a_norm_without_parameters_is_where_the_model_is():
    with torch.device("meta"):
        model = Between(nn.LayerNorm(C, elementwise_affine=False)).bfloat16()
    record = convert(model, "unified")
    assert model.norm.weight.device.type == "meta"
    assert model.norm.running_var.device.type == "meta"
    assert model.norm.weight.dtype is torch.bfloat16
    assert sorted(record.new_parameters) == ["norm.bias", "norm.weight"]
    record.undo()
    assert model.norm.weight is None


def test_hooks_and_their_handles():
    model, calls = between(nn.LayerNorm(C)), []
    model.norm.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    handle = model.norm.register_forward_hook(lambda m, a, y: calls.append("after"))
    model.norm.register_full_backward_hook(lambda m, g, h: calls.append("backward"))
    model.norm.register_forward_hook(
        lambda m, a, k, y: calls.append("keywords"), with_kwargs=True, always_call=True
    )
    record = convert(model, "unified")
    model(data()[0].requires_grad_()).sum().backward()
    assert calls == ["pre", "after", "keywords", "backward"]
    calls.clear()
    handle.remove()
    model(data()[0])
    assert calls == ["pre", "keywords"]
    record.undo()
    calls.clear()
    model(data()[0])
    assert calls == ["pre", "keywords"]


def test_modes():
    model = between(nn.LayerNorm(C))
    model.train()
    model.norm.eval()
    record = convert(model, "unified")
    assert not model.norm.training
    model.norm.train()
    record.undo()
    assert model.norm.training


def test_eps_is_carried_where_it_means_the_same():
    model = nn.Sequential(nn.LayerNorm(C, eps=1e-3), nn.RMSNorm(C), nn.LayerNorm(C, eps=0.0))
    convert(model, "unified")
    assert [layer.eps for layer in model] == [1e-3, 1e-5, 1e-5]


# ------------------------------------------------------------------------ shared, idempotent, undone


class Shared(nn.Module):
    """One norm at two names, called three times."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.up, self.down = norm, nn.Linear(5, C), nn.Linear(C, C)
        self.rest = nn.ModuleDict({"last": norm})

    def forward(self, x):
        x = self.first(self.up(x))
        return self.rest["last"](self.down(self.first(x)))


def test_a_module_at_two_places_stays_one():
    model = roughened(Shared(nn.LayerNorm(C))).double().eval()
    statistics = calibrate(model, data())
    record = convert(model, "unified", statistics=statistics)
    assert model.first is model.rest["last"]
    assert [swap.names for swap in record.swapped] == [("first", "rest.last")]
    inputs = []
    model.first.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    record.undo()
    assert model.first is model.rest["last"]
    with torch.no_grad():
        for x in data():
            model(x)
    square = torch.cat([x.reshape(-1, C) for x in inputs]).square().mean(0)
    record = convert(model, "unified", statistics=statistics)
    assert_near(model.first.running_var, square)  # of all three calls


def test_a_second_call_changes_nothing():
    model, batches = between(nn.LayerNorm(C)), data()
    statistics = calibrate(model, batches)
    convert(model, "unified", statistics=statistics)
    layer, state = model.norm, copy.deepcopy(model.state_dict())
    again = convert(model, "unified", statistics=statistics)
    assert again.swapped == []
    assert [(kept.name, kept.code.value) for kept in again.kept] == [("norm", "already-so")]
    assert model.norm is layer
    assert all(torch.equal(state[k], held) for k, held in model.state_dict().items())


def test_undo_gives_the_same_modules_and_bits_back():
    for dtype in (torch.float32, torch.bfloat16):
        model = between(nn.LayerNorm(C), dtype)
        norm, state = model.norm, copy.deepcopy(model.state_dict())
        record = convert(model, "unified", statistics=calibrate(model, data(dtype=dtype)))
        assert not torch.equal(model.norm.weight, state["norm.weight"])
        record.undo()
        assert model.norm is norm
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(state[k], held) for k, held in model.state_dict().items())
        record.undo()
        assert model.norm is norm


def test_what_was_trained_is_carried_back():
    model, batches = between(nn.LayerNorm(C)), data()
    statistics = calibrate(model, batches)
    record = convert(model, "unified", statistics=statistics)
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
        model.norm.bias.add_(0.25)
    expected = model(batches[0])
    record.undo()
    convert(model, "unified", statistics=statistics)
    assert_near(model(batches[0]), expected)


def test_training_goes_on_in_another_device_and_comes_back():
    model, batches = between(nn.BatchNorm1d(7)), data()
    old = model.norm
    record = convert(model, "unified", statistics=None)
    model.to("meta")
    record.undo()
    assert {t.device.type for t in old.state_dict().values()} == {"meta"}
    assert len(batches) == 6


# ------------------------------------------------------------------------ which, and what is refused


def test_filters():
    def model():
        return nn.Sequential(nn.LayerNorm(C), nn.Sequential(nn.LayerNorm(C), nn.RMSNorm(C)))

    record = convert(model(), "unified", filter=["1.*"])
    assert [swap.names[0] for swap in record.swapped] == ["1.0", "1.1"]
    assert [(k.name, k.code.value) for k in record.kept] == [("0", "site-not-chosen")]
    record = convert(model(), "unified", filter=lambda name, m: isinstance(m, nn.RMSNorm))
    assert [swap.names[0] for swap in record.swapped] == ["1.1"]
    with pytest.raises(ConversionError, match=r"no norm is named '2\.\*'; found 0, 1\.0, 1\.1"):
        convert(model(), "unified", filter=["2.*"])
    with pytest.raises(ConversionError, match="expected a list of names or a function, got '0'"):
        convert(model(), "unified", filter="0")


def test_statistics_choose():
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.LayerNorm(5)).double().eval()
    statistics = calibrate(model, data())
    record = convert(model, "unified", statistics=statistics.using(["2"]))
    assert [swap.names[0] for swap in record.swapped] == ["2"]
    assert [(k.name, k.code.value) for k in record.kept] == [("0", "site-not-chosen")]
    record = convert(model, "unified", statistics=statistics.using(["2"]), filter=["0"])
    assert [swap.names[0] for swap in record.swapped] == ["0"]


def test_what_no_layer_can_stand_for_stays():
    model = nn.Sequential(
        nn.GroupNorm(2, C), nn.LayerNorm((2, C)), nn.InstanceNorm2d(C), PowerNorm(C, groups=2)
    )
    record = convert(model, "unified")
    assert {kept.code.value for kept in record.kept} == {"not-per-channel"}
    assert "not-per-channel: The norm's statistics" in str(record)
    norm = nn.LayerNorm(C)
    assert [kept.code.value for kept in convert(norm, "unified").kept] == ["is-the-model"]
    with torch.inference_mode():
        model = nn.Sequential(nn.LayerNorm(C))
    assert [kept.code.value for kept in convert(model, "unified").kept] == ["weight-not-tracked"]


def test_a_computed_weight_stays():
    model = nn.Sequential(nn.LayerNorm(C))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    assert [kept.code.value for kept in convert(model, "unified").kept] == ["parameter-computed"]


def test_a_tied_weight_that_would_change_stays():
    model = roughened(nn.Sequential(nn.LayerNorm(5), nn.LayerNorm(5))).double().eval()
    model[1].weight = model[0].weight
    codes = [
        kept.code.value
        for kept in convert(model, "unified", statistics=calibrate(model, data())).kept
    ]
    assert codes == ["parameter-shared", "parameter-shared"]
    assert [swap.names[0] for swap in convert(model, "unified").swapped] == ["0", "1"]
    assert model[0].weight is model[1].weight


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bare = nn.LayerNorm(5), Bare()

    def forward(self, x):
        return nn.functional.layer_norm(self.bare(self.norm(x)), (5,))


def test_a_norm_outside_of_a_module_is_named():
    model = Functional().double().eval()
    record = convert(model, "unified", statistics=calibrate(model, data()))
    assert [swap.names[0] for swap in record.swapped] == ["norm", "bare"]
    assert [(k.kind, k.code.value) for k in record.kept] == [("LayerNorm", "no-module")]
    assert model.bare.channels == 5  # known from the statistics


def test_sites_that_were_not_measured_stay():
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.LayerNorm(5)).double().eval()
    record = convert(model, "unified", statistics=calibrate(model, data(), sites=["0"]))
    assert [(k.name, k.code.value) for k in record.kept] == [("2", "site-not-measured")]


def test_statistics_that_do_not_fit_change_nothing():
    model = between(nn.LayerNorm(C))
    statistics = calibrate(model, data())
    other = between(nn.RMSNorm(C))
    with pytest.raises(StatisticsError, match="site 'norm': the statistics are of a LayerNorm"):
        convert(other, "unified", statistics=statistics)
    assert type(other.norm) is nn.RMSNorm
    broken = calibrate(model, [torch.full((3, 7, 5), float("nan"), dtype=torch.float64)])
    with pytest.raises(StatisticsError, match="must be finite"):
        convert(model, "unified", statistics=broken)
    tied = calibrate(model, data(), weights=True)
    with torch.no_grad():
        model.up.weight.add_(1)
    with pytest.raises(StatisticsError, match=r"the values of 'up\.weight' differ"):
        convert(model, "unified", statistics=tied)
    assert type(model.norm) is nn.LayerNorm


def test_wrong_requests():
    model = between(nn.LayerNorm(C))
    with pytest.raises(ConversionError, match="cannot convert to 'unify': expected one of unified"):
        convert(model, "unify")
    with pytest.raises(ConversionError, match=r"norm: .*unexpected keyword argument 'windows'"):
        convert(model, "unified", windows=3)
    with pytest.raises(ConversionError, match="norm: UnifiedNorm: expected at least one channel"):
        convert(model, "unified", window=0)
    assert type(model.norm) is nn.LayerNorm


# ------------------------------------------------------------------------ readers that go past the module


@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_encoder_layers_is_left(nested):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(C, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested) if nested else layer
    model = roughened(model).eval()
    x = torch.randn(3, 5, C)
    mask = torch.arange(5).expand(3, 5) > torch.tensor([[4], [2], [3]])
    model(x, src_key_padding_mask=mask)
    record = convert(model, "unified")
    with torch.no_grad():  # where the fused operator would run
        got = model(x, src_key_padding_mask=mask)
    expected = model(x, src_key_padding_mask=mask)
    real = ~mask
    assert torch.equal(got[real], expected[real])
    record.undo()
    inner = model.layers[0] if nested else model
    assert inner.activation_relu_or_gelu == 1
    if nested:
        assert model.use_nested_tensor


def test_a_compiled_model_is_compiled_anew():
    model, batches = between(nn.LayerNorm(C), torch.float32), data(dtype=torch.float32)
    compiled = torch.compile(model, backend="normfx", options={"lowering": "eager"})
    with torch.no_grad():
        before = compiled(batches[0])
        record = convert(compiled, "unified", statistics=calibrate(model, batches))
        assert_near(compiled(batches[0]), model(batches[0]).double(), torch.float32)
        record.undo()
        assert torch.equal(compiled(batches[0]), before)


def test_the_record_is_a_table():
    model = nn.Sequential(nn.LayerNorm(C), nn.GroupNorm(2, C))
    assert str(convert(model, "unified")).splitlines()[:3] == [
        "norm  was        is           explained  kept for",
        "0     LayerNorm  UnifiedNorm  -          -",
        "1     GroupNorm  -            -          not-per-channel",
    ]
    assert normfx.Converted is type(convert(model, "unified"))
