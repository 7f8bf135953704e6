"""Defer scale: the root of a norm past the linear operators that read it, or why it stays."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_agrees, assert_within_contract
from expecttest import assert_expected_inline
from graph_text import stages_of
from models import roughened
from torch import nn
from torch._inductor.utils import run_and_get_code

import normfx

RULE = "defer-scale"
WIDTH = 64


class Reads(nn.Module):
    """A norm, and what is done with its result: `read` gets the module, the result and x."""

    def __init__(self, read, bias=False, norm=nn.RMSNorm) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.up, self.gate = (nn.Linear(WIDTH, 96, bias=bias) for _ in range(2))
        self.down, self.small = nn.Linear(96, WIDTH, bias=bias), nn.Linear(WIDTH, 4, bias=bias)
        self.matrix = nn.Parameter(torch.randn(WIDTH, 8))
        self.vector = nn.Parameter(torch.randn(8))
        self.read = read

    def forward(self, x, *others):
        return self.read(self, self.norm(x), x, *others)


DEFERS = {
    "few-outputs": lambda m, y, x: m.small(y),
    "matmul": lambda m, y, x: y @ m.matrix,
    "mm": lambda m, y, x: F.rms_norm(x.flatten(0, 1), (WIDTH,), eps=0.5).mm(m.matrix) + y.sum(),
    "addmm": lambda m, y, x: (
        torch.addmm(m.vector, F.rms_norm(x.flatten(0, 1), (WIDTH,), eps=0.5), m.matrix) + y.sum()
    ),
    "one-row": lambda m, y, x: m.small(F.rms_norm(x[0, 0], (WIDTH,), eps=0.5)) + y.sum(),
    "activation": lambda m, y, x: F.gelu(m.up(y)),
    "gated": lambda m, y, x: x + m.down(F.silu(m.gate(y)) * m.up(y)),
    "several": lambda m, y, x: (m.small(y), F.relu(m.up(y)), 0.5 * (y @ m.matrix)),
    "in-halves": lambda m, y, x: (lambda a, b: a * b.sigmoid())(*m.up(y).chunk(2, -1)),
    "heads": lambda m, y, x: m.up(y).unflatten(-1, (4, 24)).transpose(1, 2) * 2.0,
    "another-norm": lambda m, y, x: F.rms_norm(m.up(y).unflatten(-1, (4, 24)), (24,)),
    "in-place": lambda m, y, x: m.up(y).relu_(),
    "l2-norm": lambda m, y, x: m.small(F.normalize(x, dim=-1)),
    "outside": lambda m, y, x: m.small(3 * x / (x.norm(dim=-1, keepdim=True) + 1e-3)),
    "tensor-eps": lambda m, y, x: m.small(
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.vector.square().sum())
    ),
    "softmax": lambda m, y, x: m.up(y).softmax(-1),
    "added-to-rows": lambda m, y, x: torch.ones_like(m.up(y)) + m.up(y),
    "shared-weight": lambda m, y, x: m.small(y) + m.small(x),
    "shared-statistic": lambda m, y, x: (lambda s: (m.small(x * torch.rsqrt(s + 0.5)), s.mean()))(
        x.pow(2).mean(-1, keepdim=True)
    ),
}


def deferred() -> bool:
    return any(RULE in site.actions for site in normfx.report().sites)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("case", DEFERS)
def test_defers(case, bias):
    x = torch.randn(16, 6, WIDTH)
    x[0, 0], x[1] = 0, 1e4 * x[1]
    assert_agrees(roughened(Reads(DEFERS[case], bias)), x)
    assert deferred(), [site.refusals for site in normfx.report().sites]


def test_golden():
    with torch.no_grad():
        texts, journal = stages_of(
            roughened(Reads(DEFERS["few-outputs"], bias=True)), torch.randn(16, WIDTH)
        )
    assert_expected_inline(
        texts["lower"],
        """\
