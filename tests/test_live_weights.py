"""Folded weights follow the parameters they are made from, whoever changes those and however."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from assertions import STRICT, assert_within_contract, compiled
from models import Block, head, roughened
from torch import nn

import normfx
from normfx.live import LiveWeights


def assert_follows(model, fast, x):
    with torch.no_grad():
        assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))


def folded(model, x, **options):
    fast = compiled(model, **options)
    assert_follows(model, fast, x)
    assert any(site.actions for site in normfx.report().sites), (
        "nothing is folded, so the test would show nothing"
    )
    return fast


def optimizer_step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).square().sum().backward()
    optimizer.step()


def load_copy(model, x):
    model.load_state_dict(head().state_dict() | {"0.weight": torch.full((8,), 3.0)})


def load_assign(model, x):
    model.load_state_dict(
        roughened(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))).state_dict(), assign=True
    )


def set_data(model, x):
    model[0].weight.data = torch.full((8,), 3.0)


def copy_into(model, x):
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4, 8))


def replace_parameter(model, x):
    model[0].bias = nn.Parameter(torch.randn(8))


def write_through_view(model, x):
    with torch.no_grad():
        model[1].weight[0].zero_()


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        load_copy,
        load_assign,
        set_data,
        copy_into,
        replace_parameter,
        write_through_view,
    ],
    ids=lambda change: change.__name__,
)
def test_follows(change):
    model, x = head(), torch.randn(64, 8)
    fast = folded(model, x)
    before = fast(x).detach()
    change(model, x)
    assert_follows(model, fast, x)
    assert not torch.equal(fast(x).detach(), before)
    change(model, x)
    assert_follows(model, fast, x)


def test_set_data_twice_between_calls():
    """The second tensor often gets the memory that the first change gave back: same address, other values."""
    model, x = head(64), torch.randn(64, 64)
    fast = folded(model, x)
    for _ in range(20):
        model[0].weight.data = model[0].weight.data * 1.5
        model[0].weight.data = model[0].weight.data * 0.9
        assert_follows(model, fast, x)


def test_half_and_back():
    model, x = head(64), torch.randn(64, 64)
    fast = folded(model, x)
    for _ in range(5):
        model.half().float()
        assert_follows(model, fast, x)


def test_refold_after_an_untracked_write():
    model, x = head(), torch.randn(64, 8)
    fast = folded(model, x)
    model[0].weight.data.mul_(3)
    normfx.refold(model)
    assert_follows(model, fast, x)


def test_frozen_does_not_look_again():
    model, x = head(), torch.randn(64, 8)
    fast = folded(model, x, weights="frozen")
    with torch.no_grad():
        before = fast(x)
        model[0].weight.mul_(3)
        assert torch.equal(fast(x), before)
    normfx.refold(model)
    assert_follows(model, fast, x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.unembed = nn.Linear(8, 11, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens):
        return self.unembed(self.norm(self.embed(tokens)))


def test_tied_embeddings():
    model, tokens = roughened(Tied()), torch.tensor([[1, 2, 10]])
    fast = compiled(model)
    for _ in range(2):
        with torch.no_grad():
            assert_within_contract(
                fast(tokens), model(tokens), copy.deepcopy(model).double()(tokens)
            )
            model.embed.weight.mul_(1.5)
    assert normfx.report().sites[0].actions == ["fold-affine-into-linear"]
    assert model.unembed.weight is model.embed.weight


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(self.block(x))


def test_a_block_applied_twice():
    model, x = roughened(Twice()), torch.randn(64, 8)
    fast = folded(model, x)
    assert [site.actions for site in normfx.report().sites] == [["fold-affine-into-linear"]] * 2
    with torch.no_grad():
        model.block.norm.weight.add_(1)
    assert_follows(model, fast, x)


class SharedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.second(self.linear(self.first(x)))) + self.linear(x)


def test_a_linear_behind_two_norms_and_none():
    model, x = roughened(SharedLinear()), torch.randn(64, 8)
    model.second.weight.data.mul_(2)
    folded(model, x)


def test_state_dict_is_untouched():
    model, x = roughened(Twice()), torch.randn(64, 8)
    before = {name: (held, held.clone()) for name, held in model.state_dict(keep_vars=True).items()}
    folded(model, x)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (held, values) in before.items():
        assert after[name] is held
        assert torch.equal(held, values)


def test_inference_mode():
    model = head()
    fast = compiled(model)
    with torch.inference_mode():
        x = torch.randn(64, 8)
        got, eager = fast(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert_within_contract(got, eager, exact)
    assert normfx.report().sites[0].actions == ["fold-affine-into-linear"]
    with torch.no_grad():
        model[0].weight.mul_(2)
    with torch.inference_mode():
        assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))


def test_compiled_under_inference_mode_then_called_without():
    model, x = head(), torch.randn(64, 8)
    fast = compiled(model)
    with torch.inference_mode():
        fast(x)
    assert_follows(model, fast, x)
    with torch.no_grad():
        model[1].weight.mul_(2)
    assert_follows(model, fast, x)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model, x = head(), torch.randn(64, 8)
        fast = compiled(model)
        for _ in range(2):
            assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))
            model[0].weight.mul_(2)
    assert normfx.report().sites[0].refusals == ["weight-not-tracked"]


def test_parameters_made_in_inference_mode_fold_when_frozen():
    with torch.inference_mode():
        model, x = head(), torch.randn(64, 8)
        folded(model, x, weights="frozen")


def test_training_after_inference():
    model, x = head(), torch.randn(64, 8)
    fast = folded(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        fast(x).square().sum().backward()
        assert model[0].weight.grad.abs().max() > 0
        optimizer.step()
        assert_follows(model, fast, x)


def test_a_result_that_is_a_hoisted_tensor_belongs_to_the_caller():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x + 1, self.weight * 3

    model, x = Scaled(), torch.ones(4)
    fast = compiled(model)
    with torch.no_grad():
        mine = fast(x)[1]
        mine.zero_()
        assert torch.equal(fast(x)[1], model(x)[1])
        kept = fast(x)[1]
        model.weight.mul_(2)
        fast(x)
        assert torch.equal(kept, torch.full((4,), 3.0))


def test_hoisted_tensors_keep_their_strides():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x + (self.weight.t() * 2).t().view(24)

    model, x = Transposed(), torch.ones(24)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))


def test_random_numbers_are_not_hoisted():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return x + nn.functional.dropout(self.weight, 0.5, True)

    fast = compiled(Dropped())
    with torch.no_grad():
        assert not torch.equal(fast(torch.zeros(64)), fast(torch.zeros(64)))


def test_gradients_wanted_inside_no_grad():
    class Enabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()

        def forward(self, x):
            with torch.enable_grad():
                return self.head(x)

    model, x = Enabled(), torch.randn(64, 8)
    fast = compiled(model)
    with torch.no_grad():
        got, eager = fast(x), model(x)
    assert eager.requires_grad
    assert got.requires_grad
    got.square().sum().backward()
    mine = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    eager.square().sum().backward()
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    with torch.no_grad():
        result = exact(x.double())
    result.square().sum().backward()
    for got_grad, parameter, truth in zip(
        mine, model.parameters(), exact.parameters(), strict=True
    ):
        assert_within_contract(got_grad, parameter.grad, truth.grad)


def test_buffers_that_the_model_updates_between_calls():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()
            self.register_buffer("factor", torch.ones(8))

        def forward(self, x):
            y = self.head[1](self.head[0](x) * (self.factor * 2))
            self.factor.add_(1)
            return y

    model, x = Counter(), torch.randn(64, 8)
    eager = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    fast = compiled(model)
    with torch.no_grad(), warnings.catch_warnings():
        for _ in range(3):
            assert_within_contract(fast(x), eager(x), exact(x.double()))


# Dynamo runs the code that it compiled for one module for every other one that its guards admit. These tests assert
# that there is one graph: with code of its own for each module they would show nothing.


@pytest.fixture
def runs(monkeypatch):
    """The parameters of each time that hoisted tensors were computed."""
    made = []
    run = LiveWeights._run

    def counted(self, tensors):
        made.append(tensors)
        return run(self, tensors)

    monkeypatch.setattr(LiveWeights, "_run", counted)
    return made


def scaled_head(factor):
    model = head(64, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def two_of_one_class():
    """Two models, and one function that is compiled once for both."""
    models = [scaled_head(1.0), scaled_head(-2.5)]

    @torch.compile(backend="normfx", options=STRICT)
    def fast(model, x):
        return model(x)

    return models, fast


def test_two_models_of_one_class_in_turn(runs):
    models, fast = two_of_one_class()
    x = torch.randn(64, 64)
    for _ in range(3):
        for model in models:
            assert_follows(model, lambda x, model=model: fast(model, x), x)
    assert len(normfx.report().graphs) == 1, "compiled twice, so the test would show nothing"
    assert len(runs) == 2


def test_a_change_of_one_of_two_models(runs):
    models, fast = two_of_one_class()
    x = torch.randn(64, 64)
    for changed in (*models, *reversed(models)):
        with torch.no_grad():
            changed[0].weight.mul_(1.5)
        for model in (*models, *models):
            assert_follows(model, lambda x, model=model: fast(model, x), x)
    assert len(normfx.report().graphs) == 1
    assert len(runs) == 2 + 3


@pytest.mark.parametrize(
    "lowering", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_two_models_of_one_class_at_the_same_time(lowering):
    models = [scaled_head(1.0), scaled_head(-2.5)]
    x = torch.randn(64, 64)

    @torch.compile(backend="normfx", options={"lowering": lowering, "strict": True})
    def fast(model, x):
        return model(x)

    with torch.no_grad():
        wanted = [fast(model, x) for model in models]
        for got, model in zip(wanted, models, strict=True):
            assert_within_contract(got, model(x), copy.deepcopy(model).double()(x.double()))
    assert len(normfx.report().graphs) == 1
    start, wrong = threading.Barrier(2), []

    def call(model, expected):
        start.wait()
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(fast(model, x), expected):
                    wrong.append(model)

    threads = [
        threading.Thread(target=call, args=pair) for pair in zip(models, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_result_does_not_change_with_the_next_model():
    models, fast = two_of_one_class()
    x = torch.randn(64, 64)
    with torch.no_grad():
        first = fast(models[0], x)
        kept = first.clone()
        fast(models[1], x)
    assert torch.equal(first, kept)


def test_hoisted_tensors_go_with_their_model(monkeypatch):
    models, fast = two_of_one_class()
    x = torch.randn(64, 64)
    hoisted = []
    refreshed = LiveWeights._refreshed

    def watched(self, args):
        made = refreshed(self, args)
        hoisted.append([weakref.ref(tensor) for tensor in made.hoisted])
        return made

    monkeypatch.setattr(LiveWeights, "_refreshed", watched)
    with torch.no_grad():
        for model in models:
            fast(model, x)
    first, second = hoisted
    assert all(tensor() is not None for tensor in (*first, *second))
    del models[0], model
    gc.collect()
    assert all(tensor() is None for tensor in first)
    assert all(tensor() is not None for tensor in second)
    assert_follows(models[0], lambda x: fast(models[0], x), x)
    del models[0]
    gc.collect()
    assert all(tensor() is None for tensor in second)


def test_models_that_come_and_go(runs):
    """A new model often gets the addresses of the old one."""
    x = torch.randn(64, 64)
    _, fast = two_of_one_class()
    for factor in range(1, 9):
        model = scaled_head(float(factor))
        assert_follows(model, lambda x, model=model: fast(model, x), x)
        del model
        gc.collect()
    assert len(runs) == 8


class Stack(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(roughened(Block(64)) for _ in range(depth))
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                block.norm.weight.mul_(index + 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def in_place(block):
    block.compile(backend="normfx", options=STRICT)
    return block


@pytest.mark.parametrize(
    "compile_block", [in_place, compiled], ids=["block.compile", "torch.compile"]
)
def test_a_repeated_block_compiled_by_itself(compile_block, runs):
    model, x = Stack(), torch.randn(64, 64)
    plain = copy.deepcopy(model)
    model.blocks = nn.ModuleList(compile_block(block) for block in model.blocks)
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        for _ in range(3):
            assert_within_contract(model(x), plain(x), exact(x.double()))
        assert len(normfx.report().graphs) == 1, "compiled anew for each block"
        assert len(runs) == len(plain.blocks)
        changed, theirs, truth = (
            [p for n, p in m.named_parameters() if n.endswith("norm.weight")][2]
            for m in (model, plain, exact)
        )
        for parameter in (changed, theirs, truth):
            parameter.mul_(2)
        for _ in range(2):
            assert_within_contract(model(x), plain(x), exact(x.double()))
        assert len(runs) == len(plain.blocks) + 1
    assert all(site.actions for site in normfx.report().sites)


def test_on_the_meta_device():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).to("meta")
    with torch.no_grad():
        got = compiled(model)(torch.empty(2, 4, device="meta"))
    assert got.shape == (2, 3)
    assert normfx.report().sites[0].actions
