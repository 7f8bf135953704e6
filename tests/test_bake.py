"""Bake: the eager model computes the same with norms that are neutral, from weights of which there is one copy."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_within_contract, tensors_of
from assertions import compiled as compiled_with_all_rules
from models import Block, head, roughened
from torch import nn
from torch.nn.utils import parametrizations

import normfx
from normfx import bake as baking

DROP, FOLD, FOLD_BACK = "drop-baked", "fold-affine-into-linear", "fold-statistics-into-previous"


def snapshot(model):
    return {name: held.clone() for name, held in model.state_dict().items()}


def same(state, other):
    return list(state) == list(other) and all(
        torch.equal(state[name], other[name]) and state[name].dtype == other[name].dtype
        for name in state
    )


def assert_baked(model, *inputs, exact_undo=False, **options):
    """Bakes a model, and holds everything that is promised of it. Returns the record."""
    model.eval()
    original = copy.deepcopy(model)
    owners = {name: held for name, held in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        eager = tensors_of(original(*inputs))
        exact = tensors_of(copy.deepcopy(original).double()(*map(widened, inputs)))
    baked = normfx.bake_(model, exact_undo=exact_undo, **options)(*inputs)
    with torch.no_grad():
        for got, was, truth in zip(tensors_of(model(*inputs)), eager, exact, strict=True):
            assert_within_contract(got, was, truth)
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(owners)
        if not options.get("clone"):
            assert all(after[name] is held for name, held in owners.items())
            fresh = copy.deepcopy(original)
            fresh.load_state_dict(model.state_dict())
            for got, was in zip(
                tensors_of(fresh(*inputs)), tensors_of(model(*inputs)), strict=True
            ):
                assert torch.equal(got, was)
        fast = compiled(model)
        for got, was, truth in zip(tensors_of(fast(*inputs)), eager, exact, strict=True):
            assert_within_contract(got, was, truth)
    return baked


def widened(given):
    return given.double() if given.is_floating_point() else given


# `bake_` writes what these rules fold. `recentre` copies the weights that it centres.
FOLDS = ("drop-baked", "fold-statistics-into-previous", "fold-affine-into-linear", "hoist")


def compiled(model, **options):
    return compiled_with_all_rules(model, **{"rules": FOLDS, **options})


def folded_bytes():
    return sum(graph.folded_bytes for graph in normfx.report().graphs)


def assert_undone(model, baked, before, *, exact=False):
    baked.undo()
    after = model.state_dict()
    assert list(after) == list(before)
    for name, was in before.items():
        now = after[name]
        if exact or was.dim() < 2:
            assert torch.equal(now, was), name
        else:
            ulp = torch.finfo(was.dtype).eps * was.double().abs()
            assert ((now.double() - was.double()).abs() <= ulp).all(), name


# ------------------------------------------------------------------- models


class Residual(nn.Module):
    """A ResNet's block: convolutions without bias, each with its BatchNorm."""

    def __init__(self, width=8, groups=1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False, groups=groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1, bias=True)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(),
        Residual(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def mobilenet():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16, eps=1e-3),
        nn.Hardswish(),
        nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.BatchNorm2d(16, eps=1e-3),
        nn.Hardswish(),
        nn.Conv2d(16, 8, 1, bias=False),
        nn.BatchNorm2d(8, eps=1e-3),
    )


class Attention(nn.Module):
    def __init__(self, width=8, bias=True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(Attention(), Attention())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2)))[:, 0])


IMAGE, TOKENS = (16, 3, 8, 8), (16, 5, 8)
MODELS = {
    "resnet": (resnet, IMAGE, 5),
    "mobilenet": (mobilenet, IMAGE, 3),
    "transformer": (lambda: nn.Sequential(Attention(), Attention()), TOKENS, 4),
    "vit": (ViT, IMAGE, 5),
    "grouped": (lambda: Residual(groups=4), (16, 8, 6, 6), 2),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(8, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4)),
        (16, 8, 5, 5),
        1,
    ),
    "two-norms": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)),
        (64, 8),
        2,
    ),
    "both-sides": (
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.BatchNorm1d(6)),
        (64, 8),
        2,
    ),
    "both-sides-of-a-convolution": (
        lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.Conv1d(8, 6, 1), nn.BatchNorm1d(6)),
        (16, 8, 5),
        2,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, shape, norms = MODELS[name]
    model, x = roughened(make()), torch.randn(shape)
    before = snapshot(model)
    baked = assert_baked(model, x)
    assert len(baked.sites) == norms
    assert sum(bool(site.actions) for site in baked.sites) == norms
    assert folded_bytes() == 0
    assert all(DROP in site.actions for site in normfx.report().sites)
    assert_undone(model, baked, before)


