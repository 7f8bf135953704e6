"""Recognise: ATen's own norms by their arguments, near misses by the law that failed.

Spelled-out norms are drawn at random in test_spellings.py.
"""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from assertions import assert_agrees, assert_within_contract, compiled
from models import roughened
from torch import nn

import normfx


def batch_norm_eval():
    return nn.BatchNorm2d(6).eval()


MODULES = {
    "LayerNorm": (lambda: nn.LayerNorm(5, eps=1e-4), (-1,), 1e-4, "layer_norm"),
    "LayerNorm-2d": (lambda: nn.LayerNorm((4, 5)), (-2, -1), 1e-5, "layer_norm"),
    "LayerNorm-no-bias": (lambda: nn.LayerNorm(5, bias=False), (-1,), 1e-5, "layer_norm"),
    "LayerNorm-plain": (
        lambda: nn.LayerNorm(5, elementwise_affine=False),
        (-1,),
        1e-5,
        "layer_norm",
    ),
    "RMSNorm": (lambda: nn.RMSNorm(5, eps=1e-6), (-1,), 1e-6, "rms_norm"),
    "RMSNorm-default": (lambda: nn.RMSNorm(5), (-1,), torch.finfo(torch.float32).eps, "rms_norm"),
    "GroupNorm": (lambda: nn.GroupNorm(3, 6), (1, 2, 3), 1e-5, "group_norm"),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(6, affine=True), (-2, -1), 1e-5, "instance_norm"),
    "BatchNorm": (batch_norm_eval, (), 1e-5, "batch_norm"),
    "BatchNorm-training": (
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        (0, 2, 3),
        1e-5,
        "batch_norm",
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules(case):
    make, dims, eps, origin = MODULES[case]
    model = roughened(make())
    assert_agrees(model, torch.randn(3, 6, 4, 5))
    (site,) = normfx.report().sites
    assert site.kind == case.split("-")[0]
    assert site.dims == dims
    assert site.eps == pytest.approx(eps)
    assert site.origin == origin
    assert site.dtype == "float32"
    assert site.weight is (getattr(model, "weight", None) is not None)
    assert site.bias is (getattr(model, "bias", None) is not None)


@pytest.mark.parametrize("case", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(case, dtype):
    assert_agrees(roughened(MODULES[case][0]()).to(dtype), torch.randn(3, 6, 4, 5).to(dtype))
    (site,) = normfx.report().sites
    assert site.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("case", MODULES)
def test_gradients(case):
    model = roughened(nn.Sequential(nn.Conv2d(6, 6, 1), MODULES[case][0]()))
    assert_agrees(model, torch.randn(3, 6, 4, 5), grad=True)
    assert len(normfx.report().sites) == 1


def test_reference_formulas():
    """Eager as torch has it and the formulas agree, so a test may use either."""
    x = torch.randn(3, 6, 4, 5).double()
    weight, bias = torch.rand(5).double(), torch.randn(5).double()
    per_channel, shift = torch.rand(6).double(), torch.randn(6).double()
    mean, variance = torch.randn(6).double(), torch.rand(6).double()
    trained, batch_mean, batch_variance = reference.batch_norm_training(x, per_channel, shift, 1e-5)
    running = (torch.zeros(6).double(), torch.ones(6).double())
    pairs = [
        (F.layer_norm(x, (5,), weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5)),
        (F.layer_norm(x, (4, 5)), reference.layer_norm(x, None, None, 1e-5, dims=2)),
        (F.rms_norm(x, (5,), weight, 1e-5), reference.rms_norm(x, weight, 1e-5)),
        (F.normalize(x, dim=1), reference.l2_norm(x, 1e-12, dim=1)),
        (
            F.group_norm(x, 3, per_channel, shift),
            reference.group_norm(x, 3, per_channel, shift, 1e-5),
        ),
        (
            F.instance_norm(x, weight=per_channel, bias=shift),
            reference.instance_norm(x, per_channel, shift, 1e-5),
        ),
        (
            F.batch_norm(x, mean, variance, per_channel, shift),
            reference.batch_norm(x, mean, variance, per_channel, shift, 1e-5),
        ),
        (F.batch_norm(x, *running, per_channel, shift, True, 1.0), trained),
        (running[0], batch_mean),
        (running[1], batch_variance),
    ]
    for got, exact in pairs:
        # Two float64 computations in another order: a few ulp of the largest value, for up to 60 summands.
        assert (got - exact).abs().max() <= 60 * torch.finfo(torch.float64).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "l2_norm"])
