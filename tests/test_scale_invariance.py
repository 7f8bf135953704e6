"""Scale-invariant parameters: of whole models, against gradients in float64 and against AdamP's own code."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from models import Block, roughened
from radial import EPS, ZERO, largest, radial, with_small_eps
from torch import nn
from torch.nn.utils import parametrizations

import normfx


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean zero and variance one per output (Qiao, 1903.10520)."""

    def forward(self, x):
        flat = self.weight.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        weight = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
        return F.conv2d(x, weight.view_as(self.weight), self.bias)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys."""

    def __init__(self, width: int = 16, heads: int = 4, *, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.LayerNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(attended.transpose(1, 2).flatten(2))


class Tied(nn.Module):
    """A linear layer before a norm, whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(8, 6, bias=False), nn.RMSNorm(6), nn.Linear(8, 6)
        self.head.weight = self.up.weight

    def forward(self, x):
        return self.norm(self.up(x)), self.head(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8, bias=False), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.linear(x))


# The model, its input, and the view of each parameter that is scale-invariant.
IMAGE, ROWS = (5, 3, 6, 6), (5, 8)
MODELS = {
    "conv-batch-norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        {"0.weight": "channel"},
    ),
    "conv-bias-batch-norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()),
        IMAGE,
        {"0.weight": "channel", "0.bias": "dead"},
    ),
    "conv-bias-relu-batch-norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)),
        IMAGE,
        {},
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, bias=False),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 1, groups=6, bias=False),
            nn.BatchNorm2d(6),
            nn.Tanh(),
        ),
        IMAGE,
        {"0.weight": "channel", "2.weight": "channel"},
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.AvgPool2d(3, 1, padding=1),
            nn.Conv2d(8, 4, 1, groups=2, bias=False),
            nn.InstanceNorm2d(4),
            nn.Sigmoid(),
        ),
        IMAGE,
        {"0.weight": "group", "2.weight": "channel"},
    ),
    "group-norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(4, 8), nn.SiLU()),
        IMAGE,
        {"0.weight": "group"},
    ),
    "linear-layer-norm": (
        lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.LayerNorm(6), nn.GELU()),
        ROWS,
        {"0.weight": "whole"},
    ),
    "linear-relu-layer-norm": (
        lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.LayerNorm(6), nn.GELU()),
        ROWS,
        {"0.weight": "whole"},
    ),
    "two-linears": (
        lambda: nn.Sequential(
            nn.Linear(8, 6, bias=False), nn.Dropout(0.2), nn.Linear(6, 4, bias=False), nn.RMSNorm(4)
        ),
        ROWS,
        {"0.weight": "whole", "2.weight": "whole"},
    ),
    "norm-weight": (
        lambda: nn.Sequential(
            nn.RMSNorm(8), nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2)
        ),
        ROWS,
        {"0.weight": "whole", "1.weight": "channel"},
    ),
    "bias-before-layer-norm": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU()),
        ROWS,
        {},
    ),
    "silu-between": (
        lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.SiLU(), nn.LayerNorm(6), nn.GELU()),
        ROWS,
        {},
    ),
    "attention": (
        Attention,
        (2, 5, 16),
        {"q.weight": "group", "k.weight": "group", "k_norm.bias": "dead"},
    ),
    "fused-attention": (
        lambda: Attention(fused=True),
        (2, 5, 16),
        {"qkv.weight": "part", "k_norm.bias": "dead"},
    ),
    "weight-norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 2)),
        ROWS,
        {"0.parametrizations.weight.original1": "channel"},
    ),
    "weight-norm-batch-norm": (
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(8, 6, bias=False)), nn.BatchNorm1d(6), nn.Tanh()
        ),
        ROWS,
        {
            "0.parametrizations.weight.original0": "channel",
            "0.parametrizations.weight.original1": "channel",
        },
    ),
    "standardised": (
        lambda: nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        IMAGE,
        {"0.weight": "channel"},
    ),
    "tied": (Tied, ROWS, {}),
    "residual": (Residual, ROWS, {}),
    "pre-norm-block": (Block, ROWS, {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    build, shape, expected = MODELS[case]
    model, x = roughened(with_small_eps(build())), torch.randn(shape)
    found = normfx.scale_invariant_parameters(model)(x)
    assert {name: claim.view for name, claim in found.items()} == expected
    products = radial(model, x)
    assert products.keys() == dict(model.named_parameters()).keys()
    for name, product in products.items():
        if name in found:
            assert largest(found[name], product) < ZERO, f"{name}: {found[name].view}"
        if name not in found or found[name].view == "part":
            assert product.sum().abs() > ZERO, f"{name} is invariant, and was not found"


def test_groups_and_shifts():
    model = nn.Sequential(Standardised(3, 4, 3, bias=False), nn.GroupNorm(2, 4))
    found = normfx.scale_invariant_parameters(model)(torch.randn(IMAGE))
    assert found["0.weight"].shift
    assert found["0.weight"].groups == 4
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8))
    claim = normfx.scale_invariant_parameters(model)(torch.randn(IMAGE))["0.weight"]
    assert (claim.view, claim.dim, claim.groups, claim.shift) == ("group", 0, 2, False)
    assert claim.blocks.flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert claim.norms == ("1",)


