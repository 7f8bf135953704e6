"""Frozen parameters are constants in training too: what reads them alone is folded and hoisted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from assertions import compiled
from models import roughened
from torch import nn

import normfx


class Pre(nn.Module):
    """Pre-norm blocks behind an embedding of tokens, with a last norm."""

    def __init__(self, width: int = 8, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.final, self.head = norm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.final(x))


class Convolutional(nn.Module):
    """Convolutions, one with a standardised weight, under BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.weight = nn.Parameter(torch.randn(4, 6, 3, 3))
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        standard = (self.weight - mean) * torch.rsqrt(variance + 1e-5)
        return self.last(F.conv2d(x, standard))


def norms_only(model: nn.Module) -> nn.Module:
    """All frozen but the weights and biases of norms."""
    for module in model.modules():
        trains = "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(trains)
    return model


def made(build, **options) -> nn.Module:
    torch.manual_seed(7)
    return roughened(build(**options)).double()


def inputs(model: nn.Module) -> torch.Tensor:
    shape = (3, 3, 9, 9) if isinstance(model, Convolutional) else (4, 6, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def step(call, model: nn.Module, x: torch.Tensor, *, input_too: bool = True) -> dict:
    """Result, gradients and buffers of one training step."""
    model.zero_grad()
    x = x.detach().requires_grad_(input_too)
    y = call(x)
    # not y^2, whose gradient a BatchNorm in training cancels to nothing but rounding
    (y * torch.arange(y.numel(), dtype=y.dtype).sin().reshape(y.shape)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {"y": y.detach(), **({"x": x.grad} if input_too else {}), **grads, **buffers}


# Relative to the largest number of a tensor: sums of some hundred terms, a dozen of them in a row.
ROUNDINGS = 4096 * torch.finfo(torch.float64).eps


def assert_step_agrees(model: nn.Module, x: torch.Tensor, call=None, **further) -> dict:
    """One step beside eager, both in float64: result, gradients and buffers."""
    eager = copy.deepcopy(model)
    got = step(compiled(model) if call is None else call, model, x, **further)
    expected = step(eager, eager, x, **further)
    assert list(got) == list(expected)
    for name, value in got.items():
        limit = ROUNDINGS * expected[name].abs().max()
        assert (value - expected[name]).abs().max() <= limit, name
    return got


def hoisted() -> int:
    return normfx.report().graphs[-1].hoisted


def actions() -> list[list[str]]:
    return [site.actions for site in normfx.report().graphs[-1].sites]


@pytest.mark.parametrize("input_too", [True, False])
def test_only_the_norms_are_trained(input_too):
    model = norms_only(made(Pre))
    got = assert_step_agrees(model, inputs(model), input_too=input_too)
    assert {name for name in got if name.startswith(("up", "down", "embed"))} == set()
    assert "norms.0.weight" in got
    # the writers of the stream are frozen, so their centred weights and biases are made once
    assert all("recentre" in found for found in actions())
    assert hoisted() == 6


def test_batch_norms_only_in_training_mode():
    model = norms_only(made(Convolutional)).train()
    assert_step_agrees(model, inputs(model))
    assert hoisted() == 1  # the standardised weight; a batch's own statistics fold into nothing


def test_a_frozen_backbone_folds_and_the_head_trains():
    model = made(Convolutional).eval().requires_grad_(False)
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(4 * 25, 2)).double()
    x = inputs(model[0])
    got = assert_step_agrees(model, x)
    assert list(got)[:4] == ["y", "x", "2.weight", "2.bias"]
    folded = ["fold-statistics-into-previous"]
    assert actions() == [folded, ["hoist"], folded]


def test_frozen_norm_and_reader_under_a_trained_writer():
    model = made(Pre)
    for part in (model.ups, model.norms, model.final, model.head):
        part.requires_grad_(False)
    got = assert_step_agrees(model, inputs(model))
    assert "downs.0.weight" in got
    assert all("fold-affine-into-linear" in found for found in actions())


@pytest.mark.parametrize("part", ["norms", "ups"])
def test_a_trained_norm_or_reader_is_no_constant(part):
    model = made(Pre, norm=nn.RMSNorm).requires_grad_(False)
    getattr(model, part).requires_grad_(True)
    assert_step_agrees(model, inputs(model))
    by_name = {site.name: site for site in normfx.report().sites}
    assert "needs-grad" in by_name["norms.0"].refusals
    assert by_name["final"].actions == ["fold-affine-into-linear"]


def test_a_trained_bias_of_a_reader_is_no_constant():
    model = made(Pre, norm=nn.RMSNorm).requires_grad_(False)
    model.head.bias.requires_grad_(True)
    assert_step_agrees(model, inputs(model))
    (site,) = [site for site in normfx.report().sites if site.name == "final"]
    assert (site.actions, "needs-grad" in site.refusals) == ([], True)


def test_a_parameter_that_is_trained_later_gets_its_gradient():
    model = made(Pre, norm=nn.RMSNorm).requires_grad_(False)
    x, call = inputs(model), compiled(model)
    assert_step_agrees(model, x, call)
    assert hoisted() > 0
    for name in ("head.weight", "norms.0.weight", "ups.1.bias"):
        model.get_parameter(name).requires_grad_(True)
        assert name in assert_step_agrees(model, x, call)
    model.requires_grad_(True)
    assert len(assert_step_agrees(model, x, call)) == 2 + len(list(model.parameters()))
    assert hoisted() == 0
    model.requires_grad_(False)
    assert len(assert_step_agrees(model, x, call)) == 2


def test_a_frozen_weight_that_changes_is_followed():
    model = made(Pre, norm=nn.RMSNorm).requires_grad_(False)
    model.embed.requires_grad_(True)
    x, call = inputs(model), compiled(model)
    assert_step_agrees(model, x, call)
    with torch.no_grad():
        model.final.weight.mul_(2)
        model.ups[0].weight.add_(0.5)
    assert_step_agrees(model, x, call)
    state = {name: held + 0.25 for name, held in model.state_dict().items()}
    model.load_state_dict(state)
    assert_step_agrees(model, x, call)


def test_several_steps_of_an_optimizer():
    fast = norms_only(made(Convolutional)).train()
    eager, x = copy.deepcopy(fast), inputs(fast)
    for model, call in ((fast, compiled(fast)), (eager, eager)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(fast.state_dict().values(), eager.state_dict().values(), strict=True):
        assert (mine - theirs).abs().max() <= 5 * ROUNDINGS * (1 + theirs.abs().max())


def test_without_hoist_nothing_is_folded_in_training():
    model = made(Pre, norm=nn.RMSNorm).requires_grad_(False)
    rules = [rule for rule in normfx.passes.RULES if rule not in ("hoist", "compress")]
    assert_step_agrees(model, inputs(model), compiled(model, rules=rules))
    assert all("needs-grad" in site.refusals for site in normfx.report().sites)


@pytest.mark.inductor
def test_through_inductor():
    for model in (
        norms_only(made(Pre)),
        norms_only(made(Convolutional)).train(),
        made(Convolutional).eval().requires_grad_(False),
    ):
        call = torch.compile(model, backend="normfx", options={"strict": True})
        assert_step_agrees(model, inputs(model), call)
        assert hoisted() > 0
