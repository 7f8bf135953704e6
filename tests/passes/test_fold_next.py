"""Fold: a norm whose statistics are given into the operators after it, or a reason why not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_agrees, assert_within_contract, compiled
from expecttest import assert_expected_inline
from graph_text import stages_of
from models import roughened
from torch import nn

import normfx
from normfx.passes.sign import is_nonnegative

RULE = "fold-statistics-into-next"
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def with_signs(model: nn.Module) -> nn.Module:
    """A model in eval mode whose BatchNorms scale by numbers of every sign, and by nothing."""
    roughened(model).eval()
    with torch.no_grad():
        for module in model.modules():
            if "BatchNorm" in type(module).__name__ and module.weight is not None:
                module.weight[::3].neg_()
                module.weight[1] = 0.0
    return model


class Read(nn.Module):
    """GELU, a norm of the second dim of that, and what reads the norm."""

    def __init__(self, read, reader: nn.Module, channels: int = 6, norm=None, enter=None) -> None:
        super().__init__()
        rank = reader.weight.dim() - 2
        self.norm = NORMS[rank or 1](channels) if norm is None else norm
        self.reader, self.read = reader, read
        self.enter = nn.GELU() if enter is None else enter

    def forward(self, x):
        return self.read(self.norm(self.enter(x)), self.reader)


def directly(y, reader):
    return reader(y)


def read(reader: nn.Module, read=directly, **kwargs) -> nn.Module:
    return with_signs(Read(read, reader, **kwargs))


def assert_vanishes(model, *inputs, **kwargs) -> None:
    """Holds a model whose norms all vanish to the contract."""
    assert_agrees(model, *inputs, **kwargs)
    sites = normfx.report().sites
    assert sites
    for site in sites:
        assert site.actions in ([RULE], ["telescope"]), site.refusals


IMAGE = (4, 6, 13, 14)

# -- graphs --------------------------------------------------------------------------------------


def test_golden():
    with torch.no_grad():
        texts, journal = stages_of(read(nn.Conv2d(6, 4, 3)), torch.randn(IMAGE))
    assert_expected_inline(
        texts["recognise"],
        """\
v0 = gelu(in0)
v1 = norm(v0, in3, in4, None, in1, in2, None, BatchNorm over [], eps 1e-05)
v2 = conv2d(v1, in5, in6)
return [v2]
""",
    )
    assert_expected_inline(
        texts["lower"],
        """\
v0 = gelu(in0)
v1 = conv2d(v0, hoisted_0, hoisted_1)
return [v1]
""",
    )
    (record,) = [r for r in journal.sites[0].records if r.rule == RULE]
    assert record.changed
    assert record.detail == "into conv2d"


def pooled(y, reader):
    maximum = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[y.dim() - 3]
    return reader(maximum(y, 2))


def test_golden_of_a_maximum_and_zeros_around():
    with torch.no_grad():
        texts, _ = stages_of(read(nn.Conv2d(6, 4, 3, padding=1), pooled), torch.randn(IMAGE))
    assert_expected_inline(
        texts["lower"],
        """\
v0 = gelu(in0)
v1 = reshape(hoisted_0, [6, 1, 1])
v2 = mul(v0, v1)
v3 = max_pool2d(v2, [2, 2])
v4 = reshape(hoisted_1, [6, 1, 1])
v5 = sub(v3, v4)
v6 = reshape(hoisted_2, [6, 1, 1])
v7 = add(v5, v6)
v8 = conv2d(v7, hoisted_3, in6, [1, 1], [1, 1])
return [v8]
""",
    )


def test_golden_of_a_scale_that_is_never_negative():
    with torch.no_grad():
        model = read(nn.Conv2d(6, 4, 3), pooled, norm=nn.BatchNorm2d(6, affine=False))
        texts, _ = stages_of(model, torch.randn(IMAGE))
    assert_expected_inline(
        texts["lower"],
        """\
