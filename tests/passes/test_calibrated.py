"""The calibrated rule: what it puts in a norm's place, what folds then, and what it refuses."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from assertions import assert_gradients_within_contract, assert_within_contract, compiled
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibration"))
from calibrated_models import NAMES, batches, net

import normfx
from normfx import OptionError, Statistics, StatisticsError, calibrate
from normfx.calibration.statistics import SiteStatistics
from normfx.passes.calibrated import RULE


class Static(nn.Module):
    """What the rule promises, as a module: x (w s) + (w t + b)."""

    def __init__(self, norm: nn.Module, site: SiteStatistics, form: str = "fitted") -> None:
        super().__init__()
        scale, shift = site.affine(form)
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        trailing = [1] * (-1 - site.form.channel)
        self.register_buffer("scale", scale.reshape(-1, *trailing))
        self.register_buffer("shift", shift.reshape(-1, *trailing))

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        w = self.weight.double().reshape(self.scale.shape)
        shift = self.shift * w
        if self.bias is not None:
            shift = shift + self.bias.double().reshape(self.scale.shape)
        return (x.to(wide) * (self.scale * w).to(wide) + shift.to(wide)).to(x.dtype)


def static(model: nn.Module, statistics: Statistics, sites: list[str]) -> nn.Module:
    """The model with static modules at some sites."""
    model = copy.deepcopy(model)
    for name in sites:
        norm = model.get_submodule(name)
        model.set_submodule(name, Static(norm, statistics.sites[name], statistics.form))
    return model


def assert_static(model, statistics, sites, x, dynamic=None) -> None:
    """The compiled model is the model with static modules, within the contract."""
    reference = static(model, statistics, sites)
    fast = compiled(model, dynamic, statistics=statistics, sites=sites)
    with torch.no_grad():
        got, eager = fast(x), reference(x)
        exact = copy.deepcopy(reference).double()(x.double())
    assert_within_contract(got, eager, exact)


@pytest.fixture(scope="module")
def measured() -> Statistics:
    torch._dynamo.reset()
    return calibrate(net(), batches(6))


@pytest.mark.parametrize("form", ["fitted", "unified"])
@pytest.mark.parametrize("sites", [["final"], ["blocks.0.norm", "blocks.1.second"], NAMES])
def test_numerics(measured, sites, form):
    assert_static(net(), measured.using(form=form), sites, batches(1, seed=9)[0])


def test_the_journal(measured):
    with torch.no_grad():
        compiled(net(), statistics=measured, sites=["blocks.*.norm", "final"])(batches(1)[0])
    sites = {site.name: site for site in normfx.report().sites}
    # what is static is folded into the linear layer after it
    for name in ("blocks.0.norm", "blocks.1.norm", "final"):
        assert sites[name].actions[:2] == [RULE, "telescope"], name
    assert sites["blocks.0.second"].refusals[0] == "site-not-chosen"
    for site in sites.values():
        assert sum(record.rule == RULE for record in site.records) == 1


def test_without_statistics_there_is_no_record():
    with torch.no_grad():
        compiled(net())(batches(1)[0])
    rules = {record.rule for site in normfx.report().sites for record in site.records}
    assert RULE not in rules


def test_no_statistic_is_left(measured):
    graphs = []

    def backend(gm, inputs):
        from normfx.options import Options
        from normfx.pipeline import rewrite
        from normfx.record import Journal

        made = rewrite(gm, Options(statistics=measured), Journal())
        graphs.append(made.module)
        return gm

    with torch.no_grad():
        torch.compile(net(), backend=backend)(batches(1)[0])
    names = {str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"}
    assert not any(word in name for name in names for word in ("norm", "mean", "var", "rsqrt"))


def test_a_path_is_as_good_as_the_object(measured, tmp_path):
    path = tmp_path / "statistics"
    measured.save(path)
    x = batches(1)[0]
    with torch.no_grad():
        one = compiled(net(), statistics=measured)(x)
        torch._dynamo.reset()
        other = compiled(net(), statistics=str(path))(x)
    assert torch.equal(one, other)


def test_the_choice_of_the_statistics_is_the_default(measured):
    with torch.no_grad():
        compiled(net(), statistics=measured.using(["final"]))(batches(1)[0])
    changed = [site.name for site in normfx.report().sites if RULE in site.actions]
    assert changed == ["final"]


def test_dynamic_shapes(measured):
    for dynamic in (None, True):
        for tokens in (4, 7):
            assert_static(net(), measured, NAMES, batches(1, tokens)[0], dynamic)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = net().to(dtype)
    data = [x.to(dtype) for x in batches(4)]
    assert_static(model, calibrate(model, data), ["blocks.0.norm", "final"], data[0])


def test_weights_that_change_are_followed(measured):
    model, x = net(), batches(1)[0]
    fast = compiled(model, statistics=measured, sites=["final"])
    with torch.no_grad():
        fast(x)
        model.final.weight.mul_(3.0)
        model.final.bias.add_(1.0)
        reference = static(model, measured, ["final"])
        got, eager = fast(x), reference(x)
        assert_within_contract(got, eager, reference.double()(x.double()))


def test_gradients_are_those_of_the_static_model(measured):
    model, x = net(), batches(1)[0]
    reference = static(model, measured, NAMES)
    exact = copy.deepcopy(reference).double()
    reference(x).square().sum().backward()
    exact(x.double()).square().sum().backward()
    compiled(model, statistics=measured)(x).square().sum().backward()
    assert_gradients_within_contract(model, reference, exact)


def test_channels_first():
    class First(nn.Module):
        """A LayerNorm over the channels of an image, before a convolution (ConvNeXt)."""

        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.Module(), nn.Conv2d(6, 4, 1)
            self.norm.weight = nn.Parameter(torch.rand(6) + 0.5)
            self.norm.bias = nn.Parameter(torch.randn(6))

        def forward(self, x):
            m = x.mean(1, keepdim=True)
            v = (x - m).square().mean(1, keepdim=True)
            w, b = self.norm.weight[:, None, None], self.norm.bias[:, None, None]
            return self.conv((x - m) * torch.rsqrt(v + 1e-6) * w + b)

    class Reference(nn.Module):
        def __init__(self, model, site):
            super().__init__()
            self.norm, self.conv = Static(model.norm, site), model.conv

        def forward(self, x):
            return self.conv(self.norm(x))

    model, data = First(), [torch.randn(2, 6, 5, 5) for _ in range(3)]
    statistics = calibrate(model, data)
    (site,) = statistics.sites.values()
    assert (site.form.channel, site.form.channels) == (-3, 6)
    with torch.no_grad():
        got = compiled(model, statistics=statistics)(data[0])
        reference = Reference(model, site)
        eager = reference(data[0])
        assert_within_contract(got, eager, copy.deepcopy(reference).double()(data[0].double()))
    assert normfx.report().sites[0].actions[0] == RULE


def test_batchnorm_with_batch_statistics_becomes_that_with_given_ones():
    class Frozen(nn.Module):
        def __init__(self, model, site):
            super().__init__()
            self.model = copy.deepcopy(model).eval()
            found = site.moments
            self.model[1].running_mean.copy_(found.mean)
            self.model[1].running_var.copy_(found.variance)

        def forward(self, x):
            return self.model(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    data = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    statistics = calibrate(model, data)
    with torch.no_grad():
        got = compiled(model, statistics=statistics)(data[0])
        reference = Frozen(model, statistics.sites["1"])
        assert_within_contract(got, reference(data[0]), reference.double()(data[0].double()))
    (site,) = normfx.report().sites
    assert site.actions == [RULE, "fold-statistics-into-previous"]


def test_a_stream_that_a_static_norm_reads_is_not_centred(measured):
    """A static norm sees the mean that the LayerNorm in its place did not."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(8, 8)
            self.a, self.b = nn.LayerNorm(8), nn.LayerNorm(8)
            self.x, self.y = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.inp(x)
            x = x + self.x(self.a(x))
            return self.y(self.b(x))

    torch.manual_seed(1)
    model, data = Stream(), batches(4)
    statistics = calibrate(model, data)
    assert_static(model, statistics, ["a"], data[0])
    by_name = {site.name: site for site in normfx.report().sites}
    assert "recentre" not in by_name["b"].actions