v0 = to(in1, float32)
v1 = mul(v0, v0)
v2 = mean(v1, [1], True)
v3 = add(v2, 1.1920928955078125e-07)
v4 = rsqrt(v3)
v5 = linear(in1, hoisted_0)
v6 = mul(v5, v4)
v7 = add(v6, in3)
v8 = to(v7, float32)
return [v8]
""",
    )
    assert journal.sites[0].actions == ["fold-affine-into-linear", RULE]
    assert journal.sites[0].records[-1].detail == "past linear"


@pytest.mark.parametrize("case", ["few-outputs", "gated", "several", "in-halves", "l2-norm"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4, 1e18])
def test_bfloat16(case, size):
    x = (size * torch.randn(64, 6, WIDTH)).bfloat16()
    assert_agrees(roughened(Reads(DEFERS[case])).bfloat16(), x)
    assert deferred()


@pytest.mark.parametrize("mean", [10.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_a_large_mean_and_with_outliers(mean, dtype):
    x = mean + torch.randn(64, 6, WIDTH)
    x[0, :, 3] = 1e6
    assert_agrees(roughened(Reads(DEFERS["gated"])).to(dtype), x.to(dtype))
    assert deferred()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e25])
def test_special_rows(special):
    x = torch.randn(64, WIDTH)
    x[3, 2] = special
    assert_agrees(Reads(DEFERS["several"], bias=True), x)
    assert deferred()


def test_symbolic_sizes():
    assert_agrees(roughened(Reads(DEFERS["gated"])), torch.randn(6, 5, WIDTH), dynamic=True)
    assert deferred()


def written_later(m, y, x):
    out = m.small(y)
    x.add_(1.0)
    return out


STAY = {
    "centred": (lambda m, y, x: m.small(F.layer_norm(x, (WIDTH,)) + y.sum()), None),
    "many-outputs": (lambda m, y, x: m.up(y), "not-worth-it"),
    "residual": (
        lambda m, y, x: (lambda u: u + m.down(m.up(u)))(F.rms_norm(x, (WIDTH,), eps=0.5)),
        "reader-not-linear",
    ),
    "added-to-a-matrix": (
        lambda m, y, x: (
            m.up.weight
            + F.rms_norm(x.flatten(0, 1), (WIDTH,), eps=0.5) @ m.small.weight.new_ones(WIDTH, WIDTH)
        ),
        "not-worth-it",
    ),
    "two-heads": (lambda m, y, x: (m.small(y), y @ m.matrix), "not-worth-it"),
    "fused-input": (
        lambda m, y, x: m.small(F.rms_norm(x.tanh(), (WIDTH,), eps=0.5)) + y.sum(),
        "not-worth-it",
    ),
    "cast-before": (
        lambda m, y, x: F.linear(
            F.rms_norm(x, (WIDTH,), eps=0.5).bfloat16(), m.small.weight.bfloat16()
        ),
        "not-worth-it",
    ),
    "another-layout": (
        lambda m, y, x: m.small(F.rms_norm(x.transpose(0, 1), (WIDTH,), eps=0.5)).view(96, 4),
        "not-worth-it",
    ),
    "returned": (
        lambda m, y, x: (lambda u: (m.small(u), u))(F.rms_norm(x, (WIDTH,), eps=0.5)),
        "extra-user",
    ),
    "activation-weight": (
        lambda m, y, x: F.rms_norm(x, (WIDTH,), eps=0.5) @ x[0].mT,
        "weight-not-constant",
    ),
    "other-dim": (
        lambda m, y, x: F.linear(m.norm.weight, y.flatten(0, 1)),
        None,
    ),
    "view-between": (lambda m, y, x: m.small(y.flatten(0, 1)), None),
    "batched-weight": (
        lambda m, y, x: F.rms_norm(x, (WIDTH,), eps=0.5) @ m.matrix.expand(16, -1, -1),
        "reader-not-linear",
    ),
    "written-input": (written_later, "mutation-between"),
}


def records(journal_or_report):
    return [r for site in journal_or_report.sites for r in site.records if r.rule == RULE]


@pytest.mark.parametrize("case", STAY)
def test_stays(case):
    read, code = STAY[case]
    x = torch.randn(16, 6, WIDTH)
    with torch.no_grad():
        texts, journal = stages_of(Reads(read), x.clone())
    assert "row_scale" not in texts["fold"]
    given = [(r.changed, r.code.value) for r in records(journal)]
    assert given == ([] if code is None else [(False, code)])


def test_a_bias_in_bfloat16_stays():
    """The product is rounded before the bias is added: where they cancel, that shows."""
    model = Reads(DEFERS["few-outputs"], bias=True).bfloat16()
    assert_agrees(model, torch.randn(16, WIDTH).bfloat16())
    assert normfx.report().sites[0].refusals[-1] == "cancellation"


def test_float16_stays():
    model = Reads(lambda m, y, x: m.small(F.rms_norm(x, (WIDTH,)))).half()
    assert_agrees(model, (3e4 * torch.rand(16, WIDTH)).half())
    assert normfx.report().sites[-1].refusals[-1] == "range-too-small"


def test_gradients_keep_it():
    model = Reads(lambda m, y, x: m.small(F.rms_norm(x, (WIDTH,))))
    assert_agrees(model, torch.randn(16, WIDTH), grad=True)
    assert normfx.report().sites[-1].refusals[-1] == "needs-grad"


def test_rule_off():
    with torch.no_grad():
        _, journal = stages_of(
            Reads(DEFERS["few-outputs"]),
            torch.randn(4, WIDTH),
            rules=["fold-affine-into-linear"],
        )
    assert journal.sites[0].refusals == ["rule-off"]


def test_the_weight_must_have_gone():
    """A weight along the rows does not pass the product; nor is such a norm looked at."""
    with torch.no_grad():
        texts, journal = stages_of(
            Reads(DEFERS["few-outputs"]), torch.randn(4, WIDTH), rules=[RULE]
        )
    assert "row_scale" not in texts["fold"]
    assert records(journal) == []


def test_weights_are_followed():
    model = roughened(Reads(DEFERS["gated"]))
    x = torch.randn(6, WIDTH)
    fast = assert_agrees(model, x)
    with torch.no_grad():
        assert deferred()
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert_agrees(model, x)
    assert fast is not None


def test_two_norms_with_one_reader_each():
    def read(m, y, x):
        return F.relu(m.up(y)) + F.relu(m.gate(F.rms_norm(x, (WIDTH,), eps=0.5)))

    with torch.no_grad():
        texts, _ = stages_of(Reads(read), torch.randn(16, WIDTH))
    assert texts["fold"].count("row_scale(") == 2
    torch._dynamo.reset()
    assert_agrees(roughened(Reads(read)), torch.randn(16, WIDTH))


def test_one_operator_of_both_operands_stays():
    def read(m, y, x):
        y = F.rms_norm(x, (WIDTH,), eps=0.5)
        return y @ y.mT

    assert_agrees(Reads(read), torch.randn(6, WIDTH))
    assert not deferred()


def test_the_layer_norm_form_cancels():
    """Why a norm that subtracts a mean is left alone: (x W^T - mean W 1) r on rows with a large mean."""
    x, weight = 1e3 + torch.randn(64, 768), torch.randn(32, 768)

    def late(x, weight):
        r = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
        return (x @ weight.T - x.mean(-1, keepdim=True) * weight.sum(1)) * r

    def early(x, weight):
        return F.layer_norm(x, (768,)) @ weight.T

    exact = early(x.double(), weight.double())
    with pytest.raises(AssertionError, match="error"):
        assert_within_contract(late(x, weight), early(x, weight), exact)


@pytest.mark.inductor
@pytest.mark.parametrize("case", ["gated", "few-outputs", "several", "softmax", "added-to-rows"])
def test_inductor_generates_no_more_kernels(case):
    def kernels(rules):
        torch._dynamo.reset()
        model = torch.compile(
            roughened(Reads(DEFERS[case])),
            backend="normfx",
            options={"strict": True, "rules": rules},
        )
        with torch.no_grad():
            _, (code,) = run_and_get_code(model, torch.randn(16, WIDTH))
        return len(re.findall(r"^ +cpp_fused\w*\(", code, re.MULTILINE))

    both = ["fold-affine-into-linear", "hoist"]
    assert 0 < kernels([*both, RULE]) <= kernels(both)
    assert deferred()