v0 = gelu(in0)
v1 = max_pool2d(v0, [2, 2])
v2 = conv2d(v1, hoisted_0, hoisted_1)
return [v2]
""",
    )


# -- numerics ------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), (8, 6, 30)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 3), (2, 6, 7, 8, 9)),
    "one-by-one": (lambda: nn.Conv2d(6, 4, 1, bias=False), IMAGE),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), IMAGE),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False), IMAGE),
    "stride": (lambda: nn.Conv2d(6, 4, 3, stride=(2, 3)), IMAGE),
    "padding": (lambda: nn.Conv2d(6, 4, 3, padding=1), IMAGE),
    "padding-no-bias": (lambda: nn.Conv2d(6, 4, 3, padding=1, bias=False), IMAGE),
    "padding-1d": (lambda: nn.Conv1d(6, 4, 3, padding=2), (8, 6, 30)),
    "padding-3d": (lambda: nn.Conv3d(6, 4, 3, padding=(0, 1, 2)), (2, 6, 7, 8, 9)),
    "padding-by-dim": (lambda: nn.Conv2d(6, 4, (3, 5), padding=(0, 2)), IMAGE),
    "padding-wider-than-the-taps": (lambda: nn.Conv2d(6, 4, 3, padding=4), IMAGE),
    "padding-in-groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), IMAGE),
    "padding-depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), IMAGE),
    "padding-with-stride": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), IMAGE),
    "padding-same": (lambda: nn.Conv2d(6, 4, (3, 5), padding="same"), IMAGE),
    "padding-same-of-even-taps": (lambda: nn.Conv2d(6, 4, (4, 2), padding="same"), IMAGE),
    "padding-same-dilated": (
        lambda: nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(3, 2)),
        IMAGE,
    ),
    "padding-valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid"), IMAGE),
    "padding-circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), IMAGE),
    "padding-reflected": (lambda: nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"), IMAGE),
    "padding-replicated": (lambda: nn.Conv2d(6, 4, 3, padding=2, padding_mode="replicate"), IMAGE),
    "dilation": (lambda: nn.Conv2d(6, 4, 3, dilation=2, padding=1), IMAGE),
    "all-at-once": (
        lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=False),
        IMAGE,
    ),
}


# torch copies what it pads, to the right once more than to the left
EVEN_TAPS = pytest.mark.filterwarnings("ignore:Using padding='same'")


@EVEN_TAPS
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    make, shape = CONVOLUTIONS[case]
    assert_vanishes(read(make(), pooled), torch.randn(shape))


READS = {
    "pooled": pooled,
    "pooled-with-padding": lambda y, r: r(F.max_pool2d(y, 3, 2, 1)),
    "pooled-ceil": lambda y, r: r(F.max_pool2d(y, 2, ceil_mode=True)),
    "pooled-twice": lambda y, r: r(F.max_pool2d(F.avg_pool2d(y, 2), 2)),
    "adaptive": lambda y, r: r(F.adaptive_max_pool2d(y, 5)),
    "with-indices": lambda y, r: r(F.max_pool2d(y, 2, return_indices=True)[0]),
    "largest": lambda y, r: r(y.amax(2, keepdim=True).expand(-1, -1, 3, -1)),
    "smallest": lambda y, r: r(y.amin((2, 3), keepdim=True).expand(-1, -1, 3, 3)),
    "average": lambda y, r: r(F.avg_pool2d(y, 2)),
    "upsampled": lambda y, r: r(F.interpolate(y, scale_factor=2)),
    "padded-as-it-is-inside": lambda y, r: r(F.pad(y, (1, 2, 0, 1), mode="reflect")),
}
NOT_FEWER = ("upsampled", "padded-as-it-is-inside")


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("case", READS)
def test_on_the_way(case, padding):
    if padding and case in NOT_FEWER:
        pytest.skip("what pads reads as many numbers as the norm makes")
    assert_vanishes(read(nn.Conv2d(6, 4, 3, padding=padding), READS[case]), torch.randn(IMAGE))


def two_readers(y, r):
    return r(F.max_pool2d(y, 2)).mean() + r(y)


def test_signs_that_cost_as_much_as_the_norm_stay():
    """Of two readers one has no maximum before it: the product with the signs is written for it."""
    model = roughened(read(nn.Conv2d(6, 4, 3), two_readers)).eval()
    with torch.no_grad():
        model.norm.weight[1] = -1.0
    assert_agrees(model, torch.randn(IMAGE))
    (site,) = normfx.report().sites
    assert site.actions == []
    (record,) = (r for r in site.records if r.rule == "fold-statistics-into-next")
    assert record.code is normfx.record.Refusal.NOT_WORTH
    assert " a call; " in record.detail


HOMOGENEOUS = {
    "relu": F.relu,
    "leaky-relu": lambda y: F.leaky_relu(y, 0.1),
    "prelu": None,  # its slopes are parameters
    "abs": torch.abs,
    "relu-pooled": lambda y: F.max_pool2d(F.relu(y), 2),
}


def activated(case):
    act = HOMOGENEOUS[case] or (lambda y, r: F.prelu(y, r.weight[0, :, 0, 0]))
    return lambda y, r: r(act(y, r) if case == "prelu" else act(y))


class Scaled(nn.Module):
    """UN in eval mode, with no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = torch.rsqrt(self.running_var + 1e-5) * self.weight
        return x * scale.view(-1, 1, 1)


