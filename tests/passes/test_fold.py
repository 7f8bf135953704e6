"""Fold: a norm's weight and bias into the linear operators that read it, or a reason why not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_agrees, compiled
from expecttest import assert_expected_inline
from graph_text import stages_of
from models import head, roughened
from torch import nn

import normfx
from normfx.options import Options
from normfx.passes.fold import fold
from normfx.record import Journal

RULE = "fold-affine-into-linear"


def test_golden():
    with torch.no_grad():
        texts, journal = stages_of(head(), torch.randn(64, 8))
    assert_expected_inline(
        texts["recognise"],
        """\
v0 = norm(in2, in0, in1, None, None, None, None, LayerNorm over [1], eps 1e-05)
v1 = linear(v0, in3, in4)
return [v1]
""",
    )
    assert_expected_inline(
        texts["fold"],
        """\
v0 = norm(in2, None, None, None, None, None, None, LayerNorm over [1], eps 1e-05)
v1 = to(in3, float64)
v2 = to(in0, float64)
v3 = reshape(v2, [-1])
v4 = mul(v1, v3)
v5 = to(v4, float32)
v6 = to(in1, float64)
v7 = reshape(v6, [-1])
v8 = expand(v7, [8])
v9 = mv(v1, v8)
v10 = to(in4, float64)
v11 = add(v9, v10)
v12 = to(v11, float32)
v13 = linear(v0, v5, v12)
return [v13]
""",
    )
    assert_expected_inline(
        texts["lower"],
        """\
v0 = layer_norm(in2, [8], None, None, 1e-05)
v1 = linear(v0, hoisted_0, hoisted_1)
return [v1]
""",
    )
    assert journal.sites[0].actions == [RULE]


class Reads(nn.Module):
    """A norm, and what is done with its result; `self.weight` is (out, in)."""

    def __init__(self, read, norm=nn.LayerNorm, width=8) -> None:
        super().__init__()
        self.norm = norm(width)
        self.weight = nn.Parameter(torch.randn(4, width))
        self.transposed = nn.Parameter(torch.randn(width, 4))
        self.square = nn.Parameter(torch.randn(8, width))
        self.bias = nn.Parameter(torch.randn(4))
        self.read = read

    def forward(self, x):
        return self.read(self, self.norm(x), x)


FOLDS = {
    "linear": lambda m, y, x: F.linear(y, m.weight),
    "linear-bias": lambda m, y, x: F.linear(y, m.weight, m.bias),
    "matmul": lambda m, y, x: y @ m.transposed,
    "matmul-transposed": lambda m, y, x: y @ m.weight.t(),
    "mm": lambda m, y, x: torch.mm(y.flatten(0, 1), m.transposed),
    "addmm": lambda m, y, x: torch.addmm(m.bias, y.flatten(0, 1), m.transposed).view(16, 6, 4),
    "view": lambda m, y, x: F.linear(y.view(8, 2, 6, -1), m.weight, m.bias),
    "reshape": lambda m, y, x: F.linear(y.reshape(96, -1), m.weight),
    "flatten": lambda m, y, x: F.linear(y.flatten(0, 1), m.weight),
    "transpose": lambda m, y, x: F.linear(y.transpose(0, 1), m.weight, m.bias),
    "permute": lambda m, y, x: F.linear(y.permute(1, 0, 2), m.weight),
    "slice": lambda m, y, x: F.linear(y[:, 1:3], m.weight, m.bias),
    "select": lambda m, y, x: F.linear(y[:, 0], m.weight),
    "index": lambda m, y, x: F.linear(y[torch.tensor([0, 2])], m.weight),
    "chunk": lambda m, y, x: [F.linear(part, m.weight) for part in y.chunk(2, 0)],
    "split": lambda m, y, x: [F.linear(part, m.weight) for part in y.split([4, 12])],
    "unbind": lambda m, y, x: [F.linear(part, m.weight) for part in y.unbind(1)],
    "expand": lambda m, y, x: F.linear(y[:, :1].expand(16, 6, -1), m.weight),
    "dropout-off": lambda m, y, x: F.linear(F.dropout(y, 0.5, False), m.weight),
    "contiguous": lambda m, y, x: F.linear(y.transpose(0, 1).contiguous(), m.weight),
    "several": lambda m, y, x: (
        F.linear(y, m.weight, m.bias),
        y @ m.transposed,
        F.linear(y, m.weight),
    ),
    "shared-weight": lambda m, y, x: F.linear(y, m.weight) + F.linear(x, m.weight),
    "computed-weight": lambda m, y, x: F.linear(y, m.weight * 2, m.bias + 1),
    "slice-of-a-weight": lambda m, y, x: F.linear(y, m.square[:4]) + F.linear(y, m.square[4:]),
}


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm], ids=["layer-norm", "rms-norm"])
@pytest.mark.parametrize("case", FOLDS)
def test_folds(case, norm):
    assert_agrees(roughened(Reads(FOLDS[case], norm, width=64)), torch.randn(16, 6, 64))
    (site,) = normfx.report().sites
    assert site.actions == [RULE], site.refusals


def test_conv1d_of_gpt2():
    from transformers.pytorch_utils import Conv1D

    model = roughened(nn.Sequential(nn.LayerNorm(8), Conv1D(12, 8)))
    assert_agrees(model, torch.randn(16, 6, 8))
    assert normfx.report().sites[0].actions == [RULE]


def test_a_bias_is_made_where_there_was_none():
    model = roughened(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4, bias=False)))
    with torch.no_grad():
        texts, _ = stages_of(model, torch.randn(64, 8))
    assert_expected_inline(
        texts["fold"],
        """\