class Stream(nn.Module):
    """A residual stream that only LayerNorms read: what writes it could be centred."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(self.last(x))


def test_a_baked_model_is_not_centred_unless_that_is_asked_for():
    model, x = roughened(Stream()), torch.randn(5, 6)
    assert_baked(model, x, exact_undo=True)
    normfx.reset()
    with torch.no_grad():
        compiled_with_all_rules(model)(x)
    assert folded_bytes() == 0
    sites = normfx.report().sites
    assert all("weights-baked" in s.refusals and "recentre" not in s.actions for s in sites)
    normfx.reset()
    with torch.no_grad():
        compiled_with_all_rules(model, rules=["recentre", "drop-baked", "hoist"])(x)
    assert all("recentre" in site.actions for site in normfx.report().sites)
    assert folded_bytes() > 0


@pytest.mark.parametrize("name", MODELS)
def test_models_in_bfloat16(name):
    make, shape, _ = MODELS[name]
    model, x = roughened(make()).bfloat16(), torch.randn(shape).bfloat16()
    before = snapshot(model)
    baked = assert_baked(model, x)
    if name == "mobilenet":  # 1 - 1e-3 is no number of bfloat16
        assert all("parameter-computed" in site.refusals for site in baked.sites)
    else:
        assert folded_bytes() == 0
    assert_undone(model, baked, before)


def test_neutral_values():
    model = roughened(resnet()).eval()
    normfx.bake_(model)(torch.randn(IMAGE))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones(8)), name
            assert torch.equal(module.running_mean, torch.zeros(8))
            assert torch.equal(module.running_var + module.eps, torch.ones(8))
            assert module.num_batches_tracked == 0
            without_bias = name != "3.bn2" and name != "4.bn2"
            assert bool(module.bias.abs().max() > 0) == without_bias


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_transformers(family):
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=31, n_positions=8, n_embd=8, n_layer=2, n_head=2, use_cache=False
        )
        model = GPT2LMHeadModel(config)
    elif family == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=31,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
    else:
        from transformers import GemmaConfig, GemmaForCausalLM

        config = GemmaConfig(
            vocab_size=31,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            use_cache=False,
        )
        model = GemmaForCausalLM(config)
    model, tokens = roughened(model.eval()), torch.randint(31, (4, 8))
    before = snapshot(model)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens).logits

    baked = assert_baked(Logits(), tokens)
    refused = [code for site in baked.sites for code in site.refusals]
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    untold = {"gpt2": ["reader-without-bias"], "llama": [], "gemma": ["parameter-shared"]}
    assert refused == untold[family]
    assert sum(bool(site.actions) for site in baked.sites) == 5 - tied
    assert_undone(model, baked, before)


# ------------------------------------------------------------------- memory


def held_bytes(model):
    """The memory of all tensors of this process that are as large as a weight of the model."""
    least = min(p.numel() for p in model.parameters() if p.dim() > 1)
    found = {}
    for held in gc.get_objects():
        if type(held) in (torch.Tensor, nn.Parameter) and held.numel() >= least:
            found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(found.values())


def test_one_copy_of_each_weight():
    model, x = roughened(ViT()).eval(), torch.randn(1, 3, 8, 8)
    small = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() < 2)
    with torch.no_grad():
        model(x)
        gc.collect()
        before = held_bytes(model)
        baked = normfx.bake_(model)(x)
        gc.collect()
        assert held_bytes(model) == before
        fast = compiled(model)
        fast(x)
        gc.collect()
        assert held_bytes(model) == before
    assert baked.bytes <= small


def test_without_folds_nothing_is_copied_either():
    model, x = head().eval(), torch.randn(16, 8)
    normfx.bake_(model)(x)
    with torch.no_grad():
        compiled(model, rules=["hoist"])(x)
    assert folded_bytes() == 0
    assert normfx.report().sites[0].refusals == ["rule-off"]


# ------------------------------------------------------------------- what is refused


def codes(model, *inputs, **options):
    """The refusals of a model that stays as it is."""
    model.eval()
    before = snapshot(model)
    baked = normfx.bake_(model, **options)(*inputs)
    assert same(model.state_dict(), before)
    assert not any(site.actions for site in baked.sites)
    return [code for site in baked.sites for code in site.refusals]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8, bias=False)
        self.unembed = nn.Linear(8, 11, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens):
        return self.unembed(self.norm(self.embed(tokens)))


class Function(nn.Module):
    """A norm, two linear layers, and what is done with them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.plain = torch.randn(8, 8)
        self.register_buffer("passing", torch.randn(8, 8), persistent=False)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