def test_a_dim_that_is_not_the_first():
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    claim = normfx.scale_invariant_parameters(model)(torch.randn(IMAGE))["0.weight"]
    assert (claim.view, claim.dim) == ("channel", 1)


def test_a_part():
    claim = normfx.scale_invariant_parameters(Attention(fused=True))(torch.randn(2, 5, 16))[
        "qkv.weight"
    ]
    assert (claim.view, claim.dim, claim.groups) == ("part", 0, 8)
    assert claim.blocks[:, 0].tolist() == [i // 4 for i in range(32)] + [-1] * 16
    weight, update = torch.randn(48, 16), torch.randn(48, 16)
    projected = claim.project(update, weight)
    assert torch.equal(projected[32:], update[32:])
    assert not torch.equal(projected[:32], update[:32])


def test_golden():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 6, bias=False),
        nn.LayerNorm(6),
    )
    found = normfx.scale_invariant_parameters(model)(torch.randn(IMAGE))
    assert_expected_inline(
        str(found),
        """\
parameter  shape    view     shift  norms
0.weight   8x3x3x3  channel  -      1
0.bias     8        dead     yes    1
3.weight   6x128    whole    -      4
""",
    )
    assert json.loads(found.to_json())[0] == {
        "name": "0.weight",
        "shape": [8, 3, 3, 3],
        "view": "channel",
        "dim": 0,
        "groups": 8,
        "shift": False,
        "norms": ["1"],
    }
    assert list(found) == ["0.weight", "0.bias", "3.weight"]
    assert len(found) == 3
    assert "4.weight" not in found


def adamp_projection(update, weight, view):
    """As in the authors' code (clovaai/AdamP), for the view that was found."""
    shape = (weight.shape[0], -1) if view == "channel" else (1, -1)
    flat = weight.reshape(shape)
    unit = flat / (flat.norm(dim=1, keepdim=True) + 1e-8)
    along = (unit * update.reshape(shape)).sum(1, keepdim=True)
    return update - (unit * along).reshape(weight.shape)


@pytest.mark.parametrize(
    ("norm", "view"), [(nn.BatchNorm1d(6), "channel"), (nn.LayerNorm(6), "whole")]
)
def test_projects_as_adamp_does(norm, view):
    model = nn.Sequential(nn.Linear(8, 6, bias=False), norm)
    claim = normfx.scale_invariant_parameters(model)(torch.randn(ROWS))["0.weight"]
    assert claim.view == view
    update = torch.randn(6, 8, dtype=torch.float64)
    weight = torch.randn(6, 8, dtype=torch.float64)
    torch.testing.assert_close(
        claim.project(update, weight), adamp_projection(update, weight, view)
    )
    assert claim.dot(claim.project(update, weight, eps=0.0), weight).abs().max() < ZERO
    assert torch.equal(claim.project(update, torch.zeros_like(weight)), update)