def test_against_the_formula(name):
    x, weight, bias = torch.randn(64, 32), torch.rand(32) + 0.5, torch.randn(32)
    eager, exact = {
        "layer_norm": (
            lambda x: F.layer_norm(x, (32,), weight, bias),
            reference.layer_norm(x, weight, bias, 1e-5),
        ),
        "rms_norm": (
            lambda x: F.rms_norm(x, (32,), weight, 1e-6),
            reference.rms_norm(x, weight, 1e-6),
        ),
        "l2_norm": (lambda x: F.normalize(x, dim=-1), reference.l2_norm(x, 1e-12)),
    }[name]
    assert_within_contract(compiled(eager)(x), eager(x), exact)
    assert len(normfx.report().sites) == 1


def test_batch_norm_in_training_updates_its_statistics():
    model = roughened(nn.BatchNorm2d(6))
    assert_agrees(model, torch.randn(3, 6, 4, 5), grad=True)
    (site,) = normfx.report().sites
    assert site.kind == "BatchNorm"


# drawn in the test, after its seed is set
HARD = {
    "zeros": lambda: torch.zeros(8, 32),
    "constant-rows": lambda: torch.full((8, 32), 3.0),
    "large-mean": lambda: 1e4 + torch.randn(8, 32),
    "tiny": lambda: 1e-18 * torch.randn(8, 32),
    "huge": lambda: 1e18 * torch.randn(8, 32),
    "one-row": lambda: torch.randn(1, 32),
    "not-contiguous": lambda: torch.randn(32, 8).t(),
    "broadcast-strides": lambda: torch.randn(8, 1).expand(8, 32),
}


def spelled_layer_norm(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)


def spelled_rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


SPELLED = {
    "layer-norm": spelled_layer_norm,
    "rms-norm": spelled_rms_norm,
    "normalize": lambda x: F.normalize(x, dim=-1),
}


@pytest.mark.parametrize("rows", HARD)
@pytest.mark.parametrize("name", SPELLED)
def test_hard_rows(name, rows):
    function, x = SPELLED[name], HARD[rows]()
    assert_within_contract(compiled(function)(x), function(x), function(x.double()))
    assert len(normfx.report().sites) == 1


def near_miss(function, *inputs, grad=False, dynamic=None):
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(function, dynamic=dynamic)(*inputs), function(*inputs))
    assert normfx.report().sites == []
    return [miss.code.value for miss in normfx.report().near_misses]


def test_near_miss_other_dims():
    def mixed(x):
        return (x - x.mean(0, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)

    assert "reduction-over-other-dims" in near_miss(mixed, torch.randn(6, 7))


def test_near_miss_unknown_statistic():
    def cumulative(x):
        return x * torch.rsqrt(x.pow(2).cumsum(-1) + 1e-5)

    assert near_miss(cumulative, torch.randn(6, 7)) == ["unknown-statistic"]


def test_near_miss_statistic_of_another_tensor():
    def of_two_tensors(x, w):
        weighted = (x * w).mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + weighted)

    codes = near_miss(of_two_tensors, torch.rand(6, 7), torch.rand(7))
    assert "statistic-of-another-tensor" in codes


OPERATOR_LAWS = {
    "rsqrt-clamped": lambda x: x * torch.rsqrt((x * x).mean(-1, True) + 1e-5).clamp(max=1),
    "rms-in-bounds": lambda x: x / (x * x).mean(-1, True).sqrt().clamp(1e-6, 10),
    "quotient-rounded": lambda x: torch.div(
        x, ((x * x).mean(-1, True) + 1e-5).sqrt(), rounding_mode="floor"
    ),
    "power-too-large": lambda x: x * ((x * x).mean(-1, True) + 1e-5).rsqrt() ** 9,
    "eight-bits": lambda x: (
        x * ((x * x).mean(-1, True) + 1e-5).rsqrt().to(torch.float8_e4m3fn).float()
    ),
}


@pytest.mark.parametrize("case", OPERATOR_LAWS)
def test_near_miss_operator_law(case):
    assert near_miss(OPERATOR_LAWS[case], torch.randn(6, 7)) == ["operator-law"]