REFUSED = {
    "reader-twice": (lambda m, x: m.a(m.norm(x)) + m.a(x), "parameter-shared"),
    "bias-twice": (lambda m, x: m.a(m.norm(x)) + m.a.bias, "parameter-shared"),
    "norm-twice": (lambda m, x: m.a(m.norm(x)) + m.b(m.norm(x + 1)), "parameter-shared"),
    "norm-weight-read": (lambda m, x: m.a(m.norm(x)) + m.norm.weight, "parameter-shared"),
    "computed": (lambda m, x: F.linear(m.norm(x), m.a.weight * 2, m.a.bias), "parameter-computed"),
    "part": (lambda m, x: F.linear(m.norm(x), m.a.weight[:4]), "reader-without-bias"),
    "part-with-bias": (
        lambda m, x: F.linear(m.norm(x), m.a.weight[:4], m.a.bias[:4]),
        "parameter-computed",
    ),
    "plain-tensor": (lambda m, x: F.linear(m.norm(x), m.plain, m.a.bias), "parameter-computed"),
    "not-saved": (lambda m, x: F.linear(m.norm(x), m.passing, m.a.bias), "parameter-computed"),
    "without-bias": (lambda m, x: F.linear(m.norm(x), m.a.weight), "reader-without-bias"),
    "without-bias-2": (
        lambda m, x: m.a(y := m.norm(x)) + F.linear(y, m.b.weight),
        "reader-without-bias",
    ),
    "scaled-norm": (
        lambda m, x: m.a(F.layer_norm(x, (8,), m.norm.weight * 2, m.norm.bias)),
        "parameter-computed",
    ),
    "residual": (lambda m, x: x + m.norm(x), "reader-not-linear"),
    "returned": (lambda m, x: (m.a(y := m.norm(x)), y), "extra-user"),
    "cast": (
        lambda m, x: F.linear(m.norm(x), m.a.weight.double().float(), m.a.bias),
        "parameter-computed",
    ),
    "expanded": (
        lambda m, x: F.linear(m.norm(x), m.a.weight[:1].expand(8, 8), m.a.bias),
        "parameter-computed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, code = REFUSED[name]
    model = roughened(Function(function))
    assert set(codes(model, torch.randn(16, 8))) == {code}


def test_a_block_with_two_norms_is_refused():
    model = roughened(Function(lambda m, x: m.a(m.norm(x)) + m.a(m.norm2(x + 1))))
    assert codes(model, torch.randn(16, 8)) == ["parameter-shared"] * 2


@pytest.mark.parametrize("clone", [False, True])
def test_a_shared_block_is_refused(clone):
    from passes.test_hoist import WideNet

    model = roughened(WideNet())
    assert codes(model, torch.randn(4, 5, 8), clone=clone) == ["parameter-shared"] * 6


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_a_parametrized_reader_is_refused(parametrize):
    model = roughened(nn.Sequential(nn.LayerNorm(8), parametrize(nn.Linear(8, 4))))
    assert codes(model, torch.randn(16, 8)) == ["parameter-computed"]


def test_float16_is_refused():
    assert codes(head().half(), torch.randn(16, 8).half()) == ["range-too-small"]


def test_parameters_of_inference_mode_are_refused():
    with torch.inference_mode():
        model = head()
    with torch.inference_mode():
        assert codes(model, torch.randn(16, 8)) == ["weight-not-tracked"]


def test_a_view_of_another_parameter_is_refused():
    model = head()
    model.register_buffer("view", model[1].weight.data.view(-1))
    assert codes(model, torch.randn(16, 8)) == ["parameter-shared"]


def test_a_weight_with_repeated_memory_is_refused():
    model = head()
    model[1].weight = nn.Parameter(torch.randn(1, 8).expand(4, 8))
    assert codes(model, torch.randn(16, 8)) == ["parameter-shared"]


def test_statistics_without_a_place_for_the_shift_are_refused():
    model = roughened(
        nn.Sequential(nn.Conv1d(8, 8, 3, bias=False), nn.BatchNorm1d(8, affine=False))
    )
    assert "reader-without-bias" in codes(model, torch.randn(16, 8, 5))


def test_eps_that_leaves_no_room_is_refused():
    model = roughened(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, eps=2.0)))
    baked = normfx.bake_(model.eval())(torch.randn(16, 8))
    assert not baked.sites[0].actions


