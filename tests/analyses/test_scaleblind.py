"""Scale-blindness: what each operator does to it, held to the gradients of the model in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import roughened
from radial import EPS, ZERO, largest, radial
from torch import nn

import normfx


def claims(model, *inputs):
    """What is claimed for each parameter, after every claim was held to the gradient."""
    model = roughened(model)
    found = normfx.scale_invariant_parameters(model)(*inputs)
    products = radial(model, *inputs)
    for name, claim in found.items():
        if name in products:
            worst = largest(claim, products[name])
            assert worst < ZERO, (
                f"{name}: {claim.view}, but <w, grad> is {worst:.1e} of the largest"
            )
    return {name: claim.view for name, claim in found.items()}


class Reads(nn.Module):
    """A function of w (8, 6) or k (8, 4, 3, 3), and b (8)."""

    def __init__(self, read) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(8, 6))
        self.k = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.b = nn.Parameter(torch.randn(8))
        self.register_buffer("c", torch.randn(8, 6))
        self.register_buffer("out", torch.randn(3, 8))
        self.rows = torch.tensor([[0, 3, 3], [7, 1, 0]])
        self.read = read

    def forward(self, x):
        return self.read(self, x)


def layer_norm(x, dims=1):
    return F.layer_norm(x, x.shape[-dims:], eps=EPS)


def rms_norm(x, weight=None):
    return F.rms_norm(x, x.shape[-1:], weight, eps=EPS)


def batch_norm(x):
    return F.batch_norm(x, None, None, training=True, eps=EPS)


def group_norm(x, groups):
    return F.group_norm(x, groups, eps=EPS)


def y(m, x):
    """The linear layer that is looked at: (5, 4, 6) to (5, 4, 8)."""
    return F.linear(x, m.w)


def image(m, x):
    """A convolution of 4 channels to 8."""
    return F.conv2d(x[..., None] * m.c[0], m.k, padding=1)


CASES = {
    # readers
    "layer-norm": (lambda m, x: layer_norm(y(m, x)), "whole"),
    "layer-norm-two-dims": (lambda m, x: layer_norm(y(m, x), 2), "whole"),
    "rms-norm": (lambda m, x: rms_norm(y(m, x)), "whole"),
    "rms-norm-of-a-part": (
        lambda m, x: (h := y(m, x)) * (h[..., :4].square().mean(-1, True) + EPS).rsqrt(),
        "whole",
    ),
    "l2-norm": (lambda m, x: F.normalize(y(m, x), dim=-1, eps=EPS), "whole"),
    "l2-norm-of-tokens": (lambda m, x: F.normalize(y(m, x), dim=1, eps=EPS), "channel"),
    "batch-norm": (lambda m, x: batch_norm(y(m, x).mT), "channel"),
    "group-norm": (lambda m, x: group_norm(y(m, x).mT, 4), "group"),
    "instance-norm": (lambda m, x: F.instance_norm(y(m, x).mT, eps=EPS), "channel"),
    "standardized": (
        lambda m, x: ((h := y(m, x)) - h.mean(-1, True)) / (h.std(-1, keepdim=True) + EPS),
        "whole",
    ),
    "on-the-weight": (lambda m, x: F.linear(x, layer_norm(m.w)), "channel"),
    "rows-of-the-weight": (lambda m, x: F.linear(x, F.normalize(m.w, eps=EPS)), "channel"),
    "columns-of-the-weight": (lambda m, x: x @ F.normalize(m.w.t(), dim=0, eps=EPS), "channel"),
    "all-of-the-weight": (
        lambda m, x: F.linear(x, m.w / (m.w.square().sum() + EPS).sqrt()),
        "whole",
    ),
    "several": (lambda m, x: (layer_norm(y(m, x)), batch_norm(y(m, x).mT)), "whole"),
    "several-groups": (
        lambda m, x: (group_norm(y(m, x).mT, 4), group_norm(y(m, x).mT, 2)),
        "group",
    ),
    "twice": (lambda m, x: (batch_norm(y(m, x).mT), batch_norm(y(m, 2 - x).mT)), "channel"),
    # homogeneous
    "relu": (lambda m, x: layer_norm(F.relu(y(m, x))), "whole"),
    "relu-squared": (lambda m, x: rms_norm(F.relu(y(m, x)) ** 2), "whole"),
    "leaky-relu": (lambda m, x: batch_norm(F.leaky_relu(y(m, x), 0.3).mT), "channel"),
    "prelu": (lambda m, x: batch_norm(F.prelu(y(m, x).mT, m.out[0])), "channel"),
    "abs": (lambda m, x: layer_norm(y(m, x).abs()), "whole"),
    "negative-part": (lambda m, x: layer_norm(y(m, x).clamp(max=0)), "whole"),
    "inverse": (lambda m, x: rms_norm(1 / y(m, x).abs()), "whole"),
    "root": (lambda m, x: rms_norm(y(m, x).abs().sqrt()), "whole"),
    "square": (lambda m, x: layer_norm(y(m, x) * y(m, x)), "whole"),
    "dropout": (lambda m, x: layer_norm(F.dropout(y(m, x), 0.5)), "whole"),
    "factor": (lambda m, x: layer_norm(y(m, x) * x[..., :1].exp()), "whole"),
    "factor-of-channels": (lambda m, x: batch_norm((y(m, x) * m.out[0]).mT), "channel"),
    "divided": (lambda m, x: layer_norm(y(m, x) / m.out[0]), "whole"),
    "masked": (lambda m, x: layer_norm(y(m, x).masked_fill(m.out[0] > 0, 0)), "whole"),
    "cast": (lambda m, x: layer_norm(y(m, x).double()), "whole"),
    "sum": (lambda m, x: layer_norm(y(m, x).sum(1)), "whole"),
    "mean": (lambda m, x: batch_norm(y(m, x).mean(1)), "channel"),
    "maximum": (lambda m, x: batch_norm(y(m, x).amax(1)), "channel"),
    "max-pool": (lambda m, x: batch_norm(F.max_pool1d(y(m, x).mT, 2)), "channel"),
    "max-pool-of-channels": (lambda m, x: layer_norm(F.max_pool1d(y(m, x), 2)), "whole"),
    "avg-pool": (
        lambda m, x: batch_norm(F.avg_pool2d(image(m, x), 3, padding=1, count_include_pad=True)),
        "channel",
    ),
    "interpolated": (
        lambda m, x: batch_norm(F.interpolate(image(m, x), scale_factor=2, mode="bilinear")),
        "channel",
    ),
    "padded": (lambda m, x: batch_norm(F.pad(y(m, x).mT, (1, 1))), "channel"),
    "padded-with-itself": (
        lambda m, x: batch_norm(F.pad(y(m, x).mT, (1, 1), mode="reflect")),
        "channel",
    ),
    # moves
    "heads": (lambda m, x: rms_norm(y(m, x).view(5, 4, 4, 2)), "group"),
    "heads-transposed": (
        lambda m, x: layer_norm(y(m, x).unflatten(-1, (2, 4)).transpose(1, 2)),
        "group",
    ),
    "heads-inside": (
        lambda m, x: F.normalize(y(m, x).view(5, 4, 4, 2), dim=2, eps=EPS),
        "group",
    ),
    "merged": (lambda m, x: layer_norm(y(m, x).flatten(1)), "whole"),
    "tokens": (lambda m, x: batch_norm(y(m, x).flatten(0, 1)), "channel"),
    "halves": (
        lambda m, x: (layer_norm(y(m, x)[..., :4]), layer_norm(y(m, x)[..., 4:])),
        "group",
    ),
    "halves-otherwise": (
        lambda m, x: (layer_norm(y(m, x).chunk(2, -1)[0]), batch_norm(y(m, x)[..., 4:].mT)),
        "group",
    ),
    "every-second": (
        lambda m, x: (layer_norm(y(m, x)[..., ::2]), layer_norm(y(m, x)[..., 1::2])),
        "group",
    ),
    "narrow": (
        lambda m, x: (
            layer_norm(torch.narrow(y(m, x), -1, -4, 4)),
            layer_norm(torch.narrow(y(m, x), 2, 0, 4)),
        ),
        "group",
    ),
    "one-half": (lambda m, x: layer_norm(y(m, x)[..., :4]), "group"),
    "one-half-is-seen": (lambda m, x: (layer_norm(y(m, x)[..., :4]), y(m, x)[..., 4:]), "part"),
    "split": (
        lambda m, x: [layer_norm(h) for h in y(m, x).split([2, 6], -1)][1],
        "group",
    ),
    "unbound": (
        lambda m, x: tuple(map(layer_norm, y(m, x).unflatten(-1, (2, 4)).unbind(2))),
        "group",
    ),
    "selected": (lambda m, x: layer_norm(y(m, x)[:, 1]), "whole"),
    "fused-heads": (
        lambda m, x: tuple(
            map(rms_norm, y(m, x).view(5, 4, 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0))
        ),
        "group",
    ),
    "fused-heads-one-seen": (
        lambda m, x: (
            rms_norm((h := y(m, x).view(5, 4, 2, 2, 2).permute(2, 0, 3, 1, 4))[0]),
            h[1],
        ),
        "part",
    ),
    "beside": (
        lambda m, x: batch_norm(torch.cat([y(m, x), x], -1).mT),
        "channel",
    ),
    "stacked": (lambda m, x: layer_norm(torch.stack([y(m, x), y(m, -x)], 1)), "whole"),
    "flipped": (lambda m, x: layer_norm(y(m, x).flip(-1).roll(1, 1)), "whole"),
    "expanded": (lambda m, x: layer_norm(y(m, x)[:, :1].expand(5, 4, 8)), "whole"),
    "detached": (lambda m, x: layer_norm(y(m, x)) * layer_norm(y(m, x).detach()), "whole"),
    # products
    "matmul": (lambda m, x: layer_norm(x @ m.w.t()), "whole"),
    "mm": (lambda m, x: batch_norm(torch.mm(x[0], m.w.mT)), "channel"),
    "bmm": (lambda m, x: rms_norm(torch.bmm(x, m.w.mT.expand(5, 6, 8))), "whole"),
    "on-the-left": (lambda m, x: batch_norm(m.w @ x.mT), "channel"),
    "addmm": (lambda m, x: layer_norm(torch.addmm(m.out[0, :1], x[0], m.w.mT, alpha=2)), "whole"),
    "einsum": (lambda m, x: rms_norm(torch.einsum("bti,oi->bto", x, m.w)), "whole"),
    "einsum-heads": (
        lambda m, x: rms_norm(torch.einsum("bti,hdi->bhtd", x, m.w.view(2, 4, 6))),
        "group",
    ),
    "einsum-ellipsis": (
        lambda m, x: batch_norm(torch.einsum("...ti,oi->...ot", x, m.w)),
        "channel",
    ),
    "linear-after": (lambda m, x: layer_norm(F.linear(F.relu(y(m, x)), m.out)), "whole"),
    "linear-then-batch-norm": (lambda m, x: batch_norm(F.linear(y(m, x), m.out).mT), "whole"),
    "matmul-then-batch-norm": (lambda m, x: batch_norm((y(m, x) @ m.c).mT), "whole"),
    "from-the-left-then-layer-norm": (lambda m, x: layer_norm(m.c[:3, :4] @ y(m, x)), "whole"),
    "from-the-left-then-batch-norm": (
        lambda m, x: batch_norm((m.c[:3, :4] @ y(m, x)).mT),
        "channel",
    ),
    "einsum-then-batch-norm": (
        lambda m, x: batch_norm(torch.einsum("bto,oi->bit", y(m, x), m.c)),
        "whole",
    ),
    "sum-of-channels": (lambda m, x: batch_norm(y(m, x).sum(-1)), "whole"),
    "norm-of-channels": (
        lambda m, x: batch_norm(torch.linalg.vector_norm(y(m, x), dim=-1)),
        "whole",
    ),
    "padded-channels": (lambda m, x: batch_norm(F.pad(y(m, x), (1, 1)).mT), "whole"),
    "attention-by-channel": (
        lambda m, x: F.normalize(F.scaled_dot_product_attention(x, x, y(m, x)), dim=1, eps=EPS),
        "channel",
    ),
    "attention": (
        lambda m, x: layer_norm(
            F.scaled_dot_product_attention(x[:, None], x[:, None], y(m, x)[:, None])
        ),
        "whole",
    ),
    "embedding": (lambda m, x: layer_norm(F.embedding(m.rows, m.w)), "channel"),
    "embedding-of-bags": (lambda m, x: layer_norm(F.embedding(m.rows, m.w), 2), "whole"),
    # convolutions
    "conv": (lambda m, x: batch_norm(image(m, x)), "channel"),
    "conv-then-group": (lambda m, x: group_norm(image(m, x), 2), "group"),
    "conv-after": (
        lambda m, x: batch_norm(F.conv2d(image(m, x).relu(), m.out[:, :, None, None])),
        "whole",
    ),
    "conv-in-groups-after": (
        lambda m, x: batch_norm(F.conv2d(image(m, x), m.c.view(8, 2, 3, 1)[:4], groups=4)),
        "group",
    ),
    "depthwise-after": (
        lambda m, x: batch_norm(F.conv2d(image(m, x), m.c.view(8, 1, 3, 2), groups=8)),
        "channel",
    ),
    "transposed": (
        lambda m, x: batch_norm(F.conv_transpose2d(m.c.view(2, 8, 3, 1), m.k)),
        "channel",
    ),
    "transposed-in-groups": (
        lambda m, x: batch_norm(F.conv_transpose2d(m.c.view(2, 8, 3, 1), m.k, groups=2)),
        "group",
    ),
    "transposed-after": (
        lambda m, x: batch_norm(F.conv_transpose2d(image(m, x), m.out.mT[:, :, None, None])),
        "whole",
    ),
    "no-batch": (lambda m, x: layer_norm(F.conv1d(x[0].mT, m.w[..., None]), 2), "whole"),
    # summands
    "number-added": (lambda m, x: layer_norm(y(m, x) + 1), "whole"),
    "row-added": (lambda m, x: layer_norm(y(m, x) + x[..., :1]), "whole"),
    "channel-added": (lambda m, x: batch_norm((y(m, x) - m.out[0]).mT), "channel"),
    "groups-of-one": (lambda m, x: group_norm((y(m, x) + m.out[0]).mT, 8), "channel"),
    "several-added": (lambda m, x: batch_norm((y(m, x) + m.out[0] + m.out[1]).mT), "channel"),
    "moved-and-added": (
        lambda m, x: batch_norm((y(m, x) + m.out[0]).transpose(0, 1).flatten(0, 1)),
        "channel",
    ),
    "halved-and-added": (lambda m, x: batch_norm(((y(m, x) + m.out[0]) / 2).mT), "channel"),
    "added-to-heads": (
        lambda m, x: layer_norm(y(m, x).view(5, 4, 2, 4) + m.out[0, :2, None]),
        "group",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_is_blind(case):
    read, view = CASES[case]
    model = Reads(read)
    found = claims(model, torch.randn(5, 4, 6))
    assert found.get("w", found.get("k")) == view


def attend(m, q, k, v):
    return (q @ k.mT / 8**0.5 + m.c[:4, :4]).softmax(-1) @ v


# What is added to b (8) is not seen.
DEAD = {
    "batch-norm": lambda m, x: batch_norm(F.linear(x, m.w, m.b).mT).relu(),
    "batch-norm-of-an-image": lambda m, x: batch_norm(
        F.conv2d(x[..., None], m.k, m.b, padding=1)
    ).relu(),
    "transposed": lambda m, x: batch_norm(
        F.conv_transpose2d(m.c.view(2, 8, 3, 1), m.k, m.b, groups=2)
    ),
    "addmm": lambda m, x: batch_norm(torch.addmm(m.b, x[0], m.w.mT)).relu(),
    "groups-of-one": lambda m, x: group_norm(F.linear(x, m.w, m.b).mT, 8).relu(),
    "keys": lambda m, x: attend(m, y(m, x), F.linear(x, m.w, m.b), y(m, x)),
    "queries-of-the-transposed": lambda m, x: (
        (F.linear(x, m.w, m.b) @ y(m, x).mT).softmax(-2) @ y(m, x)
    ),
    "keys-of-heads": lambda m, x: F.scaled_dot_product_attention(
        *(h.view(5, 4, 2, 4).transpose(1, 2) for h in (y(m, x), F.linear(x, m.w, m.b), y(m, x)))
    ),
    "before-a-norm-of-the-bias-alone": lambda m, x: (
        F.linear(x, m.w) + F.layer_norm(m.b[:, None], (1,)).flatten()
    ),
}


@pytest.mark.parametrize("case", DEAD)
def test_is_dead(case):
    model, x = Reads(DEAD[case]), torch.randn(5, 4, 6)
    assert claims(model, x)["b"] == "dead"


def test_one_number_is_dead():
    model = Reads(lambda m, x: (y(m, x) + m.b[0]).log_softmax(-1) * m.b[1:].sum())
    assert claims(model, torch.randn(5, 4, 6))["b"] == "part"


NOT_DEAD = {
    "layer-norm": lambda m, x: layer_norm(F.linear(x, m.w, m.b)),
    "group-norm": lambda m, x: group_norm(F.linear(x, m.w, m.b).mT, 4),
    "relu": lambda m, x: batch_norm(F.linear(x, m.w, m.b).relu().mT),
    "rms-norm": lambda m, x: F.normalize(F.linear(x, m.w, m.b), dim=1, eps=EPS),
    "queries": lambda m, x: attend(m, F.linear(x, m.w, m.b), y(m, x), y(m, x)),
    "values": lambda m, x: attend(m, y(m, x), y(m, x), F.linear(x, m.w, m.b)),
    "rotated-keys": lambda m, x: attend(
        m, y(m, x), F.linear(x, m.w, m.b) * x[..., :1].cos(), y(m, x)
    ),
    "masked-by-a-factor": lambda m, x: (
        (y(m, x) @ F.linear(x, m.w, m.b).mT * m.c[:4, :4]).softmax(-1) @ x
    ),
    "softmax-of-channels": lambda m, x: F.linear(x, m.w, m.b).softmax(-1),
}


@pytest.mark.parametrize("case", NOT_DEAD)
def test_is_not_dead(case):
    model, x = Reads(NOT_DEAD[case]), torch.randn(5, 4, 6)
    assert "b" not in claims(model, x)
    assert radial(model, x)["b"].sum().abs() > ZERO


SEEN = {
    "narrow": lambda m, x: (torch.narrow(y(m, x), -1, -4, 4), layer_norm(y(m, x))),
    "select-from-the-end": lambda m, x: (y(m, x)[..., -1], layer_norm(y(m, x))),
    "result": lambda m, x: y(m, x),
    "result-beside": lambda m, x: (layer_norm(y(m, x)), y(m, x).relu()),
    "residual": lambda m, x: layer_norm(x.repeat(1, 1, 2)[..., :8] + y(m, x)),
    "residual-of-the-norm": lambda m, x: y(m, x) + layer_norm(y(m, x)),
    "sigmoid": lambda m, x: layer_norm(torch.sigmoid(y(m, x))),
    "silu": lambda m, x: layer_norm(F.silu(y(m, x))),
    "gelu": lambda m, x: batch_norm(F.gelu(y(m, x)).mT),
    "softmax": lambda m, x: layer_norm(y(m, x).softmax(-1)),
    "exp": lambda m, x: layer_norm(y(m, x).exp()),
    "clamp": lambda m, x: layer_norm(y(m, x).clamp(-1, 1)),
    "relu6": lambda m, x: layer_norm(F.relu6(y(m, x))),
    "threshold": lambda m, x: layer_norm(F.threshold(y(m, x), 0.5, 1.0)),
    "bias-before-layer-norm": lambda m, x: layer_norm(F.linear(x, m.w, m.b)),
    "bias-before-rms-norm": lambda m, x: rms_norm(F.linear(x, m.w, m.b)),
    "number-before-rms-norm": lambda m, x: rms_norm(y(m, x) + 1),
    "bias-before-group-norm": lambda m, x: group_norm(F.linear(x, m.w, m.b).mT, 4),
    "bias-then-relu": lambda m, x: batch_norm(F.linear(x, m.w, m.b).relu().mT),
    "bias-in-a-product": lambda m, x: layer_norm(torch.addmm(m.b, x[0], m.w.mT)),
    "added-in-a-group": lambda m, x: group_norm((y(m, x) + m.out[0]).mT, 4),
    "added-in-a-head": lambda m, x: layer_norm((y(m, x) + m.out[0]).view(5, 4, 2, 4)),
    "added-to-a-token": lambda m, x: batch_norm((y(m, x) + x[..., :1]).mT),
    "masked-with-a-number": lambda m, x: layer_norm(y(m, x).masked_fill(m.out[0] > 0, 1.0)),
    "padded-with-ones": lambda m, x: batch_norm(F.pad(y(m, x).mT, (1, 1), value=1.0)),
    "beside-others": lambda m, x: layer_norm(torch.cat([y(m, x), x], -1)),
    "stacked-with-others": lambda m, x: layer_norm(
        torch.stack([y(m, x), *m.out[:2, None, None].expand(2, 5, 4, 8)], -1)
    ),
    "where": lambda m, x: layer_norm(torch.where(m.out[0] > 0, y(m, x), 1.0)),
    "fixed-statistics": lambda m, x: F.batch_norm(y(m, x).mT, m.out[0], m.out[1].abs()),
    "statistic-of-another": lambda m, x: y(m, x) / (x.square().mean(-1, True) + EPS).sqrt(),
    "detached-statistic": lambda m, x: (
        y(m, x) / (y(m, x).square().mean(-1, True) + EPS).sqrt().detach()
    ),
    "statistic-is-read": lambda m, x: (rms_norm(y(m, x)), y(m, x).square().mean(-1)),
    "no-small-eps": lambda m, x: y(m, x) / (1 + y(m, x).square().sum(-1, True).sqrt()),
    "learned-eps": lambda m, x: y(m, x) * (y(m, x).square().mean(-1, True) + m.b[0] ** 2).rsqrt(),
    "regularised": lambda m, x: (layer_norm(y(m, x)), m.w.square().sum()),
    "a-query": lambda m, x: layer_norm(
        F.scaled_dot_product_attention(y(m, x), m.out.expand(5, 3, 8), m.out.expand(5, 3, 8))
    ),
    "written-to": lambda m, x: layer_norm(y(m, x).clone().index_fill_(-1, torch.tensor([0]), 1.0)),
    "rounded": lambda m, x: layer_norm(y(m, x).round() + 0.0 * y(m, x).sum()),
    "bits": lambda m, x: layer_norm(y(m, x).view(torch.int32).float() + y(m, x).sum()),
    "power-of-itself": lambda m, x: layer_norm(y(m, x).abs() ** y(m, x)),
    "tied": lambda m, x: (batch_norm(y(m, x).mT), m.out @ m.w),
}
# What is written over in place differs by dtype or has no gradient to compare with.
UNCHECKED = ("detached-statistic", "rounded", "bits", "written-to")


@pytest.mark.parametrize("case", SEEN)
def test_sees(case):
    model, x = Reads(SEEN[case]), torch.randn(5, 4, 6)
    assert "w" not in claims(model, x)
    if case not in UNCHECKED:
        product = radial(model, x)["w"]
        assert product.sum().abs() > ZERO
        assert (product.sum(1).abs() > ZERO).any()


class Drawn(nn.Module):
    """A program over values of shape (3, 4, 8): each step reads earlier values and its own weights."""

    def __init__(self, steps, results) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.results = steps, results
        for i, _ in enumerate(steps):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(8, 8)))
            self.register_parameter(f"b{i}", nn.Parameter(torch.randn(8)))

    def forward(self, x):
        values = [x]
        for i, (name, first, second) in enumerate(self.steps):
            w, b = getattr(self, f"w{i}"), getattr(self, f"b{i}")
            earlier = values[-1 - first % len(values)], values[-1 - second % len(values)]
            values.append(STEPS[name](*earlier, w, b))
        return tuple(values[-1 - i % len(values)] for i in self.results)


STEPS = {
    "linear": lambda x, z, w, b: F.linear(x, w),
    "linear-bias": lambda x, z, w, b: F.linear(x, w, b),
    "matmul": lambda x, z, w, b: x @ w,
    "heads": lambda x, z, w, b: torch.einsum("bti,hdi->bthd", x, w.view(2, 4, 8)).flatten(2),
    "conv": lambda x, z, w, b: F.conv1d(x.mT, w[:, :, None], b).mT,
    "depthwise": lambda x, z, w, b: F.conv1d(x.mT, w[:, None, :3], padding=1, groups=8).mT,
    "grouped": lambda x, z, w, b: F.conv1d(x.mT, w[:, :4, None], groups=2).mT,
    "normed-weight": lambda x, z, w, b: F.linear(x, F.normalize(w, eps=EPS)),
    "scale": lambda x, z, w, b: x * b,
    "bias": lambda x, z, w, b: x + b,
    "layer-norm": lambda x, z, w, b: layer_norm(x),
    "layer-norm-affine": lambda x, z, w, b: F.layer_norm(x, (8,), b, w[0], EPS),
    "rms-norm": lambda x, z, w, b: rms_norm(x),
    "rms-norm-affine": lambda x, z, w, b: rms_norm(x, b),
    "batch-norm": lambda x, z, w, b: batch_norm(x.mT).mT,
    "group-norm": lambda x, z, w, b: group_norm(x.mT, 2).mT,
    "head-norm": lambda x, z, w, b: rms_norm(x.view(3, 4, 2, 4)).flatten(2),
    "token-norm": lambda x, z, w, b: F.normalize(x, dim=1, eps=EPS),
    "half-norm": lambda x, z, w, b: torch.cat([layer_norm(x[..., :4]), x[..., 4:]], -1),
    "relu": lambda x, z, w, b: F.leaky_relu(x, 0.1),
    "silu": lambda x, z, w, b: F.silu(x),
    "square": lambda x, z, w, b: x * x.abs(),
    "add": lambda x, z, w, b: x + z,
    "multiply": lambda x, z, w, b: x * z,
    "divide": lambda x, z, w, b: x / (z.abs() + 1),
    "beside": lambda x, z, w, b: torch.cat([x[..., :4], z[..., 4:]], -1),
    "other-half": lambda x, z, w, b: torch.cat([x[..., 4:], z[..., :4]], -1),
    "flip": lambda x, z, w, b: x.flip(-1),
    "mean": lambda x, z, w, b: x.mean(1, keepdim=True).expand(3, 4, 8),
    "shuffle": lambda x, z, w, b: x.view(3, 4, 2, 4).transpose(2, 3).reshape(3, 4, 8),
    "detach": lambda x, z, w, b: x.detach() * z,
    "attention": lambda x, z, w, b: F.scaled_dot_product_attention(z, z, x),
    "keys": lambda x, z, w, b: F.scaled_dot_product_attention(z, x, z),
    "scores": lambda x, z, w, b: ((z @ x.mT) / 3).softmax(-1) @ z,
    "softmax": lambda x, z, w, b: x.softmax(1),
}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2), st.integers(0, 4)),
        min_size=2,
        max_size=9,
    ),
    st.lists(st.integers(0, 3), min_size=1, max_size=2),
)
def test_claims_of_drawn_programs(steps, results):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Drawn(steps, results), torch.randn(3, 4, 8)
    found = normfx.scale_invariant_parameters(model)(x)
    try:
        products = radial(model, x)
    except RuntimeError:  # nothing that has a gradient
        return
    for name, claim in found.items():
        if name in products and products[name].isfinite().all():
            assert largest(claim, products[name]) < ZERO, (name, claim.view)
