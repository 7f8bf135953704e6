"""One optimizer step of small models: losses, gradients, updated weights and buffers within the contract."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from assertions import (
    assert_agrees,
    assert_gradients_within_contract,
    assert_within_contract,
    compiled,
)
from models import Block, roughened
from torch import nn
from torch.utils.checkpoint import checkpoint

import normfx


class SmallGPT2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=101,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens):
        return self.model(tokens).logits


def tokens():
    return torch.randint(0, 101, (4, 16), generator=torch.Generator().manual_seed(4))


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.first_norm(self.first(x)))
        x = F.relu(x + self.second_norm(self.second(y)))
        return self.head(x.mean((2, 3)))


class CheckpointedTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


CASES = {
    "gpt2": (SmallGPT2, tokens, 5),
    "cnn": (ResidualCNN, lambda: torch.randn(4, 3, 10, 10), 3),
    "checkpoint": (CheckpointedTransformer, lambda: torch.randn(32, 16), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    make, inputs, norms = CASES[case]
    assert_agrees(roughened(make()), inputs(), grad=True)
    assert len(normfx.report().sites) == norms
    assert normfx.report().graphs[0].training


@pytest.mark.parametrize("case", CASES)
def test_inference(case):
    make, inputs, norms = CASES[case]
    assert_agrees(roughened(make()).eval(), inputs())
    assert len(normfx.report().sites) == norms


def step(model, call, x):
    """One step of SGD, whose update is linear in the gradient (Adam's is its sign, which magnifies noise)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = call(x).double().square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("case", CASES)
def test_one_step(case):
    make, inputs, _ = CASES[case]
    eager = roughened(make())
    got, exact, x = copy.deepcopy(eager), copy.deepcopy(eager).double(), inputs()
    step(got, compiled(got), x)
    step(eager, eager, x)
    step(exact, exact, x.double() if x.is_floating_point() else x)
    assert_gradients_within_contract(got, eager, exact)
    for (name, mine), theirs, truth in zip(
        got.state_dict().items(),
        eager.state_dict().values(),
        exact.state_dict().values(),
        strict=True,
    ):
        assert_within_contract(mine, theirs, truth, what=name)


@pytest.mark.inductor
@pytest.mark.parametrize("case", CASES)
def test_one_step_through_inductor(case):
    """Inductor adds up in another order than eager; the contract then is with the worse of the two."""
    make, inputs, _ = CASES[case]
    eager = roughened(make())
    got, exact, plain = copy.deepcopy(eager), copy.deepcopy(eager).double(), copy.deepcopy(eager)
    x = inputs()
    step(got, compiled(got, lowering="inductor"), x)
    torch._dynamo.reset()
    step(plain, torch.compile(plain, backend="inductor"), x)
    step(eager, eager, x)
    step(exact, exact, x.double() if x.is_floating_point() else x)
    scale = max(p.grad.abs().max().item() for p in exact.parameters())
    parts = (model.named_parameters() for model in (got, eager, plain, exact))
    for (name, mine), (_, theirs), (_, inductors), (_, truth) in zip(*parts, strict=True):
        baseline = worse(theirs.grad, inductors.grad, truth.grad)
        assert_within_contract(mine.grad, baseline, truth.grad, scale=scale, what=f"grad of {name}")
    parts = (model.named_buffers() for model in (got, eager, plain, exact))
    for (name, mine), (_, theirs), (_, inductors), (_, truth) in zip(*parts, strict=True):
        assert_within_contract(mine, worse(theirs, inductors, truth), truth, what=name)


def worse(first, second, exact):
    """Whichever of two results is further from the exact one."""
    errors = [(value.double() - exact.double()).abs().max() for value in (first, second)]
    return first if errors[0] >= errors[1] else second


def test_running_statistics_after_several_batches():
    eager = roughened(ResidualCNN())
    got, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    fast = compiled(got)
    for _ in range(3):
        x = torch.randn(4, 3, 10, 10)
        for call, given in ((fast, x), (eager, x), (exact, x.double())):
            call(given).sum().backward()
    for (name, mine), theirs, truth in zip(
        got.named_buffers(), eager.buffers(), exact.buffers(), strict=True
    ):
        assert_within_contract(mine, theirs, truth, what=name)


def test_train_then_eval():
    model, x = roughened(ResidualCNN()), torch.randn(16, 3, 10, 10)
    fast = compiled(model)
    for _ in range(2):
        model.train()
        fast(x).sum().backward()
        model.eval()
        with torch.no_grad():
            assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))


def test_frozen_backbone():
    """Gradients only for the head: the backbone's norms are part of a differentiated graph all the same."""
    model = roughened(CheckpointedTransformer())
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    assert_agrees(model, torch.randn(32, 16), grad=True)