def test_with_gradients_wanted_inside():
    class Enabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()

        def forward(self, x):
            with torch.enable_grad():
                return self.head(x)

    assert codes(Enabled(), torch.randn(16, 8)) == ["needs-grad"]


def test_in_a_checkpoint():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()

        def forward(self, x):
            return checkpoint(self.head, x, use_reentrant=False)

    assert codes(Checkpointed(), torch.randn(16, 8)) == ["inside-a-body"]


# ------------------------------------------------------------------- clone


def test_a_tied_head():
    model, tokens = roughened(Tied()), torch.randint(11, (4, 5))
    assert codes(model, tokens) == ["parameter-shared"]


def test_a_tied_head_with_a_copy_of_its_own():
    model, tokens = roughened(Tied()), torch.randint(11, (4, 5))
    before, weight = snapshot(model), model.embed.weight
    baked = assert_baked(model, tokens, clone=True)
    assert model.embed.weight is weight
    assert torch.equal(weight, before["embed.weight"])
    assert model.unembed.weight is not weight
    assert model.unembed.weight.requires_grad
    assert folded_bytes() == 0
    baked.undo()
    assert model.unembed.weight is weight
    assert same(model.state_dict(), before)


def test_a_weight_of_another_module_has_no_place_for_a_copy():
    model = roughened(Function(lambda m, x: F.linear(m.norm(x), m.a.weight, m.a.bias) + m.a(x)))
    assert codes(model, torch.randn(16, 8), clone=True) == ["parameter-shared"]


# ------------------------------------------------------------------- errors: nothing changes


def assert_error(model, *inputs, match, **options):
    before = snapshot(model)
    versions = [held._version for held in model.state_dict(keep_vars=True).values()]
    with pytest.raises(normfx.BakeError, match=match):
        normfx.bake_(model, **options)(*inputs)
    assert same(model.state_dict(), before)
    return versions == [held._version for held in model.state_dict(keep_vars=True).values()]


def test_training_mode():
    assert assert_error(head(), torch.randn(4, 8), match="training mode: call model.eval")
    model = nn.Sequential(head(), head(4, 2)).eval()
    model[1].train()
    assert assert_error(model, torch.randn(4, 8), match="its module '1' is")


def test_a_graph_break():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()

        def forward(self, x):
            y = self.head(x)
            torch._dynamo.graph_break()
            return y + 1

    assert assert_error(Broken().eval(), torch.randn(4, 8), match="not one graph")


def test_no_module():
    with pytest.raises(normfx.BakeError, match="function is none"):
        normfx.bake_(lambda x: x)


def test_a_weight_that_would_be_infinite():
    model = head().eval()
    with torch.no_grad():
        model[0].weight.fill_(1e30)
        model[1].weight.fill_(1e30)
    assert assert_error(model, torch.randn(4, 8), match=r"1\.weight would not be finite")


