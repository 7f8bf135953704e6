"""The option `skip`: each rule leaves a single norm as it is, and does the others."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_agrees
from models import Block, roughened
from torch import nn

import normfx


class Twice(nn.Module):
    """One norm at two places: the second call of it is `norm#1`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.norm(self.first(self.norm(x)).tanh()))


def layer_norms() -> nn.Module:
    """A residual stream whose norms can all be recentred and folded."""
    blocks = [Block() for _ in range(3)]
    return roughened(nn.Sequential(nn.Linear(8, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 4)))


def batch_norms() -> nn.Module:
    layers = [m for _ in range(3) for m in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())]
    return roughened(nn.Sequential(*layers))


def next_norms() -> nn.Module:
    """Norms with given statistics and no operator before them that could take them."""
    return roughened(
        nn.Sequential(
            nn.Sigmoid(), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Sigmoid(), nn.BatchNorm1d(8), nn.Linear(8, 4)
        )
    )  # fmt: skip


def rms_norms() -> nn.Module:
    """Norms whose scale moves past the product: their input is in memory as it is."""
    layers = [nn.Linear(8, 64), nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 4)]
    return roughened(
        nn.Sequential(*layers, nn.Linear(4, 64), nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 2))
    )


def huge() -> nn.Module:
    layers = [m for _ in range(2) for m in (nn.Tanh(), nn.RMSNorm(8, eps=1e9))]
    return roughened(nn.Sequential(*layers, nn.Linear(8, 2)))


def doubled() -> nn.Module:
    plain = {"elementwise_affine": False}
    pair = [nn.LayerNorm(8, **plain), nn.RMSNorm(8, eps=1e-6)]
    again = [nn.LayerNorm(8, **plain), nn.RMSNorm(8, eps=1e-6)]
    return roughened(nn.Sequential(*pair, nn.Linear(8, 8), *again, nn.Linear(8, 2)))


class Post(nn.Module):
    """A post-norm block with a norm whose statistics are given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def post_norms() -> nn.Module:
    return roughened(nn.Sequential(Post(), Post(), nn.Linear(8, 4)))


CASES = {
    "recognise-layer-norm": layer_norms,
    "recentre": layer_norms,
    "fold-affine-into-linear": layer_norms,
    "fold-statistics-into-previous": batch_norms,
    "fold-statistics-into-next": next_norms,
    "telescope": post_norms,
    "defer-scale": rms_norms,
    "identity-norm": huge,
}


def input_of(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4) if isinstance(model[0], nn.Conv2d) else torch.randn(16, 8)


def sites_of(model, *inputs, **options):
    with torch.no_grad():
        return normfx.explain(model.eval(), options=options)(*inputs).sites


def applied(sites) -> set[tuple[str, str]]:
    return {(r.rule, site.key) for site in sites for r in site.records if r.changed}


@pytest.mark.parametrize("rule", CASES)
def test_one_site_of_a_rule_is_left_out(rule):
    model = CASES[rule]().eval()
    x = input_of(model)
    before = [site for used, site in applied(sites_of(model, x)) if used == rule]
    assert len(before) > 1
    for skipped in before:
        after = applied(sites_of(model, x, skip=[f"{rule}@{skipped}"]))
        assert (rule, skipped) not in after
        assert {(rule, site) for site in before if site != skipped} <= after
        assert_agrees(model, x, options={"skip": [f"{rule}@{skipped}"]})


def test_two_norms_stay_two():
    model, x = doubled(), torch.randn(16, 8)
    for skipped in ("0", "1"):
        left = applied(sites_of(model, x, skip=[f"norm-of-norm@{skipped}"]))
        assert {site for rule, site in left if rule == "norm-of-norm"} == {"3", "4"}


def test_what_was_baked_stays():
    model, x = roughened(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))).eval(), torch.randn(2, 8)
    normfx.bake_(model)(x)
    assert ("drop-baked", "0") in applied(sites_of(model, x))
    assert ("drop-baked", "0") not in applied(sites_of(model, x, skip=["drop-baked@0"]))


def test_compress_is_of_a_stream_as_a_whole():
    model, x = layer_norms(), torch.randn(16, 8)
    rules = ["recentre", "fold-affine-into-linear", "compress"]
    assert any(rule == "compress" for rule, _ in applied(sites_of(model, x, rules=rules)))
    left = applied(sites_of(model, x, rules=rules, skip=["compress@4"]))
    assert not any(rule == "compress" for rule, _ in left)


def test_the_second_norm_of_a_name_has_a_number():
    model, x = roughened(Twice()), torch.randn(2, 8)
    assert [site.key for site in sites_of(model, x)] == ["norm", "norm#1"]
    left = applied(sites_of(model, x, skip=["*@norm#1"]))
    assert {site for rule, site in left if rule == "fold-affine-into-linear"} == {"norm"}


def test_a_norm_that_is_not_lowered_runs():
    model, x = layer_norms(), torch.randn(2, 8)
    assert_agrees(model, x, options={"skip": ["lower@*"]})