v0 = norm(in2, None, None, None, None, None, None, LayerNorm over [1], eps 1e-05)
v1 = to(in3, float64)
v2 = to(in0, float64)
v3 = reshape(v2, [-1])
v4 = mul(v1, v3)
v5 = to(v4, float32)
v6 = to(in1, float64)
v7 = reshape(v6, [-1])
v8 = expand(v7, [8])
v9 = mv(v1, v8)
v10 = to(v9, float32)
v11 = linear(v0, v5, v10)
return [v11]
""",
    )


def test_a_weight_without_a_bias_makes_none():
    model = roughened(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4, bias=False)))
    with torch.no_grad():
        texts, _ = stages_of(model, torch.randn(64, 8))
    assert_expected_inline(
        texts["lower"],
        """\
v0 = rms_norm(in1, [8], None, 1.1920928955078125e-07)
v1 = linear(v0, hoisted_0)
return [v1]
""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    assert_agrees(head(64, 32).to(dtype), torch.randn(64, 64).to(dtype))
    assert normfx.report().sites[0].actions == [RULE]


def test_refuses_range_too_small():
    """300 * 300 is no float16 number: a folded weight would be infinite where eager's results are not."""
    model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight.fill_(300.0)
        model[1].weight.copy_(300.0 * torch.eye(32, 64))
    model, x = model.half(), 0.1 * torch.randn(64, 64).half()
    x[:, -1] = 20.0  # so that the 32 numbers that are read are small after the norm
    with torch.no_grad():
        assert not torch.isfinite((model[1].weight * model[0].weight).diagonal()).any()
        assert torch.isfinite(model(x)).all()
        assert torch.equal(compiled(model)(x), model(x))
        torch._dynamo.reset()
        assert refused(model, x) == "range-too-small"


def test_a_float16_norm_with_a_wider_reader():
    """The dtype that counts is that of the product: the reader's."""

    class Widens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(64).half(), nn.Linear(64, 32)

        def forward(self, x):
            return self.linear(self.norm(x).to(self.linear.weight.dtype))

    assert_agrees(roughened(Widens()), torch.randn(64, 64).half())
    assert normfx.report().sites[0].actions == [RULE]


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_large_mean_and_tiny_variance(shift):
    assert_agrees(head(64, 32), shift + 0.1 * torch.randn(64, 64))


def test_a_cast_between_norm_and_reader():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 32).bfloat16()

        def forward(self, x):
            return self.linear(self.norm(x).to(self.linear.weight.dtype))

    assert_agrees(roughened(Casts()), torch.randn(64, 64))
    assert normfx.report().sites[0].actions == [RULE]


REFUSES = {
    "extra-user": lambda m, y, x: (F.linear(y, m.weight), y),
    "reader-not-linear": lambda m, y, x: F.linear(torch.relu(y), m.weight),
    "weight-not-constant": lambda m, y, x: F.linear(y, x[0]),
    "mutation-between": lambda m, y, x: (y[:1].mul_(2), F.linear(y, m.weight))[1],
}


def refused(model, *inputs, rules=None):
    texts, journal = stages_of(model, *inputs, rules=rules)
    assert texts["fold"] == texts["recognise"]
    (site,) = journal.sites
    (record,) = [r for r in site.records if r.rule == RULE]
    assert record.stage == "fold"
    assert not record.changed
    assert record.node
    assert site.actions == []
    return record.code.value


@pytest.mark.parametrize("code", REFUSES)
def test_refuses(code):
    with torch.no_grad():
        assert refused(roughened(Reads(REFUSES[code])), torch.randn(16, 6, 8)) == code
    torch._dynamo.reset()
    assert_agrees(roughened(Reads(REFUSES[code])), torch.randn(16, 6, 8))