@pytest.mark.parametrize("centred", [True, False])
def test_near_miss_symbolic_correction(centred):
    def unbiased(x):
        mean = x.mean(-1, keepdim=True) if centred else 0.0
        return (x - mean) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)

    x = torch.randn(6, 7)
    torch._dynamo.mark_dynamic(x, 1)
    assert "symbolic-correction" in near_miss(unbiased, x)


def test_an_unbiased_variance_over_a_known_dim_of_a_dynamic_batch():
    def unbiased(x):
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)

    x = torch.randn(6, 7)
    torch._dynamo.mark_dynamic(x, 0)
    assert_within_contract(compiled(unbiased)(x), unbiased(x), unbiased(x.double()))
    assert len(normfx.report().sites) == 1


def test_near_miss_factor_only():
    def of_another_tensor(x, y):
        return x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)

    assert near_miss(of_another_tensor, torch.randn(6, 7), torch.randn(6, 7)) == ["factor-only"]


def test_near_miss_factor_only_of_a_distance():
    def distance(x, y):
        return (x - y).pow(2).sum(-1).sqrt()

    assert near_miss(distance, torch.randn(6, 7), torch.randn(6, 7)) == ["factor-only"]


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param(
            lambda t: t.abs(),
            id="abs",
        ),
        pytest.param(lambda t: t * t, id="square"),
    ],
)
def test_an_eps_made_from_x_is_no_eps(sign):
    def fed_back(x, w):
        eps = sign((x * w).mean(-1, keepdim=True)) + 1e-5
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    near_miss(fed_back, torch.randn(6, 7), torch.rand(7))


def test_near_miss_view_mixes_dims():
    def cut(x):
        rms = torch.rsqrt(x.pow(2).mean(-1) + 1e-5)
        return x.view(2, 3, 7) * rms.view(2, 3, 1)

    assert near_miss(cut, torch.randn(6, 7)) == ["view-mixes-dims"]


def test_a_flattened_norm_is_one_in_groups():
    def flattened(x):
        rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x.view(-1) * rms.expand(6, 7).reshape(-1)

    x = torch.randn(6, 7)
    assert_within_contract(compiled(flattened)(x), flattened(x), flattened(x.double()))
    (site,) = normfx.report().sites
    assert (site.kind, site.dims) == ("RMSNorm", (-1,))


def test_near_miss_broadcast():
    def crossed(x):
        return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5)

    assert "broadcast-axis-differs" in near_miss(crossed, torch.randn(7, 7))


