"""Identity norm: a norm with an eps that outweighs its input is a scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_agrees
from expecttest import assert_expected_inline
from graph_text import stages_of
from torch import nn

import normfx

RULE = "identity-norm"
WIDTH = 64


class Calls(nn.Module):
    """A function as a module, with norms as checkpoints without norms have them."""

    def __init__(self, function, eps=1e9) -> None:
        super().__init__()
        self.function, self.norm = function, nn.RMSNorm(WIDTH, eps=eps)
        self.layer_norm = nn.LayerNorm(WIDTH, eps=eps)
        nn.init.uniform_(self.norm.weight, 0.5 * eps**0.5, 2 * eps**0.5)
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.function(self, self.into(x))


def summed(x, eps):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


SCALES = {
    "tanh": lambda m, x: m.norm(x.tanh()),
    "softmax": lambda m, x: m.norm(x.softmax(-1)),
    "clamp": lambda m, x: m.norm(x.clamp(-3, 3)),
    "norm-before": lambda m, x: m.norm(torch.relu(0.5 * F.layer_norm(x, (WIDTH,)))),
    "sum": lambda m, x: summed(x.sigmoid(), 1e10),
    "variance": lambda m, x: (lambda u: u / torch.sqrt(u.var(-1, keepdim=True) + 1e9))(x.tanh()),
    "outside": lambda m, x: (lambda u: u / (u.norm(dim=-1, keepdim=True) + 1e9))(x.tanh()),
    "floor": lambda m, x: F.normalize(x.tanh(), dim=-1, eps=WIDTH**0.5 + 1),
    "floor-inside": lambda m, x: (
        lambda u: u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True).clamp(min=4.5))
    )(x.clamp(-2, 2)),
    "groups": lambda m, x: (lambda u: u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e9))(
        x.tanh().unflatten(-1, (8, 8))
    ).flatten(-2),
    "read-by-a-linear": lambda m, x: m.out(m.norm(x.tanh())),
    "between-linears": lambda m, x: m.out(m.norm(m.into(x).tanh())),
}


@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale(case, dtype):
    x = 3 * torch.randn(4, 6, WIDTH).to(dtype)
    assert_agrees(Calls(SCALES[case]).to(dtype), x)
    assert normfx.report().sites[-1].actions[:1] == [RULE]


@pytest.mark.parametrize("case", SCALES)
def test_gradients(case):
    assert_agrees(Calls(SCALES[case]), 3 * torch.randn(4, 6, WIDTH), grad=True)
    assert normfx.report().sites[-1].actions == [RULE]


def test_golden():
    with torch.no_grad():
        texts, journal = stages_of(Calls(SCALES["read-by-a-linear"]), torch.randn(4, WIDTH))
    assert_expected_inline(
        texts["lower"],
        """\
v0 = linear(in2, in0, in1)
v1 = tanh(v0)
v2 = linear(v1, hoisted_0, in5)
return [v2]
""",
    )
    assert journal.sites[0].actions == [RULE, "telescope"]


STAY = {
    "input": lambda m, x: m.norm(x),
    "residual": lambda m, x: m.norm(x + x.tanh()),
    "bound-too-large": lambda m, x: m.norm(x.clamp(-1e3, 1e3)),
    "sum-of-many": lambda m, x: summed(x.tanh(), 4e8),
    "floor-too-low": lambda m, x: F.normalize(x.tanh(), dim=-1, eps=WIDTH**0.5),
    "gated": lambda m, x: (lambda u: u * m.norm.weight)(m.norm(x)),
}


@pytest.mark.parametrize("case", STAY)
def test_stays(case):
    x = torch.randn(4, 6, WIDTH)
    with torch.no_grad():
        texts, journal = stages_of(Calls(STAY[case]), x)
    assert texts["rewrite"] == texts["recognise"]
    assert journal.sites[0].refusals[0] == "input-unbounded"
    torch._dynamo.reset()
    assert_agrees(Calls(STAY[case]), x)


NOT_LOOKED_AT = {
    "centred": lambda m, x: m.layer_norm(x.tanh()),
    "small-eps": lambda m, x: F.rms_norm(x.tanh(), (WIDTH,), eps=1e-5),
    "no-eps": lambda m, x: x.tanh() / x.tanh().norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("case", NOT_LOOKED_AT)
def test_is_not_looked_at(case):
    x = torch.randn(4, 6, WIDTH)
    assert_agrees(Calls(NOT_LOOKED_AT[case]), x)
    assert all(r.rule != RULE for site in normfx.report().sites for r in site.records)


def test_a_value_that_is_written_to_stays():
    def written(m, x):
        u = x.tanh()
        u[0].mul_(1e6)
        return m.norm(u)

    assert_agrees(Calls(written), torch.randn(4, 6, WIDTH))
    assert all(RULE not in site.actions for site in normfx.report().sites)


def test_rule_off():
    with torch.no_grad():
        texts, journal = stages_of(Calls(SCALES["tanh"]), torch.randn(4, WIDTH), rules=["hoist"])
    assert texts["rewrite"] == texts["recognise"]
    assert journal.sites[0].refusals[0] == "rule-off"


def test_an_eps_that_is_a_tensor_stays():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = nn.Parameter(torch.tensor(1e9))

        def forward(self, x):
            u = x.tanh()
            return u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + self.eps)

    assert_agrees(Given(), torch.randn(4, WIDTH))
    assert all(RULE not in site.actions for site in normfx.report().sites)