ALSO_NOT_LINEAR = {
    "last-dim-cut": lambda m, y, x: F.linear(y[..., :4], m.square[:, :4]),
    "last-dim-swapped": lambda m, y, x: F.linear(y.transpose(1, 2), m.square),
    "last-dim-merged": lambda m, y, x: y.flatten(1) @ m.square.view(64, 1),
    "last-dim-rolled": lambda m, y, x: F.linear(y.roll(1, -1), m.weight),
    "last-dim-flipped": lambda m, y, x: F.linear(y.flip(-1), m.weight),
    "last-dim-indexed": lambda m, y, x: F.linear(
        y[..., torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])], m.weight
    ),
    "last-dim-chunked": lambda m, y, x: F.linear(torch.cat(y.chunk(2, -1)[::-1], -1), m.weight),
    "on-the-right": lambda m, y, x: m.square @ y,
    "with-itself": lambda m, y, x: y @ y.transpose(1, 2),
    "addmm-alpha": lambda m, y, x: torch.addmm(m.bias, y.view(-1, 8), m.transposed, alpha=2),
    "residual": lambda m, y, x: F.linear(y, m.weight).sum() + y,
    "bmm": lambda m, y, x: torch.bmm(y, x.transpose(1, 2)),
    "vector": lambda m, y, x: y @ m.transposed[:, 0],
    "dropout-on": lambda m, y, x: F.linear(F.dropout(y, 0.5, True), m.weight),
    "reinterpreted": lambda m, y, x: F.linear(y.view(torch.int32).to(m.weight.dtype), m.weight),
    "rounded": lambda m, y, x: F.linear(y.to(torch.int32).to(y.dtype), m.weight),
    "reshaped-across": lambda m, y, x: F.linear(y.transpose(1, 2).reshape(8, 8, 8), m.weight),
    "as-strided": lambda m, y, x: F.linear(y.as_strided((8, 8), (1, 8)), m.weight),
    "gathered": lambda m, y, x: F.linear(
        y.gather(-1, torch.zeros(8, 8, 8, dtype=torch.long)), m.weight
    ),
}


@pytest.mark.parametrize("case", ALSO_NOT_LINEAR)
def test_leaves_alone(case):
    model, x = roughened(Reads(ALSO_NOT_LINEAR[case])), torch.randn(8, 8, 8)
    if case not in (
        "dropout-on",
        "reinterpreted",
    ):  # the float64 run has other numbers, and other bits
        assert_agrees(model, x)
        torch._dynamo.reset()
    with torch.no_grad():
        assert refused(model, x) in ("reader-not-linear", "weight-not-constant", "extra-user")


def test_refuses_rule_off():
    with torch.no_grad():
        assert refused(head(), torch.randn(64, 8), rules=[]) == "rule-off"


def test_refuses_needs_grad():
    assert refused(head(), torch.randn(64, 8)) == "needs-grad"


def test_refuses_weight_not_tracked():
    with torch.inference_mode():
        assert refused(head(), torch.randn(64, 8)) == "weight-not-tracked"


def test_refuses_inside_a_body():
    """A checkpoint's weights are operands of it, which may be anything."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head(64, 32)

        def forward(self, x):
            return checkpoint(self.head, x, use_reentrant=False)

    model, x = Checkpointed(), torch.randn(64, 64)
    with torch.no_grad():
        assert refused(model, x) == "inside-a-body"
    torch._dynamo.reset()
    assert_agrees(model, x)
    assert normfx.report().sites[0].refusals == ["inside-a-body"]


class Modulated(nn.Module):
    """A LayerNorm whose scale comes from a condition, as in AdaLN."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x, scale):
        return self.linear(F.layer_norm(x, (8,), scale))


def test_refuses_affine_not_constant():
    with torch.no_grad():
        assert refused(Modulated(), torch.randn(64, 8), torch.rand(8)) == "affine-not-constant"


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 8), nn.InstanceNorm1d(8, affine=True), nn.BatchNorm1d(8).eval()],
    ids=lambda n: type(n).__name__,
)
def test_refuses_dim_not_last(norm):
    model = roughened(nn.Sequential(norm, nn.Linear(6, 4)).eval())
    with torch.no_grad():
        assert refused(model, torch.randn(5, 8, 6)) == "dim-not-last"
    torch._dynamo.reset()
    assert_agrees(model, torch.randn(5, 8, 6))


def test_refuses_no_reader():
    """Dynamo drops what nothing reads; a graph made by hand need not."""
    from normfx.capture import capture
    from normfx.passes.recognise import recognise

    journal = Journal()

    def backend(gm, example_inputs):
        captured = capture(gm)
        recognise(captured, journal, grad=False)
        (linear,) = captured.graph.find_nodes(
            op="call_function", target=torch.ops.aten.linear.default
        )
        linear.replace_all_uses_with(linear.args[1])
        captured.graph.erase_node(linear)
        fold(captured, Options(), blocked=None)
        return gm

    with torch.no_grad():
        torch.compile(head(), backend=backend)(torch.randn(64, 8))
    assert journal.sites[0].refusals == ["no-reader"]


def test_a_second_run_changes_nothing():
    texts = []

    def backend(gm, example_inputs):
        from graph_text import graph_text

        from normfx.capture import capture
        from normfx.passes.recognise import recognise

        captured = capture(gm)
        for _ in range(2):
            recognise(captured, Journal(), grad=False)
            fold(captured, Options(), blocked=None)
            texts.append(graph_text(captured.graph))
        return gm

    with torch.no_grad():
        torch.compile(head(), backend=backend)(torch.randn(64, 8))
    assert texts[0] == texts[1]
