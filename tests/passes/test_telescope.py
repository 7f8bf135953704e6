"""Telescope: norms with given statistics out of a residual stream, or a reason why not."""

from __future__ import annotations

import copy
import itertools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from assertions import STRICT, assert_agrees, assert_within_contract, compiled
from expecttest import assert_expected_inline
from graph_text import graph_text, stages_of
from models import roughened
from torch import nn

import normfx
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal

RULE = "telescope"


class UnifiedNorm(nn.Module):
    """UN in eval mode: no mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return x / torch.sqrt(self.running_var + 1e-5) * self.weight + self.bias


class Post(nn.Module):
    """A post-norm block."""

    def __init__(self, width=8, norm=nn.BatchNorm1d, bias=True) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)
        self.norm = norm(width)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def stack(blocks: int, width: int = 8, head: bool = True, **settings) -> nn.Sequential:
    layers = [Post(width, **settings) for _ in range(blocks)]
    return roughened(nn.Sequential(*layers, *([nn.Linear(width, 4)] if head else []))).eval()


def calibrated(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """The model with the running statistics of what it is given."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(*inputs)
    return model.eval()


def telescopes(model, *inputs, left: int = 0, **options) -> None:
    """Holds a model to the contract and says how many norms are left."""
    torch._dynamo.reset()
    assert_agrees(model, *inputs, options=options)
    assert sum(RULE not in site.actions for site in normfx.report().sites) == left


def codes(model, *inputs, **settings) -> list[str]:
    """What the rule said of each norm."""
    torch._dynamo.reset()
    with torch.no_grad():
        _, journal = stages_of(model, *inputs, **settings)
    said = []
    for site in journal.sites:
        (record,) = [record for record in site.records if record.rule == RULE]
        said.append("changed" if record.changed else record.code.value)
    return said


# ---------------------------------------------------------------------------- what vanishes