def test_a_use_that_the_graph_does_not_show_is_noticed():
    """The copy of a weight in a plain tensor is constant for the graph, and stays as it was."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()
            self.count = 0

        def forward(self, x):
            self.count += 1
            return self.head(x) * (1 if torch.compiler.is_compiling() else 2)

    assert_error(Hidden().eval(), torch.randn(4, 8), match="has changed, so everything was taken")


def test_a_model_that_draws_random_numbers():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()

        def forward(self, x):
            return self.head(x) + torch.randn(4)

    baked = normfx.bake_(Noisy().eval())(torch.ones(4, 8))
    assert baked.sites[0].actions == [FOLD]


def test_a_model_whose_calls_differ():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return self.head(x) + self.count

    model = Counting().eval()
    with pytest.raises(normfx.BakeError, match="verify=False"):
        normfx.bake_(model)(torch.ones(4, 8))
    assert not torch.equal(model.head[0].weight, torch.ones(8))
    normfx.bake_(model, verify=False)(torch.ones(4, 8))
    assert torch.equal(model.head[0].weight, torch.ones(8))


@pytest.mark.parametrize("at", range(4))
def test_a_failure_while_writing(monkeypatch, at):
    model, x = head().eval(), torch.randn(4, 8)
    before, copy_, calls = snapshot(model), torch.Tensor.copy_, []

    def failing(self, other, *args):
        calls.append(self)
        if len(calls) == at + 1:
            raise MemoryError
        return copy_(self, other, *args)

    run = normfx.bake_(model)
    write = baking.write

    def patched(changes):
        monkeypatch.setattr(torch.Tensor, "copy_", failing)
        try:
            return write(changes)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(baking, "write", patched)
    with pytest.raises(MemoryError):
        run(x)
    assert len(calls) > at
    assert same(model.state_dict(), before)


# ------------------------------------------------------------------- undo


def test_exact_undo():
    for name, (make, shape, _) in MODELS.items():
        model, x = roughened(make()).eval(), torch.randn(shape)
        before = snapshot(model)
        baked = normfx.bake_(model, exact_undo=True)(x)
        assert not same(model.state_dict(), before), name
        assert_undone(model, baked, before, exact=True)
        torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_of_scales_that_lose_the_weight(dtype):
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, -2.0, 1e-42, 1e-30, 0.3, 3e20, -0.0, 1.0]))
        model[1].weight[:, 2] = 1e-3
        model[1].weight[:, 3] = 1e-12
    model = model.to(dtype)
    before = snapshot(model)
    baked = normfx.bake_(model)(torch.randn(16, 8, dtype=dtype))
    assert baked.sites[0].actions == [FOLD]
    assert not model[1].weight[:, 0].any()
    assert_undone(model, baked, before)


def test_undo_twice():
    model = head().eval()
    baked = normfx.bake_(model)(torch.randn(4, 8))
    baked.undo()
    before = snapshot(model)
    baked.undo()
    assert same(model.state_dict(), before)
    assert baked.bytes == 0


def step(model):
    with torch.no_grad():
        model[1].weight.mul_(2)


def assign(model):
    model.load_state_dict(snapshot(model), assign=True)


def set_data(model):
    model[0].bias.data = torch.randn(8)


@pytest.mark.parametrize("change", [step, assign, set_data])
def test_undo_after_a_change_is_refused(change):
    model = head().eval()
    baked = normfx.bake_(model)(torch.randn(4, 8))
    change(model)
    after = snapshot(model)
    with pytest.raises(normfx.BakeError, match="has changed since it was baked"):
        baked.undo()
    assert same(model.state_dict(), after)


def test_undo_makes_the_compiler_fold_again():
    model, x = head().eval(), torch.randn(4, 8)
    normfx.bake_(model)(x).undo()
    with torch.no_grad():
        compiled(model)(x)
    assert normfx.report().sites[0].actions == [FOLD]


# ------------------------------------------------------------------- and then


def test_twice():
    model, x = roughened(resnet()).eval(), torch.randn(IMAGE)
    normfx.bake_(model)(x)
    before = snapshot(model)
    versions = [held._version for held in model.state_dict(keep_vars=True).values()]
    again = normfx.bake_(model)(x)
    assert versions == [held._version for held in model.state_dict(keep_vars=True).values()]
    assert same(model.state_dict(), before)
    assert again.bytes == 0
    assert [code for s in again.sites for code in s.refusals if code != "reader-not-linear"] == [
        "already-neutral"
    ] * 5


def test_loaded_elsewhere_and_baked_again():
    """A state dict does not say that it was baked; a second `bake_` finds out, and changes nothing."""
    model, x = head().eval(), torch.randn(4, 8)
    normfx.bake_(model)(x)
    fresh, saved = head().eval(), io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    normfx.bake_(fresh)(x)
    assert same(fresh.state_dict(), model.state_dict())
    with torch.no_grad():
        compiled(fresh)(x)
    assert folded_bytes() == 0
    assert normfx.report().sites[0].actions == [DROP]


def test_compiled_before():
    model, x = roughened(resnet()).eval(), torch.randn(IMAGE)
    exact = copy.deepcopy(model).double()(x.double())
    eager = model(x)
    fast = compiled(model)
    with torch.no_grad():
        assert_within_contract(fast(x), eager.detach(), exact.detach())
        baked = normfx.bake_(model)(x)
        assert_within_contract(fast(x), eager.detach(), exact.detach())
        baked.undo()
        assert_within_contract(fast(x), eager.detach(), exact.detach())
    assert len(normfx.report().graphs) == 1


def test_a_compiled_module_is_baked_itself():
    model, x = head().eval(), torch.randn(4, 8)
    normfx.bake_(compiled(model))(x)
    assert torch.equal(model[0].weight, torch.ones(8))


@pytest.mark.filterwarnings("ignore:A graph was rewritten for weights")
@pytest.mark.parametrize("weights", ["live", "frozen"])
def test_what_is_no_longer_neutral(weights):
    model, x = roughened(resnet()).eval(), torch.randn(IMAGE)
    normfx.bake_(model)(x)
    fast = compiled(model, weights=weights)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def check():
        if weights == "frozen":
            normfx.refold()
        assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))

    with torch.no_grad():
        check()
        before = fast(x)
        norms[0].weight[2] = 3.0
        check()
        assert not torch.equal(fast(x), before)
        norms[0].weight.fill_(1.0)
        check()
        assert torch.equal(fast(x), before)
        norms[1].running_var.mul_(2)
        check()
        assert not torch.equal(fast(x), before)
        norms[3].bias.add_(1)
        check()
    assert len(normfx.report().graphs) == 1


@pytest.mark.filterwarnings("ignore:A graph was rewritten for weights")
def test_running_statistics_that_training_moves():
    """`batch_norm` in training mode changes them without a new version."""
    model, x = roughened(resnet()).eval(), torch.randn(IMAGE)
    normfx.bake_(model)(x)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model.train()(x)
        model.eval()
        assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))


@pytest.mark.filterwarnings("ignore:A graph was rewritten for weights")
def test_another_model_that_runs_the_same_code():
    models = [head().eval(), head().eval()]
    with torch.no_grad():
        models[1][0].weight.mul_(2)
    x = torch.randn(4, 8)
    normfx.bake_(models[0])(x)

    @torch.compile(backend="normfx", options={"lowering": "eager", "strict": True})
    def fast(model, x):
        return model(x)

    with torch.no_grad():
        for model in (*models, *models):
            exact = copy.deepcopy(model).double()(x.double())
            assert_within_contract(fast(model, x), model(x), exact)
    assert len(normfx.report().graphs) == 1


@pytest.mark.filterwarnings("ignore:A graph was rewritten for weights")
@pytest.mark.inductor
def test_through_inductor():
    model, x = roughened(Residual()).eval(), torch.randn(4, 8, 6, 6)
    baked = normfx.bake_(model)(x)
    fast = torch.compile(model, backend="normfx", options={"strict": True})
    with torch.no_grad():
        for change in (1.0, 2.0, 1.0):
            model.bn1.weight.fill_(change)
            exact = copy.deepcopy(model).double()(x.double())
            assert_within_contract(fast(x), model(x), exact)
    assert folded_bytes() == 0
    assert len(baked.sites) == 2


@pytest.mark.filterwarnings("ignore:A graph was rewritten for weights")
def test_undo_under_compiled_code():
    model, x = roughened(resnet()).eval(), torch.randn(IMAGE)
    baked = normfx.bake_(model)(x)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        baked.undo()
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_contract(fast(x), model(x), exact)


def test_channels_last():
    model, x = roughened(resnet()).to(memory_format=torch.channels_last), torch.randn(IMAGE)
    before = snapshot(model)
    baked = assert_baked(model, x)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_undone(model, baked, before)


def test_in_float64():
    """1 - eps is neutral to the last digit there too."""
    model, x = roughened(resnet()).double().eval(), torch.randn(IMAGE).double()
    baked = normfx.bake_(model)(x)
    with torch.no_grad():
        compiled(model)(x)
    assert all(site.actions for site in baked.sites)
    assert folded_bytes() == 0


def test_two_norms_beside_each_other():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.linear, self.bn = nn.Linear(16, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.bn(self.linear(torch.cat([self.norm1(x), self.norm2(x.sin())], -1)))

    model = roughened(Beside())
    before = snapshot(model)
    baked = assert_baked(model, torch.randn(64, 8))
    assert all(site.actions for site in baked.sites)
    assert folded_bytes() == 0
    assert_undone(model, baked, before)


def test_a_scale_that_is_an_exponential():
    """Zero makes exp(v) neutral."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.tensor([0.7])), nn.Linear(8, 4)

        def forward(self, x):
            return self.out(F.normalize(x, dim=-1) * self.scale.exp())

    model = Scaled()
    before = snapshot(model)
    baked = assert_baked(model, torch.randn(64, 8))
    assert model.scale == 0
    assert folded_bytes() == 0
    assert_undone(model, baked, before)