@pytest.mark.parametrize("case", HOMOGENEOUS)
def test_what_takes_a_factor_out_that_is_not_negative(case):
    model = read(nn.Conv2d(6, 4, 3, padding=1), activated(case), norm=Scaled(6))
    assert_vanishes(model, torch.randn(IMAGE))


@pytest.mark.parametrize("case", ["relu", "leaky-relu", "prelu", "abs"])
def test_none_of_it_takes_a_shift_out(case):
    assert_stays(read(nn.Conv2d(6, 4, 3), activated(case)), torch.randn(IMAGE))


def test_scales_next_to_zero():
    model = read(nn.Conv2d(6, 4, 3, padding=1), pooled)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1e-30, -1e-38, 1e-42, 0.0, -0.0, 2.0**-32]))
    assert_vanishes(model, torch.randn(IMAGE))


@pytest.mark.parametrize("read_by", [directly, pooled], ids=["directly", "pooled"])
@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("variance", [0.3, 2.0, 1e6])
def test_means_and_variances_of_every_size(mean, variance, read_by):
    """What the norm reads was rounded at the size of its mean, whatever comes after it."""
    enter = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())
    model = read(nn.Conv2d(6, 4, 3), read_by, enter=enter)
    with torch.no_grad():
        enter[0].bias.add_(mean)
        model.norm.running_mean.fill_(mean)
        model.norm.running_var.fill_(variance)
    assert_vanishes(model, torch.randn(IMAGE))


EXACT = {
    "input": lambda x: x,
    "moved": lambda x: F.max_pool2d(x.relu(), 2),
    "whole-numbers": lambda x: torch.round(torch.tanh(x) * 1000),
    "part-of-it": lambda x: torch.cat([x[:, :3], x[:, 3:].tanh()], 1),
}


@pytest.mark.parametrize("case", ["input", "moved"])
def test_a_mean_that_stays_beside_a_sign(case):
    """It is taken from what the maximum leaves, and nothing cancels."""
    model = read(nn.Conv2d(6, 4, 3, padding=1), pooled, enter=nn.Identity())
    model.enter.forward = EXACT[case]
    with torch.no_grad():
        model.norm.running_mean.fill_(2000.0)
    assert_vanishes(model, 2000.0 + torch.randn(IMAGE))


@pytest.mark.parametrize("case", EXACT)
def test_refuses_cancellation(case):
    """W (x - m) of years: the difference is exact, and W x - W m is not."""
    model = read(nn.Conv2d(6, 4, 3), enter=nn.Identity())
    model.enter.forward = EXACT[case]
    with torch.no_grad():
        model.norm.running_mean.fill_(2000.0)
    assert_stays(model, 2000.0 + torch.randn(IMAGE), code="cancellation")


