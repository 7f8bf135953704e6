"""PowerNorm beside its definition, and its hard cases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from normfx.nn import PowerNorm
from normfx.nn.power import group_scaled

C = 4


def layer(**options):
    made = PowerNorm(C, **options).double()
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    return made


@pytest.mark.parametrize("masked", [False, True])
def test_definition(masked):
    norm = layer(groups=None, warmup_steps=4, alpha_forward=0.8, alpha_backward=0.7)
    phi, ema = torch.ones(C).double(), torch.zeros(C).double()
    for t in range(1, 12):
        x = torch.randn(5, 3, C).double().requires_grad_()
        dy = torch.randn(5, 3, C).double()
        mask = torch.rand(3, 5) < 0.3 if masked else torch.zeros(3, 5, dtype=torch.bool)
        norm.zero_grad()
        y = norm(x, mask if masked else None)
        y.backward(dy)
        v = x.detach()[~mask.T].square().mean(0)
        z = x.detach() / ((v if t <= 4 else phi) + norm.eps).sqrt()
        if t < 4:
            phi = phi * (t - 1) / t + v / t
        phi = 0.8 * phi + 0.2 * v
        g = dy * norm.weight.detach() - (1 - 0.7) * ema * z
        ema = ema + (g * z).mean((0, 1))
        expected = (
            norm.weight.detach() * z + norm.bias.detach(),
            g / (v + norm.eps).sqrt(),
            (dy * z).sum((0, 1)),
            dy.sum((0, 1)),
        )
        got = (y.detach(), x.grad, norm.weight.grad, norm.bias.grad)
        torch.testing.assert_close(got, expected, msg=lambda m, t=t: f"step {t}: {m}")
        torch.testing.assert_close(norm.running_phi.flatten(), phi)
        torch.testing.assert_close(norm.ema_gz.flatten(), ema)


def test_group_scaling():
    x = torch.randn(3, 5, 6).double()
    groups = x.unflatten(-1, (2, 3))
    expected = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
    torch.testing.assert_close(group_scaled(x, 2), expected)
    torch.testing.assert_close(group_scaled(x.movedim(-1, 1), 2, 1), expected.movedim(-1, 1))


def test_the_first_form_has_the_exact_gradient():
    norm = layer(groups=None, variant="PN-V")
    x = torch.randn(5, 3, C).double().requires_grad_()
    dy = torch.randn(5, 3, C).double()

    def channel_rms(x, weight, bias):
        return x / (x.square().mean((0, 1)) + norm.eps).sqrt() * weight + bias

    given = (x, norm.weight, norm.bias)
    got = torch.autograd.grad(norm(x), given, dy)
    torch.testing.assert_close(got, torch.autograd.grad(channel_rms(*given), given, dy))
    assert norm.iters.item() == 1
    assert (norm.running_phi != 1).all()


def test_batch_first_and_images():
    time_first = layer(groups=2)
    others = {}
    for name in ("batch_first", "images"):
        others[name] = copy.deepcopy(time_first)
    others["batch_first"].batch_first = True
    others["images"].channel_dim = 1
    x, mask = torch.randn(5, 3, C).double(), torch.rand(3, 5) < 0.3
    y = time_first(x, mask)
    torch.testing.assert_close(others["batch_first"](x.transpose(0, 1), mask), y.transpose(0, 1))
    torch.testing.assert_close(
        others["images"](x.movedim(-1, 1).unsqueeze(-1))[..., 0].movedim(1, -1),
        copy.deepcopy(time_first)(x),
    )


def test_state_advances_once():
    norm = layer()
    x = torch.randn(5, 3, C).double()
    y = norm(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert norm.iters.item() == 1
    with torch.no_grad():
        norm(x)
    assert norm.iters.item() == 2


def test_released_state():
    state = PowerNorm(C).state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "weight": ((C,), torch.float32),
        "bias": ((C,), torch.float32),
        "running_phi": ((1, C, 1, 1), torch.float32),
        "ema_gz": ((1, C, 1, 1), torch.float32),
        "iters": ((1,), torch.int64),
    }


@pytest.mark.parametrize("shape", [(1, C), (1, 1, C), (0, C)])
def test_one_token_or_none(shape):
    norm = layer(warmup_steps=1)
    for _ in range(3):
        norm(torch.randn(shape).double()).sum().backward()
        assert norm.running_phi.isfinite().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="number of groups that divides 4 channels, got 3"):
        PowerNorm(C, groups=3)
    with pytest.raises(ValueError, match="expected variant 'PN' or 'PN-V', got 'PN-W'"):
        PowerNorm(C, variant="PN-W")


@pytest.mark.inductor
def test_inductor():
    model = nn.Sequential(PowerNorm(C, warmup_steps=3), nn.Linear(C, C), nn.GELU(), PowerNorm(C))
    other = copy.deepcopy(model)
    fast = torch.compile(other, fullgraph=True)
    for _ in range(6):
        x = torch.randn(5, 3, C)
        y, z = model(x), fast(x)
        torch.testing.assert_close(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
