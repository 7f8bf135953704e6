"""UnifiedNorm beside its definition, written out with Python's own branches, and its hard cases."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normfx.nn import UnifiedNorm

C = 4


class Definition:
    """The released algorithm, one step after the other (tokens last but for the channels)."""

    def __init__(self, window, warmup, filtration, eps=1e-5, momentum=0.9):
        self.forward_window, self.backward_window = window
        self.warmup, self.filtration, self.eps, self.momentum = warmup, filtration, eps, momentum
        self.t, self.skipped = 0, 0
        self.running_var, self.ema_gz = torch.ones(C).double(), torch.zeros(C).double()
        self.x2 = torch.zeros(self.forward_window, C).double()
        self.gz = torch.zeros(self.backward_window, C).double()

    def step(self, x, dy, weight, bias, mask):
        self.t += 1
        counted = x[~mask]
        m = counted.square().mean(0)
        spread = self.x2.sqrt().flatten().var() if self.x2.numel() > 1 else torch.tensor(0.0)
        slot = self.t % self.forward_window
        self.x2[slot] = m
        skip = self.forward_window == 1
        geometric = self.x2.log().mean(0).exp()
        if self.filtration and self.t >= self.warmup and self.forward_window > 1:
            if bool((self.x2.mean(0) - geometric > self.forward_window * spread).any()):
                self.x2[slot] = self.running_var
                self.skipped += 1
                skip = True
        smooth = self.t > self.forward_window and self.t >= self.warmup and not skip
        v = geometric if smooth else m
        rho = torch.ones(C).double()
        if self.t > max(1000, self.warmup) and not skip:
            rho = ((v + self.eps) / (self.running_var + self.eps)).sqrt().clamp(0.2, 5.0)
        z = x / (v + self.eps).sqrt()
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * v
        g = dy * weight * rho
        dims = tuple(range(x.dim() - 1))
        q = (g * z).mean(dims)
        self.gz[self.t % self.backward_window] = self.ema_gz if skip else q
        smooth = self.t > self.backward_window and self.t >= self.warmup and not skip
        now = self.gz.mean(0) if smooth else q
        self.ema_gz = self.momentum * self.ema_gz + (1 - self.momentum) * now
        psi = now if skip else self.ema_gz
        dx = (g - psi * z) / (v + self.eps).sqrt()
        return weight * z + bias, dx, (dy * rho * z).sum(dims), dy.sum(dims)


def layer(**options):
    made = UnifiedNorm(C, **options).double()
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    return made


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("filtration", [False, True])
@pytest.mark.parametrize("start", [0, 996])
def test_definition(window, filtration, start):
    norm = layer(window=window, warmup_steps=6, outlier_filtration=filtration)
    truth = Definition(window, 6, filtration)
    truth.t = start
    norm.iters.fill_(start)
    if start:  # no slot of a window is empty by then
        filled = torch.rand(window[0], C).double() + 0.5
        norm.buffer_x2.copy_(filled)
        truth.x2.copy_(filled)
    for index in range(25):
        x = torch.randn(2, 5, C).double() * (9 if index in (8, 17) else 1)
        x.requires_grad_()
        dy = torch.randn(2, 5, C).double()
        mask = torch.rand(2, 5) < 0.3
        norm.zero_grad()
        y = norm(x, mask)
        y.backward(dy)
        expected = truth.step(x.detach(), dy, norm.weight.detach(), norm.bias.detach(), mask)
        got = (y.detach(), x.grad, norm.weight.grad, norm.bias.grad)
        torch.testing.assert_close(got, expected, msg=lambda m, i=index: f"step {i}: {m}")
    state = (norm.running_var, norm.ema_gz, norm.buffer_x2, norm.buffer_gz)
    torch.testing.assert_close(state, (truth.running_var, truth.ema_gz, truth.x2, truth.gz))
    assert norm.iters.item() == truth.t
    assert norm.skip_counter.item() == truth.skipped
    assert not filtration or window[0] == 1 or truth.skipped


def test_window_of_one_has_the_exact_gradient():
    norm = layer(window=1)
    x = torch.randn(3, 5, C).double().requires_grad_()

    def channel_rms(x, weight, bias):
        return x / (x.square().mean((0, 1)) + norm.eps).sqrt() * weight + bias

    dy = torch.randn(3, 5, C).double()
    given = (x, norm.weight, norm.bias)
    got = torch.autograd.grad(norm(x), given, dy)
    torch.testing.assert_close(got, torch.autograd.grad(channel_rms(*given), given, dy))


def test_evaluation_is_a_constant_affine():
    norm = layer().eval()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 5, C).double()
    expected = x / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)
    before = copy.deepcopy(norm.state_dict())
    norm(x).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def test_images_are_tokens_with_the_channels_elsewhere():
    tokens = layer(warmup_steps=2, window=2)
    images = copy.deepcopy(tokens)
    images.channel_dim = 1
    for _ in range(5):
        x = torch.randn(2, C, 3, 5).double().requires_grad_()
        flat = x.detach().movedim(1, -1).flatten(1, 2).requires_grad_()
        y, z = images(x), tokens(flat)
        torch.testing.assert_close(y.movedim(1, -1).flatten(1, 2), z)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(x.grad.movedim(1, -1).flatten(1, 2), flat.grad)
    torch.testing.assert_close(images.state_dict(), tokens.state_dict())


def test_state_advances_at_once_where_no_gradient_is_asked_for():
    frozen = layer().requires_grad_(False)
    x = torch.randn(2, 5, C).double()
    frozen(x)
    assert frozen.iters.item() == 1
    other = layer()
    with torch.no_grad():
        other(x)
    assert other.iters.item() == 1
    torch.testing.assert_close(other.running_var, frozen.running_var)


def test_a_second_backward_pass_of_one_forward_pass_is_no_second_batch():
    norm = layer()
    once = copy.deepcopy(norm)
    x = torch.randn(2, 5, C).double()
    y = norm(x)
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    once(x).sum().backward()
    for name in ("iters", "running_var", "buffer_x2", "skip_counter"):
        torch.testing.assert_close(getattr(norm, name), getattr(once, name))


@pytest.mark.parametrize("compiled", [False, True])
def test_two_forward_passes_before_a_backward_pass_are_two_batches(compiled):
    norm = layer(warmup_steps=100)
    apart = copy.deepcopy(norm)
    call = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
    first, second = torch.randn(2, 2, 5, C).double()
    # The engine runs the last forward pass backward first.
    (call(first).sum() + call(second).square().sum()).backward()
    apart(second).square().sum().backward()
    apart(first).sum().backward()
    torch.testing.assert_close(norm.state_dict(), apart.state_dict())
    assert norm.iters.item() == 2


def test_differentiated_once():
    x = torch.randn(2, 5, C).double().requires_grad_()
    (dx,) = torch.autograd.grad(layer()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_dead_channel_and_its_floor():
    plain = layer(window=2, warmup_steps=0)
    floored = layer(window=2, warmup_steps=0, moment_floor=1e-3)
    for norm, floor in ((plain, 0.0), (floored, 1e-3)):
        for dead in (False, False, True, False):
            x = torch.ones(1, 5, C).double()
            x[..., 0] *= not dead
            y = norm(x.requires_grad_())
            assert y.isfinite().all()
            y.sum().backward()
            assert x.grad.isfinite().all()
        # The window is (0, 1): its geometric mean is 0, or the root of the floor.
        scale = (floor**0.5 + norm.eps) ** -0.5
        torch.testing.assert_close(y[0, 0, 0], norm.weight[0] * scale + norm.bias[0])


@pytest.mark.parametrize("shape", [(1, C), (1, 1, C), (0, C), (2, 0, C)])
def test_one_token_or_none(shape):
    norm = layer(warmup_steps=2, window=2, outlier_filtration=True)
    for _ in range(4):
        x = torch.randn(shape).double().requires_grad_()
        y = norm(x)
        y.sum().backward()
        assert y.shape == shape
        assert norm.running_var.isfinite().all()
    if 0 in shape:
        torch.testing.assert_close(norm.running_var, torch.ones(C).double())


def test_padding_alone_changes_no_statistic_and_what_is_padded_does_not_matter():
    norm = layer()
    x = torch.randn(2, 5, C).double()
    norm(x, torch.ones(2, 5, dtype=torch.bool)).sum().backward()
    torch.testing.assert_close(norm.running_var, torch.ones(C).double())
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3:] = True
    spoilt = torch.where(mask.unsqueeze(-1), torch.nan, x)
    first, second = copy.deepcopy(norm), copy.deepcopy(norm)
    with torch.no_grad():
        torch.testing.assert_close(first(x, mask)[:, :3], second(spoilt, mask)[:, :3])
    torch.testing.assert_close(first.state_dict(), second.state_dict())


def test_the_printed_criterion_of_the_paper_never_holds():
    """AM - GM <= M * Var(sqrt), of one sample: what the paper prints, and why the code differs."""
    for size, _ in itertools.product((2, 3, 8), range(200)):
        window = torch.rand(size, C).double().exp() ** 5
        gap = window.mean(0) - window.log().mean(0).exp()
        # Two numbers give equality, so rounding decides: it is relative to what is subtracted.
        rounding = 1e-14 * window.sum(0)
        assert (gap <= size * window.sqrt().var(0, correction=0) + rounding).all()


def test_checkpoint_of_another_window_loads():
    old = layer(window=4)
    for _ in range(6):
        old(torch.randn(2, 5, C).double().requires_grad_()).square().sum().backward()
    new = layer(window=(2, 3))
    new.load_state_dict(old.state_dict(), strict=True)
    torch.testing.assert_close(new.buffer_x2, old.running_var.expand(2, C))
    torch.testing.assert_close(new.buffer_gz, old.ema_gz.expand(3, C))
    with pytest.raises(RuntimeError, match="size mismatch"):
        UnifiedNorm(C + 1).load_state_dict(old.state_dict())


def test_released_state():
    state = UnifiedNorm(C, window=(3, 5)).state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "weight": ((C,), torch.float32),
        "bias": ((C,), torch.float32),
        "running_var": ((C,), torch.float32),
        "ema_gz": ((C,), torch.float32),
        "iters": ((1,), torch.int64),
        "buffer_x2": ((3, C), torch.float32),
        "buffer_gz": ((5, C), torch.float32),
        "skip_counter": ((1,), torch.int64),
    }


def test_restart_of_the_warmup():
    norm = layer()
    norm(torch.randn(2, 5, C).double().requires_grad_()).sum().backward()
    norm.restart_warmup()
    assert norm.iters.item() == 0
    assert (norm.running_var != 1).all()


def test_bad_arguments():
    for arguments in (
        {"channels": 0},
        {"channels": 4, "window": 0},
        {"channels": 4, "window": (4, 0)},
    ):
        with pytest.raises(ValueError, match="at least one channel and windows of at least 1"):
            UnifiedNorm(**arguments)
    with pytest.raises(ValueError, match=r"expected 4 channels in dim -1 .* got .*\(4,\)"):
        layer()(torch.randn(4))


class Shared(nn.Module):
    """One norm, twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.norm = layer(window=2, warmup_steps=3)
        self.linear = nn.Linear(C, C).double()

    def forward(self, x):
        return self.norm(self.linear(torch.tanh(self.norm(x))))