def dyadic(model: nn.Module) -> nn.Module:
    """Small multiples of 1/4 as weights, scales that are powers of two: nothing rounds."""
    with torch.no_grad():
        for name, held in model.state_dict().items():
            if held.dtype.is_floating_point:
                held.copy_(torch.randint(-8, 9, held.shape) / 4)
            if name.endswith("running_var"):
                held.copy_(4.0 ** torch.randint(-1, 3, held.shape) - 0.125)
            if name == "norm.weight":  # of every sign
                signs = 2.0 * torch.randint(0, 2, held.shape) - 1.0
                held.copy_(signs * 2.0 ** torch.randint(-2, 2, held.shape))
    model.norm.eps = 0.125
    return model


@EVEN_TAPS
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_bits_in_float64_where_nothing_rounds(case):
    """At the borders, too: each tap that meets a border adds what it would have to nothing at all."""
    make, shape = CONVOLUTIONS[case]
    enter = nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.ReLU())
    model = dyadic(read(make(), pooled, enter=enter)).double()
    x = torch.randint(-8, 9, shape).double()
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))
    assert normfx.report().sites[0].actions == [RULE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_dtypes(dtype, padding):
    model = read(nn.Conv2d(16, 32, 3, padding=padding), pooled, channels=16).to(dtype)
    assert_vanishes(model, torch.randn(4, 16, 16, 16).to(dtype))


@EVEN_TAPS
@pytest.mark.parametrize("case", ["padding", "padding-in-groups", "padding-same-of-even-taps"])
def test_dynamic_sizes(case):
    model = read(CONVOLUTIONS[case][0](), pooled)
    fast, exact = compiled(model), copy.deepcopy(model).double()
    with torch.no_grad():
        for shape in [(4, 6, 12, 12), (7, 6, 9, 15), (2, 6, 31, 8)]:
            x = torch.randn(shape)
            for dim in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, dim)
            assert_within_contract(fast(x), model(x), exact(x.double()))
    (graph,) = normfx.report().graphs
    assert [site.actions for site in graph.sites] == [[RULE]]


@pytest.mark.parametrize("weights", [False, True], ids=["input-alone", "weights-too"])
def test_channels_last(weights):
    x = torch.randn(IMAGE).to(memory_format=torch.channels_last)
    model = read(nn.Conv2d(6, 4, 3, padding=1), pooled)
    if weights:
        model = model.to(memory_format=torch.channels_last)
    assert_vanishes(model, x)
    with torch.no_grad():
        assert compiled(model)(x).stride() == model(x).stride()