def test_torchs_own_encoder_layer():
    model = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    assert_baked(roughened(model), torch.randn(16, 5, 8))


def test_training_after():
    model, x = head().eval(), torch.randn(16, 8)
    baked = normfx.bake_(model)(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = compiled(model)
    for _ in range(2):
        fast(x).square().sum().backward()
        assert model[0].weight.grad.abs().max() > 0
        optimizer.step()
        with torch.no_grad():
            assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert len(baked.sites) == 1


def test_a_result_of_a_neutral_norm_is_a_tensor_of_its_own():
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y), y

    model, x = Returns().eval(), torch.randn(4, 8, 5)
    with torch.no_grad():
        model.bn.running_var.fill_(1 - model.bn.eps)
    normfx.bake_(model)(x)
    with torch.no_grad():
        first, second = compiled(model)(x)
        kept = second.clone()
        first.zero_()
        assert torch.equal(second, kept)


def test_inside_inference_mode():
    model, x = head().eval(), torch.randn(4, 8)
    with torch.inference_mode():
        normfx.bake_(model)(x)
    assert torch.equal(model[0].weight, torch.ones(8))
    model(x).sum().backward()


def test_text():
    model = roughened(nn.Sequential(Block(), nn.LayerNorm(8))).eval()
    shown = str(normfx.bake_(model)(torch.randn(4, 8)))
    assert shown == (
        "norm    kind       into                    refused\n"
        "0.norm  LayerNorm  0.up.weight, 0.up.bias  -\n"
        "1       LayerNorm  -                       extra-user\n"
        "extra-user: What would change is read elsewhere too: by the output, a residual or another "
        "operator. The affine part must stay for that reader."
    )


class PostNorm(nn.Module):
    """A post-norm stream: what is left of a baked norm is read by a branch and a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.branch, self.last, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.head(self.last(x + self.branch(x)))


def pooled_stack():
    middle = (nn.BatchNorm2d(6), nn.MaxPool2d(2))
    convolutions = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3, padding=1)
    return nn.Sequential(convolutions[0], *middle, convolutions[1])


@pytest.mark.parametrize(
    ("make", "shape", "rule"),
    [(PostNorm, (16, 8), "telescope"), (pooled_stack, (2, 3, 12, 12), "fold-statistics-into-next")],
)
def test_a_shift_that_baking_leaves_goes_on_alone(make, shape, rule):
    """A norm without a scale: the layer before has no bias, so the norm kept the shift."""
    torch.manual_seed(0)
    model, x = roughened(make()).eval(), torch.randn(shape)
    normfx.bake_(model)(x)
    with torch.no_grad():
        got = compiled(model, rules=["drop-baked", rule, "hoist"])(x)
        assert_within_contract(got, model(x), copy.deepcopy(model).double()(x.double()))
    assert any(site.actions == ["drop-baked", rule] for site in normfx.report().sites)