def test_a_channel_that_never_changes():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.norm(x))

    x = torch.randn(512, 4)
    x[:, 2] = 1.5
    model = Dead()
    statistics = calibrate(model, [x])
    (site,) = statistics.sites.values()
    scale, _ = site.affine("fitted")
    assert scale.isfinite().all()
    assert scale[2] > 0
    assert_static(model, statistics, ["norm"], x)


class Plain(nn.Module):
    """A norm without a weight, whose static form has no reader that could take it."""

    def __init__(self):
        super().__init__()
        self.norm, self.second = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.norm(x)) + torch.tanh(self.second(x))


@pytest.mark.inductor
def test_two_files_are_two_compiled_models():
    """Inductor's caches do not mistake one file's numbers for the other's."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.utils import fresh_cache

    torch.manual_seed(1)
    model, x = Plain(), batches(1)[0]
    results = []
    with (
        fresh_cache(),
        inductor_config.patch(fx_graph_cache=True),
        functorch_config.patch(enable_autograd_cache=True),
    ):
        for seed in (0, 3):
            torch._dynamo.reset()
            statistics = calibrate(model, batches(2, seed=seed))
            options = {"strict": True, "statistics": statistics}
            with torch.no_grad():
                got = torch.compile(model, backend="normfx", options=options)(x)
                site = statistics.sites["second"]
                scale, shift = (held.float() for held in site.affine("fitted"))
                reference = copy.deepcopy(model)
                reference.norm = Static(model.norm, statistics.sites["norm"])
                expected = reference.out(reference.norm(x)) + torch.tanh(x * scale + shift)
            # Inductor's own tanh and its order of additions
            ulp = torch.finfo(torch.float32).eps * expected.abs().max()
            assert (got - expected).abs().max() <= 16 * ulp
            results.append(got)
    assert not torch.equal(*results)


# ---------------------------------------------------------------------------- refusals


def test_statistics_of_another_model(measured):
    for model, width in ((net(width=16), 16), (net(depth=3), 8), (net().bfloat16(), 8)):
        torch._dynamo.reset()
        x = batches(1, width=width)[0].to(next(model.parameters()).dtype)
        with pytest.raises(Exception, match=r"the statistics are of another model: they expect"):
            compiled(model, statistics=measured)(x)


@pytest.mark.parametrize("strict", [True, False])
def test_bad_statistics_raise_whether_strict_or_not(measured, strict):
    with pytest.raises(Exception, match="StatisticsError"):
        compiled(net(width=16), statistics=measured, strict=strict)(batches(1, width=16)[0])
    with pytest.raises(StatisticsError, match="another model"):
        normfx.explain(net(width=16), options={"statistics": measured, "strict": strict})(
            batches(1, width=16)[0]
        )


def explained(model, statistics, **options):
    with torch.no_grad():
        return normfx.explain(model, options={"statistics": statistics, **options})(batches(1)[0])


def test_a_missing_site(measured):
    fewer = {name: site for name, site in measured.sites.items() if name != "final"}
    with pytest.raises(
        StatisticsError, match=r"site 'final' \(a LayerNorm over 8 channels.*missin"
    ):
        explained(net(), replace(measured, sites=fewer))
    with pytest.raises(StatisticsError, match="no site 'last'"):
        explained(net(), measured, sites=["last"])


def test_a_calibration_of_some_sites_leaves_the_others():
    statistics = calibrate(net(), batches(2), sites=["final"])
    by_name = {site.name: site for site in explained(net(), statistics).sites}
    assert RULE in by_name["final"].actions
    assert by_name["blocks.0.norm"].refusals[0] == "site-not-chosen"


def test_another_norm_at_the_site(measured):
    model = net()
    model.final = nn.LayerNorm(8, eps=1e-3)
    with pytest.raises(StatisticsError, match=r"site 'final': .* eps 1e-05, but .* eps 0.001"):
        explained(model, measured)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("key", ["mean", "square", "cross"])
def test_numbers_that_are_not_finite(measured, bad, key):
    site = measured.sites["final"]
    held = getattr(site.moments, key).clone()
    held[3] = bad
    moments = site.moments._replace(**{key: held})
    sites = {**measured.sites, "final": replace(site, moments=moments)}
    broken = replace(measured, sites=sites)
    with pytest.raises(StatisticsError, match=f"site 'final': .* 1 of {key}"):
        explained(net(), broken)
    explained(net(), broken, sites=["blocks.*"])  # is not asked for


def test_no_rows(measured):
    site = measured.sites["final"]
    none = type(site.moments)(*(torch.zeros_like(held) for held in site.moments))
    sites = {**measured.sites, "final": replace(site, moments=none)}
    with pytest.raises(StatisticsError, match="of no rows"):
        explained(net(), replace(measured, sites=sites))


def test_other_weights():
    statistics = calibrate(net(), batches(2), weights=True)
    explained(net(), statistics)
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    with pytest.raises(StatisticsError, match=r"other weights: the values of 'head.weight' differ"):
        explained(model, statistics)


def test_options():
    with pytest.raises(OptionError, match="'sites' needs the option 'statistics'"):
        normfx.explain(net(), options={"sites": ["final"]})
    with pytest.raises(OptionError, match="Statistics or the path"):
        normfx.explain(net(), options={"statistics": 3})
    with pytest.raises(FileNotFoundError):
        normfx.explain(net(), options={"statistics": "nowhere.safetensors"})


def test_rule_off(measured):
    (first, *_) = explained(net(), measured, rules=["hoist"]).sites
    assert first.refusals[0] == "rule-off"


class Beside(nn.Module):
    """A norm that is calibrated, and one that cannot be."""

    def __init__(self, other):
        super().__init__()
        self.norm, self.other, self.weight = nn.LayerNorm(8), other, nn.Linear(8, 8)

    def forward(self, x):
        return self.norm(x) + self.other(self, x)


def grouped(m, x):
    return nn.functional.group_norm(x, 2)


def modulated(m, x):
    """The weight is computed from activations."""
    return nn.functional.layer_norm(x + 1, (8,), m.weight(x)[0, 0])


def checkpointed(m, x):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda y: nn.functional.layer_norm(y + 1, (8,)), x, use_reentrant=False)


@pytest.mark.parametrize(
    ("other", "code"),
    [
        (grouped, "not-per-channel"),
        (modulated, "affine-not-constant"),
        (checkpointed, "inside-a-body"),
    ],
)
def test_refused(other, code):
    model, data = Beside(other), batches(2)
    statistics = calibrate(model, data)
    assert list(statistics.sites) == ["norm"]
    report = explained(model, statistics)
    records = [r for s in report.sites for r in s.records if r.rule == RULE]
    assert [r.changed for r in records].count(True) == 1
    assert [r.code.value for r in records if r.code] == [code]
    if code != "inside-a-body":
        (name,) = statistics.refused
        with pytest.raises(StatisticsError, match=f"cannot be replaced: {code}"):
            explained(model, statistics, sites=[name])


def test_a_site_that_could_not_be_measured(measured):
    site = {name: s for name, s in measured.sites.items() if name != "final"}
    partly = replace(measured, sites=site, refused={"final": "several norms have this name"})
    by_name = {site.name: site for site in explained(net(), partly).sites}
    assert by_name["final"].refusals[0] == "site-not-measured"
    with pytest.raises(StatisticsError, match="'final' cannot be replaced: several norms"):
        explained(net(), partly, sites=["final"])