class Kept(nn.Module):
    """Rows, and a residual that keeps the norm from going into what is before it."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 8)
        self.rank = rank

    def forward(self, x):
        x = self.enter(x)
        y = self.norm(x) if self.rank == 2 else self.norm(x.mT).mT
        return x + self.out(y)


@pytest.mark.parametrize("shape", [(64, 6), (4, 16, 6)])
def test_linear_layers(shape):
    assert_vanishes(with_signs(Kept(len(shape))), torch.randn(shape))


def test_a_weight_with_two_readers_stays_for_the_other():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)

        def forward(self, x):
            return self.conv(self.norm(torch.sigmoid(x))) + self.conv(torch.tanh(x))

    assert_vanishes(with_signs(Shared()), torch.randn(IMAGE))


def test_two_norms_beside_each_other():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
            self.conv = nn.Conv2d(15, 4, 3, padding=1)

        def forward(self, x):
            parts = [self.a(x.sigmoid()), x[:, :3], self.b(x.tanh())]
            return self.conv(F.max_pool2d(torch.cat(parts, 1), 2))

    assert_agrees(with_signs(Two()), torch.randn(IMAGE))
    first, second = normfx.report().sites
    assert first.actions == [RULE]
    # the first has put its shift before the convolution, which is then no reader of the second
    assert second.actions in ([RULE], [])


# -- weights that change -------------------------------------------------------------------------


def test_signs_that_change():
    model, x = read(nn.Conv2d(6, 4, 3, padding=1), pooled), torch.randn(IMAGE)
    fast = compiled(model)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: model.norm.weight.neg_(),
            lambda: model.norm.weight.zero_(),
            lambda: model.norm.weight.normal_(),
            lambda: model.norm.running_mean.normal_(),
            lambda: model.norm.running_var.mul_(3),
            lambda: model.reader.weight.mul_(-1),
        ):
            change()
            exact = copy.deepcopy(model).double()
            assert_within_contract(fast(x), model(x), exact(x.double()))
    assert len(normfx.report().graphs) == 1


# -- refusals ------------------------------------------------------------------------------------


def assert_stays(model, *inputs, rules=None, code="reader-not-linear") -> None:
    with torch.set_grad_enabled(code == "needs-grad"):
        texts, journal = stages_of(model, *inputs, rules=rules)
        (site,) = journal.sites
        assert site.actions == []
        (record,) = [r for r in site.records if r.rule == RULE]
        assert record.code.value == code
        assert record.node
        assert texts["fold"] == texts["recognise"]
    torch._dynamo.reset()
    if code not in ("needs-grad", "weight-not-tracked"):
        assert_agrees(model, *inputs)


REFUSED = {
    "reader-not-linear": lambda y, r: r(y.sigmoid()),
    "extra-user": lambda y, r: (r(y), y),
    "dim-not-last": lambda y, r: r(y.transpose(1, 2)[:, :6]),
    "weight-not-constant": lambda y, r: F.conv2d(y, y[:4, :, :3, :3].detach() * 0 + r.weight),
}


@pytest.mark.parametrize("code", [c for c in REFUSED if c != "weight-not-constant"])
def test_refuses(code):
    assert_stays(read(nn.Conv2d(6, 4, 3), REFUSED[code]), torch.randn(IMAGE), code=code)


def test_refuses_a_cast_on_the_way():
    """The norm has no mean to speak of when it is rounded; what it reads has."""
    model = read(nn.Conv2d(6, 4, 3).bfloat16(), lambda y, r: r(F.max_pool2d(y.bfloat16(), 2)))
    with torch.no_grad():
        _, journal = stages_of(model, torch.randn(IMAGE))
    assert journal.sites[0].refusals[-1] == "cancellation"


def test_refuses_weight_not_constant():
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x, weight):
            return F.conv2d(self.norm(x.tanh()), weight)

    model = with_signs(Hyper())
    assert_stays(model, torch.randn(IMAGE), torch.randn(4, 6, 3, 3), code="weight-not-constant")


def test_refuses_rule_off():
    assert_stays(read(nn.Conv2d(6, 4, 3)), torch.randn(IMAGE), rules=[], code="rule-off")


def test_refuses_needs_grad():
    assert_stays(read(nn.Conv2d(6, 4, 3)), torch.randn(IMAGE), code="needs-grad")


@pytest.mark.parametrize("case", ["padded", "padded-by-hand", "padded-mean", "transposed"])
def test_zeros_that_a_shift_would_be_missing_from(case):
    reads = {
        "padded": (directly, "zero-padding"),  # nothing would be gained
        "padded-by-hand": (lambda y, r: r(F.pad(y, (1, 1, 1, 1))), "reader-not-linear"),
        "padded-mean": (lambda y, r: r(F.avg_pool2d(y, 3, padding=1)), "reader-not-linear"),
        "transposed": (directly, "zero-padding"),
    }
    through, code = reads[case]
    make = nn.ConvTranspose2d if case == "transposed" else nn.Conv2d
    reader = make(6, 4, 3, padding=int(case in ("padded", "transposed")))
    assert_stays(read(reader, through), torch.randn(IMAGE), code=code)


def test_a_transposed_convolution_of_a_maximum():
    reader = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2)
    assert_vanishes(read(reader, pooled), torch.randn(IMAGE))


@pytest.mark.parametrize("padding", [0, 1])
def test_refuses_float16(padding):
    model = read(nn.Conv2d(6, 4, 3, padding=padding)).half()
    code = "zero-padding" if padding else "range-too-small"
    with torch.no_grad():
        _, journal = stages_of(model, torch.randn(IMAGE).half())
    (record,) = [r for r in journal.sites[0].records if r.rule == RULE]
    assert record.code.value == code


def test_refuses_mutation():
    """X is read later than the norm was, and is another then."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)

        def forward(self, x):
            y = self.norm(x)
            x.mul_(2)
            return self.conv(y)

    assert_stays(with_signs(Writes()), torch.randn(IMAGE), code="mutation-between")