NOT_NORMS = {
    "half-centred": lambda x: (
        (x - 0.5 * x.mean(-1, True)) * ((x * x).mean(-1, True) + 1e-5).rsqrt()
    ),
    "mean-twice": lambda x: (x - 2 * x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "cubed-statistic": lambda x: x * ((x**3).mean(-1, True).abs() + 1e-5).rsqrt(),
    "cubed-numerator": lambda x: x**3 * ((x * x).mean(-1, True) + 1e-5).rsqrt(),
    "root-of-a-mean": lambda x: x * (x.mean(-1, True) + 1e-5).rsqrt(),
    "power-of-another-kind": lambda x: x * ((x * x).mean(-1, True) + 1e-5).rsqrt() ** (1 / 3),
    "two-eps": lambda x: x / (((x * x).mean(-1, True) + 1e-5).sqrt() + 1e-3),
}


@pytest.mark.parametrize("case", NOT_NORMS)
def test_near_miss_not_a_norm(case):
    assert near_miss(NOT_NORMS[case], torch.rand(6, 7)) == ["not-a-norm"]


@pytest.mark.parametrize("after", [torch.int32, torch.float32], ids=str)
def test_bits_read_as_another_dtype_are_no_affine_part(after):
    def reinterpreted(x):
        return F.layer_norm(x, (8,)).view(torch.int32).to(after)

    x = torch.randn(64, 8)
    assert torch.equal(compiled(reinterpreted)(x), reinterpreted(x))
    assert len(normfx.report().sites) == 1


def test_bits_of_a_statistic_read_as_another_dtype():
    def reinterpreted(x):
        mean_square = x.square().mean(-1, keepdim=True).view(torch.bfloat16)
        return x * torch.rsqrt(mean_square + 1e-6)

    x = torch.rand(8, 8, dtype=torch.float16) + 0.5
    assert torch.equal(compiled(reinterpreted)(x), reinterpreted(x))
    assert not normfx.report().sites


@pytest.mark.parametrize("bias", [1.0, -2, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_number_as_bias(bias, weighted):
    weight = torch.rand(8) + 0.5 if weighted else None

    def shifted(x):
        return F.layer_norm(x, (8,), None if weight is None else weight.to(x.dtype)) + bias

    x = torch.randn(64, 8)
    assert_within_contract(compiled(shifted)(x), shifted(x), shifted(x.double()))
    assert len(normfx.report().sites) == 1


def test_a_norm_without_affine_part_says_so():
    compiled(lambda x: F.layer_norm(x, (8,)))(torch.randn(64, 8))
    assert normfx.report().sites[0].refusals == ["writer-not-linear", "no-affine"]


def test_near_miss_masked():
    def masked(x, mask):
        mean = (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        variance = ((x - mean).pow(2) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5)

    mask = (torch.rand(6, 7) > 0.3).float()
    assert "statistic-of-another-tensor" in near_miss(masked, torch.randn(6, 7), mask)


def test_near_miss_of_what_is_written_to():
    """After the write x is another value, so the root scales what it is no statistic of."""

    def written(x):
        x = x * 1
        rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        x.add_(1)
        return x * rms

    assert near_miss(written, torch.randn(6, 7)) == ["not-a-norm"]


def test_near_miss_written_through_a_view():
    def written(x):
        x = x * 1
        rows = x.view(-1)
        rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        rows.add_(1)
        return x * rms

    assert near_miss(written, torch.randn(6, 7)) == ["mutation-between"]


def test_near_miss_grad_mode():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 7)

        def forward(self, x):
            x = self.linear(x)
            with torch.no_grad():
                rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return x * rms

    assert_agrees(Mixed(), torch.randn(6, 7), grad=True)
    assert [m.code.value for m in normfx.report().near_misses] == ["grad-mode-differs"]


def test_a_softmax_is_no_near_miss():
    assert near_miss(lambda x: torch.softmax(x, -1), torch.randn(6, 7)) == []


def test_a_mean_alone_is_no_near_miss():
    assert near_miss(lambda x: x - x.mean(-1, keepdim=True), torch.randn(6, 7)) == []


@pytest.mark.parametrize(
    ("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str
)
def test_an_eps_buffer_in_a_narrower_dtype(narrow, wide):
    eps = torch.tensor(1e-3, dtype=narrow)

    def unbiased(x, eps):
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + eps)

    x = 1e-3 * torch.randn(64, 6, dtype=wide)
    got, eager = compiled(unbiased)(x, eps), unbiased(x, eps)
    assert len(normfx.report().sites) == 1
    assert_within_contract(got, eager, unbiased(x.double(), eps.double()))


class Frozen(nn.Module):
    """A BatchNorm in eval mode, multiplied out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "variance"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.variance + 1e-5).rsqrt()
        return x * scale + (self.bias - self.mean * scale)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_given_statistics_of_what_is_not_real(dtype):
    """The canonical node computes in real numbers: an imaginary part would be lost."""
    model = Frozen(6)
    x = torch.arange(12).reshape(2, 6).to(dtype)
    if dtype.is_complex:
        x = x + 2j
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))
    assert not normfx.report().sites


EXPANDED = {
    "x": lambda x: x.expand(5, 8) * torch.rsqrt(x.square().mean(-1, True) + 1e-6),
    "norm": lambda x: (x * torch.rsqrt(x.square().mean(-1, True) + 1e-6)).expand(5, 8),
    "norm, then weight": lambda x: F.layer_norm(x, (8,)).expand(5, 8) * 2.0,
    "root": lambda x: x * torch.rsqrt(x.square().mean(-1, True) + 1e-6).expand(5, 8),
    "mean": lambda x: (x - x.mean(-1, True).expand(5, 8)) / x.std(-1, keepdim=True),
    "statistic": lambda x: x * torch.rsqrt(x.expand(5, 8).square().mean((0, 1)) + 1e-6),
    "sum": lambda x: x * torch.rsqrt(x.expand(5, 8).square().sum((0, 1)) / 40 + 1e-6),
    "wrong sum": lambda x: x * torch.rsqrt(x.expand(5, 8).square().sum((0, 1)) / 8 + 1e-6),
}


@pytest.mark.parametrize("case", EXPANDED)
def test_one_row_that_is_expanded(case):
    """An expanded dim has no axes, just as one of size one; the result keeps its shape."""
    function, x = EXPANDED[case], torch.randn(1, 8)
    got = compiled(function)(x)
    assert got.shape == function(x).shape
    assert_within_contract(got, function(x), function(x.double()))
