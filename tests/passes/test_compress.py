"""The rule that drops the redundant channel of a stream of mean zero: Pre-CRMSNorm."""

from __future__ import annotations

import pytest
import sympy
import torch
from assertions import assert_agrees
from expecttest import assert_expected_inline
from models import roughened
from test_recentre import IDS, IMAGE, WIDTH, Embedded, Gpt, Opt, Parallel, Vit, stages_of
from torch import nn

import normfx

RULE = "compress"
RULES = ["recentre", "fold-affine-into-linear", RULE, "hoist"]


def decisions() -> list[str]:
    """For each norm that the rule looked at: the rule, or the code of its refusal."""
    records = [r for site in normfx.report().sites for r in site.records if r.rule == RULE]
    return [RULE if r.changed else r.code.value for r in records]


def test_proof():
    u = sympy.symbols("u1:5", real=True)
    eps = sympy.symbols("eps", positive=True)
    left_out = -sum(u)
    square = (sum(a**2 for a in u) + left_out**2) / 5
    compressed = (sum(a**2 for a in u) + sum(u) ** 2) / 5
    assert sympy.expand(square - compressed) == 0
    weights = sympy.symbols("w1:6", real=True)
    root = sympy.sqrt(square + eps)
    whole = sum(w * a / root for w, a in zip(weights, [*u, left_out], strict=True))
    less = sum((w - weights[-1]) * a / root for w, a in zip(weights, u, strict=False))
    assert sympy.simplify(whole - less) == 0


MODELS = {
    "gpt-2": (lambda: Gpt(), (IDS,), 5),
    "gpt-2-tied": (lambda: Gpt(tied=True), (IDS,), 5),
    "opt": (lambda: Opt(), (IDS,), 5),
    "vit": (lambda: Vit(), (IMAGE,), 5),
    "parallel": (lambda: Gpt(block=Parallel), (IDS,), 3),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    torch.manual_seed(0)
    make, inputs, count = MODELS[case]
    assert_agrees(roughened(make()).eval(), *inputs, options={"rules": RULES})
    assert decisions() == [RULE] * count


@pytest.mark.parametrize("dynamic", [False, True])
def test_half(dynamic):
    torch.manual_seed(0)
    model = roughened(Gpt()).eval().bfloat16()
    assert_agrees(model, IDS, dynamic=dynamic, options={"rules": RULES})
    assert decisions() == [RULE] * 5


def test_golden():
    with torch.no_grad():
        texts, _ = stages_of(roughened(Embedded()), torch.arange(10), rules=tuple(RULES))
    assert_expected_inline(
        texts["fold"],
        """\
v0 = to(in0, float64)
v1 = mean(v0, [1], True)
v2 = sub(v0, v1)
v3 = to(v2, float32)
v4 = embedding(v3, in1)
v5 = slice(v4, -1, 0, 7)
v6 = norm(v5, None, None, None, None, None, None, CRMSNorm over [1], eps 1e-05)
v7 = to(in4, float64)
v8 = to(in2, float64)
v9 = reshape(v8, [-1])
v10 = narrow(v9, 0, 0, 8)
v11 = reshape(v10, [1, -1])
v12 = mul(v7, v11)
v13 = to(v12, float32)
v14 = to(in3, float64)
v15 = reshape(v14, [-1])
v16 = narrow(v15, 0, 0, 8)
v17 = reshape(v16, [1, -1])
v18 = mul(v7, v17)
v19 = sum(v18, [1])
v20 = to(in5, float64)
v21 = add(v19, v20)
v22 = to(v21, float32)
v23 = to(v13, float64)
v24 = slice(v23, 1, 0, 7)
v25 = slice(v23, 1, 7)
v26 = sub(v24, v25)
v27 = to(v26, float32)
v28 = linear(v6, v27, v22)
return [v28]
""",
    )


def test_off_unless_named():
    torch.manual_seed(0)
    assert_agrees(roughened(Gpt()).eval(), IDS)
    assert decisions() == []
    assert all(site.actions[0] == "recentre" for site in normfx.report().sites)


class Returned(Gpt):
    """Another reads the norm of the stream, too."""

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(y := self.norm(x)), y.relu()


def test_a_norm_that_another_reads_keeps_the_stream():
    torch.manual_seed(0)
    model = roughened(Returned()).eval()
    model.norm.weight, model.norm.bias = None, None
    assert_agrees(model, IDS, options={"rules": RULES})
    assert set(decisions()) == {"reader-not-linear"}


def test_an_affine_part_that_stays_keeps_the_stream():
    torch.manual_seed(0)
    assert_agrees(roughened(Returned()).eval(), IDS, options={"rules": RULES})
    assert set(decisions()) == {"affine-not-constant"}


def test_the_weights_follow():
    torch.manual_seed(0)
    model = roughened(Gpt(blocks=1)).eval()
    with torch.no_grad():
        fast = assert_agrees(model, IDS, options={"rules": RULES})
        del fast
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)
    assert_agrees(model, IDS, options={"rules": RULES})


def test_with_gradients():
    assert_agrees(roughened(Gpt(blocks=1)).eval(), IDS, grad=True, options={"rules": RULES})
    assert set(decisions()) == {"needs-grad"}


def test_a_layer_of_another_width_reads_it():
    class Sliced(Gpt):
        def forward(self, ids):
            x = self.tokens(ids)
            return self.head(self.norm(x)), nn.functional.layer_norm(x[..., 1:], (WIDTH - 1,))

    torch.manual_seed(0)
    assert_agrees(roughened(Sliced()).eval(), IDS, options={"rules": RULES})
    assert RULE not in decisions()