def test_a_dynamic_norm_keeps_its_weight_before_a_maximum():
    """A sign would stay in place of the weight: nothing is gained."""
    model = roughened(nn.Sequential(nn.GroupNorm(2, 6), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)))
    with torch.no_grad():
        model[0].weight[1] = -1.0
        _, journal = stages_of(model, torch.randn(IMAGE))
    assert journal.sites[0].refusals[-1:] == ["sign-not-known"]


class Positive(nn.Module):
    """A norm with a weight that is never negative."""

    def __init__(self, make, bias: bool = False) -> None:
        super().__init__()
        self.log_weight, self.out = nn.Parameter(torch.randn(64)), nn.Linear(64, 32)
        self.bias = nn.Parameter(torch.randn(64)) if bias else None
        self.make = make

    def forward(self, x):
        y = F.layer_norm(x, (64,), self.make(self.log_weight), self.bias)
        return self.out(F.relu(y))


@pytest.mark.parametrize(
    "make", [torch.exp, torch.square, F.softplus, lambda w: 1 + w.abs()], ids=range(4)
)
def test_a_dynamic_norm_whose_weight_is_never_negative(make):
    assert_agrees(Positive(make), torch.randn(16, 64))
    assert normfx.report().sites[0].actions == ["fold-affine-into-linear"]


@pytest.mark.parametrize("make", [torch.sin, lambda w: w.abs() - 1, lambda w: w], ids=range(3))
def test_a_dynamic_norm_whose_weight_may_be_negative(make):
    assert_agrees(Positive(make), torch.randn(16, 64))
    assert normfx.report().sites[0].refusals[-1:] == ["sign-not-known"]


def test_a_dynamic_norm_with_a_bias_before_relu():
    assert_agrees(Positive(torch.exp, bias=True), torch.randn(16, 64))
    assert normfx.report().sites[0].refusals[-1:] == ["reader-not-linear"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda w: w.exp() * w.abs(), True),
        (lambda w: w.square() + 1, True),
        (lambda w: w**2 / w.sigmoid(), True),
        (lambda w: torch.add(w.abs(), w.abs(), alpha=-1), False),
        (lambda w: w.abs() * -1.0, False),
        (lambda w: w**3, False),
        (lambda w: w * w.exp(), False),
        (lambda w: torch.rsqrt(w.abs() + 1).view(2, -1).t(), True),
        (lambda w: torch.ones(4) * 0.5, True),
    ],
)
def test_signs(make, expected):
    """By the operators that make a value, not by the values they were given."""
    from normfx.capture import capture

    seen = []

    def backend(gm, inputs):
        (output,) = capture(gm).graph.find_nodes(op="output")
        seen.append(is_nonnegative(output.args[0][0]))
        return gm

    with torch.no_grad():
        torch.compile(lambda w: make(w) + 0 * 1, backend=backend)(torch.rand(4))
    assert seen == [expected]


# -- convolutional nets --------------------------------------------------------------------------