def test_projects_in_half_dtypes():
    model = nn.Sequential(nn.Linear(4096, 2, bias=False), nn.BatchNorm1d(2))
    claim = normfx.scale_invariant_parameters(model)(torch.randn(5, 4096))["0.weight"]
    ones = torch.ones(2, 4096, dtype=torch.bfloat16)
    assert claim.dot(ones, ones).tolist() == [4096.0, 4096.0]
    projected = claim.project(ones, ones)
    assert projected.dtype is torch.bfloat16
    assert not projected.any()


def test_eval_mode_has_fixed_statistics():
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6))
    assert len(normfx.scale_invariant_parameters(model)(torch.randn(ROWS))) == 1
    assert len(normfx.scale_invariant_parameters(model.eval())(torch.randn(ROWS))) == 0


def test_a_running_statistic_that_is_read_sees():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)

        def forward(self, x):
            y = self.norm(self.linear(x))
            return y, y + self.norm.running_mean

    assert not normfx.scale_invariant_parameters(Reads())(torch.randn(ROWS))


class DetachedStatistic(nn.Module):
    """The value does not see the scale of the weight, but the gradient does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6, bias=False)

    def forward(self, x):
        y = self.linear(x)
        return y / (y.square().mean(-1, keepdim=True) + EPS).sqrt().detach()


def test_gradients_are_meant_where_they_are_off():
    with torch.no_grad():
        found = normfx.scale_invariant_parameters(DetachedStatistic())(torch.randn(ROWS))
        model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.LayerNorm(6))
        assert list(normfx.scale_invariant_parameters(model)(torch.randn(ROWS))) == ["0.weight"]
    assert not found


def test_a_graph_break_is_an_error():
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 6, bias=False), nn.LayerNorm(6)

        def forward(self, x):
            y = self.norm(self.linear(x))
            torch._dynamo.graph_break()
            return y + self.linear.weight.sum()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        normfx.scale_invariant_parameters(Breaks())(torch.randn(ROWS))


def test_a_checkpoint_sees():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 6, bias=False), nn.LayerNorm(6))

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    assert not normfx.scale_invariant_parameters(Checkpointed())(torch.randn(ROWS))


@pytest.mark.parametrize("case", ["conv-batch-norm", "grouped", "attention", "linear-layer-norm"])
def test_dynamic_shapes(case):
    build, shape, expected = MODELS[case]
    found = normfx.scale_invariant_parameters(build(), dynamic=True)(torch.randn(shape))
    assert {name: claim.view for name, claim in found.items()} == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes(dtype):
    build, shape, expected = MODELS["conv-batch-norm"]
    found = normfx.scale_invariant_parameters(build().to(dtype))(torch.randn(shape, dtype=dtype))
    assert {name: claim.view for name, claim in found.items()} == expected


def test_autocast():
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.LayerNorm(6))
    with torch.autocast("cpu", torch.bfloat16):
        assert list(normfx.scale_invariant_parameters(model)(torch.randn(ROWS))) == ["0.weight"]


def test_a_weight_that_is_written_to():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 6, bias=False), nn.LayerNorm(6)

        def forward(self, x):
            with torch.no_grad():
                self.linear.weight.mul_(0.5)
            return self.norm(self.linear(x))

    assert not normfx.scale_invariant_parameters(Writes())(torch.randn(ROWS))


def test_used_several_times():
    class Twice(nn.Module):
        def __init__(self, second) -> None:
            super().__init__()
            self.linear, self.norm, self.second = (
                nn.Linear(8, 8, bias=False),
                nn.LayerNorm(8),
                second,
            )

        def forward(self, x):
            return self.norm(self.linear(x)), self.second(self.linear(x + 1))

    for second, expected in ((nn.RMSNorm(8), {"linear.weight": "whole"}), (nn.Sigmoid(), {})):
        found = normfx.scale_invariant_parameters(Twice(second))(torch.randn(ROWS))
        assert {name: claim.view for name, claim in found.items()} == expected


def test_the_reports_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.LayerNorm(6))
    normfx.scale_invariant_parameters(model)(torch.randn(ROWS))
    assert not normfx.report().graphs