def test_golden():
    with torch.no_grad():
        texts, journal = stages_of(stack(2), torch.randn(64, 8))
    assert_expected_inline(
        texts["recognise"],
        """\
v0 = linear(in2, in0, in1)
v1 = relu(v0)
v2 = linear(v1, in3, in4)
v3 = add(in2, v2)
v4 = norm(v3, in7, in8, None, in5, in6, None, BatchNorm over [], eps 1e-05)
v5 = linear(v4, in9, in10)
v6 = relu(v5)
v7 = linear(v6, in11, in12)
v8 = add(v4, v7)
v9 = norm(v8, in15, in16, None, in13, in14, None, BatchNorm over [], eps 1e-05)
v10 = linear(v9, in17, in18)
return [v10]
""",
    )
    assert_expected_inline(
        texts["hoist"],
        """\
v0 = linear(in2, in0, in1)
v1 = relu(v0)
v2 = linear(v1, in3, hoisted_0)
v3 = add(in2, v2)
v4 = linear(v3, hoisted_1, hoisted_2)
v5 = relu(v4)
v6 = linear(v5, hoisted_3, hoisted_4)
v7 = add(v3, v6)
v8 = linear(v7, hoisted_5, hoisted_6)
return [v8]
""",
    )
    assert [site.actions for site in journal.sites] == [[RULE]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", [1, 4, 12])
def test_a_stack(blocks, bias, dtype):
    torch.manual_seed(0)
    model, x = stack(blocks, 32, bias=bias), torch.randn(64, 32)
    telescopes(calibrated(model, x).to(dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [5.0, 50.0])
def test_means_that_are_large_beside_the_deviations(offset, dtype):
    """The stream is centred: its rounding errors are not those of the means."""
    torch.manual_seed(0)
    model, x = stack(4, 64), torch.randn(256, 64)
    with torch.no_grad():
        for block in list(model)[:-1]:
            block.down.bias.add_(offset * torch.randn(64))
    telescopes(calibrated(model, x).to(dtype), x.to(dtype))


def test_unified_norm():
    model = stack(3, norm=UnifiedNorm)
    telescopes(model, torch.randn(64, 8))
    telescopes(model, torch.randn(4, 16, 8))


def test_a_stream_that_is_returned_keeps_one_norm():
    telescopes(stack(4, head=False), torch.randn(64, 8), left=1)


def test_a_stream_that_is_returned_in_the_middle_keeps_a_norm_there():
    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = stack(2, head=False), stack(2)

        def forward(self, x):
            h = self.first(x)
            return h, self.second(h)

    telescopes(Middle().eval(), torch.randn(64, 8), left=1)


class GraphLayer(nn.Module):
    """Graph transformer (graphdeeplearning): BatchNorm after each residual, of nodes and of edges."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.e = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.out_h, self.out_e = nn.Linear(width, width), nn.Linear(width, width)
        self.up_h, self.down_h = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.up_e, self.down_e = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1_h, self.norm1_e = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.norm2_h, self.norm2_e = nn.BatchNorm1d(width), nn.BatchNorm1d(width)

    def forward(self, h, e):  # (nodes, channels), (nodes * nodes, channels)
        n, c = h.shape
        split = (n, self.heads, c // self.heads)
        q, k, v = (f(h).view(split) for f in (self.q, self.k, self.v))
        score = q[:, None] * k[None] / split[2] ** 0.5 * self.e(e).view(n, *split)
        weights = torch.softmax(score.sum(-1).clamp(-5, 5), 1)
        mixed = torch.einsum("ijh,jhd->ihd", weights, v).reshape(n, c)
        h = self.norm1_h(h + self.out_h(mixed))
        e = self.norm1_e(e + self.out_e(score.reshape(n * n, c)))
        h = self.norm2_h(h + self.down_h(torch.relu(self.up_h(h))))
        return h, self.norm2_e(e + self.down_e(torch.relu(self.up_e(e))))


class GraphTransformer(nn.Module):
    def __init__(self, width: int = 16, layers: int = 3, heads: bool = True) -> None:
        super().__init__()
        self.embed_h, self.embed_e = nn.Linear(5, width), nn.Linear(3, width)
        self.layers = nn.ModuleList(GraphLayer(width) for _ in range(layers))
        self.head_h, self.head_e = nn.Linear(width, 4), nn.Linear(width, 4)
        self.heads = heads

    def forward(self, h, e):
        h, e = self.embed_h(h), self.embed_e(e)
        for layer in self.layers:
            h, e = layer(h, e)
        return (self.head_h(h.mean(0)), self.head_e(e)) if self.heads else (h, e)


@pytest.mark.parametrize("weights", ["live", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [True, False])
def test_a_graph_transformer_has_no_norm(heads, dtype, weights):
    """One norm is left at the end of each stream that is returned."""
    torch.manual_seed(0)
    model, h, e = roughened(GraphTransformer(heads=heads)), torch.randn(8, 5), torch.randn(64, 3)
    model = calibrated(model, h, e).to(dtype)
    telescopes(model, h.to(dtype), e.to(dtype), left=0 if heads else 2, weights=weights)


class Gps(nn.Module):
    """A layer of GraphGPS: two branches, each with its residual and norm, added."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.local, self.attention = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_local, self.norm_attention = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        local = self.norm_local(x + torch.relu(self.local(x)))
        h = local + self.norm_attention(x + self.attention(torch.tanh(x)))
        return self.norm(h + self.down(torch.relu(self.up(h))))


def test_of_two_streams_that_are_added_one_keeps_its_norm():
    model = calibrated(roughened(nn.Sequential(Gps(), nn.Linear(8, 4))), torch.randn(64, 8))
    telescopes(model, torch.randn(64, 8), left=1)


class Uses(nn.Module):
    """A norm after a residual, and what is done with its result."""

    def __init__(self, use, norm=nn.BatchNorm1d, width=8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = norm(width)
        self.branch = nn.Linear(width, width)
        self.other = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)
        self.transposed = nn.Parameter(torch.randn(width, width))
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.use = use

    def forward(self, x):
        return self.use(self, self.norm(x + self.first(x)))


def of(use, **settings) -> Uses:
    return roughened(Uses(use, **settings)).eval()


VANISHES = {
    "two-branches": lambda m, y: m.head(y + m.branch(y) + m.other(y)),
    "a-sum-of-branches": lambda m, y: m.head(y + (m.branch(y) + m.other(y))),
    "from-the-left": lambda m, y: m.head(m.branch(y) + y),
    "product": lambda m, y: m.head(y + torch.relu(y @ m.transposed) @ m.transposed),
    "product-of-the-stream": lambda m, y: m.head(y + y @ m.transposed),
    "addmm": lambda m, y: m.head(y + torch.addmm(m.branch.bias, y, m.transposed)),
    "dropout": lambda m, y: m.head(y + F.dropout(m.branch(y), 0.5, m.training)),
    "views": lambda m, y: m.head((y.view(4, -1, 8) + m.branch(y).view(4, -1, 8)).mean(1)),
    "transposed": lambda m, y: m.head((y.t() + m.branch(torch.relu(m.head(y)).repeat(1, 2)).t()).t()),
    "itself": lambda m, y: m.head((y + m.branch(y)) + y[:]),
    "a-mask-after": lambda m, y: m.head((y + m.branch(y)) * torch.ones(len(y), 1)),
    "linear-only": lambda m, y: m.head(y),
    "sliced": lambda m, y: F.linear(y[:, 2:6], m.branch.weight[:, 2:6]) + m.other(y).relu(),
    "two-norms": lambda m, y: m.head(m.norm(y) + m.branch(y)),
    "same-branch-twice": lambda m, y: m.head(m.norm(y + m.branch(y)) + m.branch(torch.relu(m.other(y)))),
}  # fmt: skip


@pytest.mark.parametrize("use", VANISHES)
def test_vanishes(use):
    torch.manual_seed(0)
    model, x = of(VANISHES[use]), torch.randn(64, 8)
    telescopes(calibrated(model, x), x)


def test_dynamic_shapes():
    torch._dynamo.reset()
    model = stack(3)
    fast = assert_agrees(model, torch.randn(64, 8), dynamic=True)
    with torch.no_grad():
        for rows in (3, 17):
            x = torch.randn(rows, 8)
            assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert all(site.actions == [RULE] for site in normfx.report().sites)


class Channels(nn.Module):
    """BatchNorm1d of (batch, channels, tokens) in a stream of (batch, tokens, channels)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def test_channels_that_are_moved_for_the_norm():
    torch.manual_seed(0)
    model, x = nn.Sequential(Channels(), Channels(), nn.Linear(8, 4)), torch.randn(4, 16, 8)
    telescopes(calibrated(roughened(model), x), x)


class Convolutions(nn.Module):
    def __init__(self, padding: int, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Conv2d(width, width, 1 + 2 * padding, padding=padding, groups=2)
        self.down = nn.Conv2d(width, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def test_convolutions():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    model = nn.Sequential(Convolutions(0), Convolutions(0), nn.Conv2d(8, 4, 3))
    telescopes(calibrated(roughened(model), x), x)


def test_weights_that_blocks_share():
    """WideNet: one block, a norm of its own for each repetition."""

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Post(), nn.Linear(8, 4)
            self.block.norm = nn.Identity()
            self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(3))

        def forward(self, x):
            for norm in self.norms:
                x = norm(self.block(x))
            return self.head(x)

    torch.manual_seed(0)
    x = torch.randn(64, 8)
    telescopes(calibrated(roughened(Repeated()), x), x)


# ---------------------------------------------------------------------------- what stays


def reader_not_linear(m, y):
    return m.head(torch.relu(y) + m.branch(y))


REFUSED = {
    "extra-user": lambda m, y: (y + m.branch(y), y),
    "reader-not-linear": reader_not_linear,
    "writer-not-linear": lambda m, y: m.head(y + torch.relu(m.branch(y))),
    "zero-padding": lambda m, y: m.conv(y.t()[None]),
    "dim-not-last": lambda m, y: m.head(y[:8].t()),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refused(code):
    torch.manual_seed(0)
    model, x = of(REFUSED[code]), torch.randn(64, 8)
    assert codes(model, x) == [code]
    torch._dynamo.reset()
    assert_agrees(model, x)


NEAR_MISSES = {
    "twice-the-branch": lambda m, y: m.head(torch.add(y, m.branch(y), alpha=2)),
    "a-branch-that-is-broadcast": lambda m, y: m.head(y + m.branch(y[:1])),
    "a-stream-that-is-broadcast": lambda m, y: m.head(y[:1] + m.branch(y)),
    "a-branch-with-two-readers": lambda m, y: (lambda f: m.head(y + f) + m.head(f))(m.branch(y)),
    "squared": lambda m, y: m.head(y * y),
    "doubled": lambda m, y: m.head(y + y),
    "shifted-twice": lambda m, y: m.head(y + y[:]),
    "other-channels": lambda m, y: m.head(y[:8] + m.branch(y[:8]).t()),
    "flipped-channels": lambda m, y: m.head(y + m.branch(y).flip(1)),
    "times-itself": lambda m, y: m.head(y + m.branch(y)) * y.mean(1, keepdim=True),
    "a-branch-of-another-dtype": lambda m, y: m.head((y.double() + m.branch(y)).to(y.dtype)),
    "a-mask-before": lambda m, y: m.head(y * torch.ones(len(y), 1) + m.branch(y)),
    "added-twice": lambda m, y: (lambda f: m.head(y + (f + f)))(m.branch(y)),
    "a-constant": lambda m, y: m.head(y + m.branch.bias.expand(64, 8)),
    "a-number": lambda m, y: m.head(y + 1.0),
}  # fmt: skip


@pytest.mark.parametrize("use", NEAR_MISSES)
def test_near_misses(use):
    torch.manual_seed(0)
    model, x = of(NEAR_MISSES[use]), torch.randn(64, 8)
    assert "changed" not in codes(model, x)
    torch._dynamo.reset()
    assert_agrees(model, x)


def test_a_weight_that_is_an_activation():
    class Product(Uses):
        def forward(self, x, weight):
            return self.norm(x + self.first(x)) @ weight

    model, inputs = roughened(Product(None)).eval(), (torch.randn(64, 8), torch.randn(8, 4))
    assert codes(model, *inputs) == ["weight-not-constant"]
    torch._dynamo.reset()
    assert_agrees(model, *inputs)


def test_rules_are_switched_off():
    x = torch.randn(64, 8)
    assert codes(stack(1), x, rules=["hoist"]) == ["rule-off"]
    # conditions are checked where weights are made: without `hoist` nothing is divided
    assert codes(stack(2), x, rules=[RULE]) == ["rule-off", "changed"]


def test_needs_grad():
    _, journal = stages_of(stack(1), torch.randn(64, 8, requires_grad=True))
    assert "needs-grad" in journal.sites[0].refusals


def test_float16():
    model = stack(2).half()
    assert codes(model, torch.randn(64, 8).half()) == ["range-too-small"] * 2


def test_a_stream_that_is_written_to():
    def use(m, y):
        h = y + m.branch(y)
        z = h.view(-1)
        z[0] = 1.0
        return m.head(h)

    model, x = of(use), torch.randn(64, 8)
    assert codes(model, x) != ["changed"]
    torch._dynamo.reset()
    assert_agrees(model, x)


def test_an_input_that_is_written_to():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(8, affine=False), nn.Linear(8, 4)

        def forward(self, x):
            y = self.head(self.norm(x))
            x.add_(1)
            return y

    model, x = roughened(Writes()).eval(), torch.randn(64, 8)
    assert codes(model, x) == ["mutation-between"]
    torch._dynamo.reset()
    assert_agrees(model, x)


def test_values_that_are_not_at_hand():
    journals = []

    def backend(gm, inputs):
        journals.append(Journal())
        rewrite(gm, Options(), journals[-1])
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(stack(2), backend=backend)(torch.randn(64, 8))
    said = [[r.code for r in s.records if r.rule == RULE] for s in journals[0].sites]
    assert [code and code.value for (code,) in said] == ["scale-not-known", None]


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_divided_by(value):
    """The norm stays, and the next ones begin anew."""
    model, x = stack(4), torch.randn(64, 8)
    with torch.no_grad():
        model[1].norm.weight[3] = value
    assert codes(model, x) == ["changed", "ill-conditioned", "changed", "changed"]
    torch._dynamo.reset()
    assert_agrees(model, x)


def test_scales_whose_product_leaves_the_range():
    model, x = stack(6), torch.randn(64, 8)
    with torch.no_grad():
        for block in list(model)[:-1]:
            block.norm.weight.mul_(2.0**-10)
    assert codes(model, x).count("ill-conditioned") == 1
    torch._dynamo.reset()
    assert_agrees(model, x)


def test_a_mean_that_no_branch_can_take():
    """It must not be larger than the deviation: its shift would hide what the norm makes."""
    model, x = (
        roughened(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))).eval(),
        torch.randn(64, 8),
    )
    model[0].running_mean.fill_(0.5)
    model[0].running_var.fill_(1.0)
    assert codes(model, x) == ["changed"]
    model[0].running_mean.fill_(20.0)
    assert codes(model, x) == ["ill-conditioned"]
    torch._dynamo.reset()
    assert_agrees(model, x + 20, options={"rules": [RULE, "hoist"]})


# ---------------------------------------------------------------------------- weights that change


def agrees(model: nn.Module, fast, *inputs) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        assert_within_contract(fast(*inputs), model(*inputs), exact)


def test_follows_its_weights():
    torch._dynamo.reset()
    model, x = stack(3), torch.randn(64, 8)
    fast = compiled(model)
    agrees(model, fast, x)
    assert all(site.actions == [RULE] for site in normfx.report().sites)
    with torch.no_grad():
        model[0].norm.weight.mul_(1.5)
        model[1].norm.running_var.add_(0.3)
        model[1].down.bias.add_(1)
        model[2].norm.running_mean.sub_(0.2)
    agrees(model, fast, x)
    model.load_state_dict(stack(3).state_dict())
    agrees(model, fast, x)


@pytest.mark.parametrize("value", [0.0, 1e-20, float("inf")])
def test_weights_that_change_so_that_a_norm_cannot_go_any_more(value):
    torch._dynamo.reset()
    model, x = stack(3), torch.randn(64, 8)
    fast = compiled(model)
    agrees(model, fast, x)
    before = model[1].norm.weight.detach().clone()
    with torch.no_grad():
        model[1].norm.weight[2] = value
    with pytest.warns(UserWarning, match=r"torch\.compiler\.reset"):
        agrees(model, fast, x)
    with torch.no_grad():
        model[1].norm.weight.copy_(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(model, fast, x)


@pytest.mark.parametrize("weights", ["live", "frozen"])
def test_another_model_whose_norm_cannot_go(weights):
    """Dynamo runs the code of one model for the next: its weights are others."""
    torch._dynamo.reset()
    good, bad, x = stack(2), stack(2), torch.randn(64, 8)
    with torch.no_grad():
        bad[0].norm.weight.zero_()

    @torch.compile(backend="normfx", options={**STRICT, "weights": weights})
    def run(model, x):
        return model(x)

    with torch.no_grad():
        for model in (good, bad, good, bad):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                got = run(model, x)
            assert bool(told) == (model is bad)
            exact = copy.deepcopy(model).double()(x.double())
            assert_within_contract(got, model(x), exact)


def test_a_mean_that_moves_away():
    torch._dynamo.reset()
    model, x = (
        roughened(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))).eval(),
        torch.randn(64, 8),
    )
    model[0].running_mean.fill_(0.1)
    fast = compiled(model)
    agrees(model, fast, x)
    model[0].running_mean.fill_(100.0)
    with pytest.warns(UserWarning, match=r"torch\.compiler\.reset"):
        agrees(model, fast, x + 100)


def test_the_graph_is_not_changed_where_nothing_vanishes():
    torch._dynamo.reset()
    model, x = of(reader_not_linear), torch.randn(64, 8)
    seen = {}

    def backend(gm, inputs):
        rewrite(
            gm,
            Options.parse({"rules": [RULE]}),
            Journal(),
            inputs=inputs,
            observe=lambda stage, module: seen.setdefault(stage, graph_text(module.graph)),
        )
        return gm

    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    assert seen["fold"] == seen["recognise"]


# ---------------------------------------------------------------------------- drawn programs


class Drawn(nn.Module):
    """Blocks that read and add whatever was computed before."""

    def __init__(self, seed: int, width: int = 6) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.steps = [
            (draw.randrange(1, 4), draw.randrange(1, 4), draw.randrange(11))
            for _ in range(draw.randint(4, 12))
        ]
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=i % 3 != 0) for i in range(12))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, affine=i % 4 != 3) for i in range(8))
        self.weight = nn.Parameter(torch.randn(width, width))
        self.returns_two = draw.random() < 0.3

    def forward(self, x):
        values, linear, norm = [x], itertools.cycle(self.linears), itertools.cycle(self.norms)
        for i, j, kind in self.steps:
            a, b = values[-min(i, len(values))], values[-min(j, len(values))]
            if kind < 4:
                made = next(norm)(a + next(linear)(torch.relu(next(linear)(b))))
            elif kind == 4:
                made = a + next(linear)(b)
            elif kind == 5:
                made = a + b
            elif kind == 6:
                made = next(norm)(a) + next(norm)(b)
            elif kind == 7:
                made = a @ self.weight + b
            elif kind == 8:
                made = torch.tanh(a) + next(norm)(b + next(linear)(a))
            elif kind == 9:
                made = (a.t() + next(linear)(b).t()).t()
            else:
                made = next(norm)(a + (next(linear)(b) + next(linear)(a)))
            values.append(made)
        out = next(linear)(values[-1])
        return (out, values[-2]) if self.returns_two else out


@pytest.mark.parametrize("seed", range(16))
def test_drawn_programs(seed):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model, x = roughened(Drawn(seed)), torch.randn(40, 6)
    assert_agrees(calibrated(model, x), x)