def conv_norm_relu(ins, outs, size, stride=1, groups=1):
    conv = nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outs), nn.ReLU()]


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, ins: int, width: int, stride: int) -> None:
        super().__init__()
        first, second = conv_norm_relu(ins, width, 1), conv_norm_relu(width, width, 3, stride)
        self.body = nn.Sequential(*first, *second, *conv_norm_relu(width, 2 * width, 1)[:2])
        self.shortcut = nn.Sequential(*conv_norm_relu(ins, 2 * width, 1, stride)[:2])

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """The block of MobileNet-V2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        first = conv_norm_relu(width, wide, 1)
        second = conv_norm_relu(wide, wide, 3, groups=wide)
        self.body = nn.Sequential(*first, *second, *conv_norm_relu(wide, width, 1)[:2])

    def forward(self, x):
        return x + self.body(x)


class Dense(nn.Module):
    """The block of DenseNet: a norm and ReLU before each convolution, of everything so far."""

    def __init__(self, ins: int, growth: int) -> None:
        super().__init__()
        one, two = nn.Conv2d(ins, 8, 1, bias=False), nn.Conv2d(8, growth, 3, padding=1, bias=False)
        first, second = nn.BatchNorm2d(ins), nn.BatchNorm2d(8)
        self.body = nn.Sequential(first, nn.ReLU(), one, second, nn.ReLU(), two)

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


class UNet(nn.Module):
    """One level down and up again, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(*conv_norm_relu(3, 8, 3))
        self.down = nn.Sequential(*conv_norm_relu(8, 16, 3))
        self.widen = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(*conv_norm_relu(16, 8, 3))

    def forward(self, x):
        x = self.enter(x)
        return self.up(torch.cat([x, self.widen(self.down(F.max_pool2d(x, 2)))], 1))


def stack(padding: int) -> nn.Module:
    """Convolution, ReLU, norm, maximum, and again: no norm is next to the convolution before it."""
    widths, layers = (3, 8, 16), []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=padding), nn.ReLU(), nn.BatchNorm2d(b)]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Conv2d(16, 4, 3, padding=padding))


NETS = {
    "resnet": (
        lambda: nn.Sequential(
            *conv_norm_relu(3, 8, 7, 2),
            nn.MaxPool2d(3, 2, 1),
            Bottleneck(8, 4, 1),
            Bottleneck(8, 8, 2),
        ),
        0,
    ),
    "mobilenet": (lambda: nn.Sequential(*conv_norm_relu(3, 8, 3, 2), Inverted(8), Inverted(8)), 0),
    "u-net": (UNet, 0),
    "stack": (lambda: stack(0), 0),
    "stack-padded": (lambda: stack(1), 0),
    # of each block the norm of the concatenation, and the last one: ReLU reads them, with a shift
    "densenet": (
        lambda: nn.Sequential(
            *conv_norm_relu(3, 8, 3), Dense(8, 4), Dense(12, 4), nn.BatchNorm2d(16), nn.ReLU()
        ),
        3,
    ),
}


@pytest.mark.parametrize("net", NETS)
def test_norms_left_of_convolutional_nets(net):
    make, left = NETS[net]
    model, x = with_signs(make()), torch.randn(2, 3, 32, 32)
    assert_agrees(model, x)
    assert sum(not site.actions for site in normfx.report().sites) == left
    for site in normfx.report().sites:
        assert site.actions or site.refusals[-1] == "reader-not-linear"


# -- scales that are positive now ----------------------------------------------------------------


def positive(padding: int) -> nn.Module:
    """A stack in eval mode, whose norm scales by positive numbers."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=padding),
    )
    roughened(model).eval()
    with torch.no_grad():
        model[2].weight.abs_().add_(0.1)
    return model


@pytest.mark.parametrize("padding", [0, 1])
def test_positive_scales_leave_no_sign_before_the_maximum(padding):
    model, x = positive(padding), torch.randn(4, 3, 13, 14)
    assert_agrees(model, x)
    assert normfx.report().sites[0].actions == [RULE]
    with torch.no_grad():
        texts, _ = stages_of(model, x)
    operators = [line.split(" = ")[1].split("(")[0] for line in texts["lower"].splitlines()[:-1]]
    kept = [name for name in operators if name not in ("reshape", "to")]
    behind = ["sub", "add"] if padding else ["sub"]
    assert kept == ["conv2d", "relu", "max_pool2d", *behind, "conv2d"]


@pytest.mark.filterwarnings("ignore:A graph was rewritten for weights")
@pytest.mark.parametrize("change", ["neg_", "zero_"])
def test_a_scale_that_is_no_longer_positive(change):
    model, x = positive(1), torch.randn(4, 3, 13, 14)
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            exact = copy.deepcopy(model).double()(x.double())
            assert_within_contract(fast(x), model(x), exact)
            getattr(model[2].weight[:2], change)()