def test_a_shared_norm_counts_both_calls_however_it_runs():
    model = Shared()
    inside = copy.deepcopy(model)
    outside = copy.deepcopy(model)
    graph = torch.compile(outside, backend="aot_eager", fullgraph=True)
    ways = {
        "inside": (inside, lambda x: checkpoint(inside, x, use_reentrant=False)),
        "around a graph": (outside, lambda x: checkpoint(graph, x, use_reentrant=False)),
    }
    for _ in range(6):
        x = torch.randn(2, 5, C).double()
        model(x.requires_grad_()).square().sum().backward()
        for name, (other, call) in ways.items():
            call(x).square().sum().backward()
            torch.testing.assert_close(other.state_dict(), model.state_dict(), msg=name)
    assert model.norm.iters.item() == 12


@pytest.mark.inductor
def test_inductor():
    model = Shared().float()
    other = copy.deepcopy(model)
    fast = torch.compile(other, fullgraph=True)
    for index in range(8):
        x = torch.randn(2, 5, C) * (20 if index == 5 else 1)
        y, z = model(x), fast(x)
        torch.testing.assert_close(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
    torch.testing.assert_close(other.state_dict(), model.state_dict())
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_reentrant_checkpoint_counts_a_batch_once():
    norm = layer(warmup_steps=100)
    plain = copy.deepcopy(norm)
    for _ in range(3):
        x = torch.randn(2, 5, C).double().requires_grad_()
        checkpoint(norm, x, use_reentrant=True).square().sum().backward()
        plain(x).square().sum().backward()
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
