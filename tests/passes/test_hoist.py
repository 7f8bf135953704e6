"""Hoist: what reads only parameters leaves the graph, whatever it is; equal computations are one."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_agrees, assert_within_contract, compiled
from models import roughened
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import normfx
from normfx import graph as g
from normfx.backend import weights_are_tracked
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal


def left_inside(model, *inputs):
    """The names of the operators in the lowered graph that compute something from parameters alone, and the journal."""
    found, journal = [], Journal()

    def backend(gm, example_inputs):
        rewritten = rewrite(gm, Options(), journal, tracked=weights_are_tracked(gm, example_inputs))
        graph = rewritten.module.graph
        state = g.parameter_only(graph)
        found.extend(
            node.name for node in graph.nodes if node in state and node.op == "call_function"
        )
        return gm

    torch.compile(model, backend=backend)(*inputs)
    return found, journal


def folded_bytes():
    return sum(graph.folded_bytes for graph in normfx.report().graphs)


# ------------------------------------------------------------------- one weight, many norms


class WideNet(nn.Module):
    """One block's weights at every depth, with norms of their own for each (arXiv 2107.11817), or shared ones."""

    def __init__(self, depth: int = 3, norms: int = 3, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(norms))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(norms))
        self.depth = depth

    def forward(self, x):
        for index in range(self.depth):
            norm1, norm2 = self.norm1[index % len(self.norm1)], self.norm2[index % len(self.norm2)]
            q, k, v = (t.unflatten(-1, (2, -1)) for t in self.qkv(norm1(x)).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            x = x + self.proj(mixed.transpose(1, 2).flatten(2))
            x = x + self.down(F.gelu(self.up(norm2(x))))
        return x


@pytest.mark.parametrize("norms", [1, 2, 3])
def test_a_shared_block_has_one_copy_for_each_norm(norms):
    model, x = roughened(WideNet(norms=norms)), torch.randn(64, 5, 8)
    fast = assert_agrees(model, x)
    assert [site.actions for site in normfx.report().sites] == [["fold-affine-into-linear"]] * 6
    one = 4 * (model.qkv.weight.numel() + 24 + model.up.weight.numel() + 16)
    assert folded_bytes() == norms * one
    assert normfx.report().graphs[0].hoisted == norms * 4
    del fast


def test_a_shared_block_follows_its_norms():
    model, x = roughened(WideNet()), torch.randn(64, 5, 8)
    fast = compiled(model)
    with torch.no_grad():
        for changed in (model.norm1[0].weight, model.norm2[2].bias, model.qkv.weight):
            fast(x)
            changed.mul_(1.5)
            assert_within_contract(fast(x), model(x), copy.deepcopy(model).double()(x.double()))


def test_two_equal_results_are_two_tensors():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x + self.weight * 2, self.weight * 2, (self.weight * 2).view(2, 2)

    model, x = Twice(), torch.randn(4)
    with torch.no_grad():
        _, first, second = compiled(model)(x)
        first.zero_()
        assert torch.equal(second, model(x)[2])


def test_arguments_that_are_equal_but_not_the_same():
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1, 2, 3]), requires_grad=False)

        def forward(self, x):
            return x + self.weight * 2 + (self.weight * 2.0) / (self.weight * True)

    assert_agrees(Typed(), torch.randn(3))


# ------------------------------------------------------------------- everything else that reads only parameters


class ScaledStdConv(nn.Conv2d):
    """As NF-ResNets have it (arXiv 2101.08692), in the form of timm: through `batch_norm` in training mode."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.3))
        self.scale = 1.7 * self.weight[0].numel() ** -0.5

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class StdConv(nn.Conv2d):
    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 6)
        self.down, self.up = (
            nn.Parameter(torch.randn(2, 8)),
            nn.Parameter(torch.randn(6, 2)),
        )

    def forward(self, x):
        return F.linear(x, self.base.weight + self.up @ self.down * 0.5, self.base.bias)


class Compander(nn.Module):
    """The weight a * arctan(v / b) (arXiv 2306.16993)."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.a, self.b = (
            nn.Parameter(torch.randn(6, 8)),
            nn.Parameter(torch.tensor(1.5)),
            nn.Parameter(torch.tensor(0.5)),
        )

    def forward(self, x):
        return F.linear(x, self.a * torch.arctan(self.v / self.b))


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


def with_hook(norm):
    """The deprecated form, whose hook writes the computed weight to the module: the graph returns it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(nn.Linear(8, 6))


def symmetric():
    linear = nn.Linear(8, 8)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


COMPUTED = {
    "scaled-std-conv": (lambda: ScaledStdConv(4, 6, 3), (64, 4, 5, 5)),
    "std-conv": (lambda: StdConv(4, 6, 3), (64, 4, 5, 5)),
    "weight-norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 6)), (64, 8)),
    "weight-norm-conv": (
        lambda: parametrizations.weight_norm(nn.Conv1d(8, 6, 3)),
        (64, 8, 5),
    ),
    "weight-norm-old": (lambda: with_hook(nn.utils.weight_norm), (64, 8)),
    "spectral-norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 6)), (64, 8)),
    "spectral-norm-old": (lambda: with_hook(nn.utils.spectral_norm), (64, 8)),
    "symmetric": (symmetric, (64, 8)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), (64, 8)),
    "orthogonal-cayley": (
        lambda: parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"),
        (64, 8),
    ),
    "orthogonal-householder": (
        lambda: parametrizations.orthogonal(nn.Linear(8, 6), orthogonal_map="householder"),
        (64, 8),
    ),
    "lora": (LoRA, (64, 8)),
    "compander": (Compander, (64, 8)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_reads_only_parameters_leaves_the_graph(name):
    make, shape = COMPUTED[name]
    model = make().eval()
    with torch.no_grad():
        inside, journal = left_inside(model, torch.randn(shape))
    assert inside == []
    assert journal.hoisted == 1


@pytest.mark.parametrize("name", COMPUTED)
def test_with_gradients_it_stays(name):
    make, shape = COMPUTED[name]
    inside, journal = left_inside(make().eval(), torch.randn(shape))
    assert inside
    assert journal.hoisted == 0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_keep_the_contract(name, grad):
    make, shape = COMPUTED[name]
    x = torch.randn(16 * shape[0], *shape[1:])  # the largest error of a few numbers is chance
    assert_agrees(make().eval(), x, grad=grad)


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_follow(name):
    make, shape = COMPUTED[name]
    model, x = make().eval(), torch.randn(shape)
    fast = compiled(model)
    with torch.no_grad():
        before = fast(x).clone()
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.01)
        exact = copy.deepcopy(model).double()
        assert_within_contract(fast(x), model(x), exact(x.double()))
        assert not torch.equal(fast(x), before)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_norm_before_a_computed_weight_folds_into_it(name):
    make, shape = COMPUTED[name]
    first = nn.GroupNorm(2, shape[1]) if len(shape) > 2 else nn.LayerNorm(shape[1])
    model = roughened(nn.Sequential(first, make().eval())).eval()
    with torch.no_grad():
        inside, journal = left_inside(model, torch.randn(shape))
    assert inside == []
    assert "fold-affine-into-linear" in [action for s in journal.sites for action in s.actions]
    torch._dynamo.reset()
    assert_agrees(model, torch.randn(shape))


def test_a_returned_value_is_computed_once_and_the_callers():
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            made = self.weight.t().sin()
            return x @ made, made, made.t()

    model, x = Returns(), torch.randn(3, 6)[:, :4] @ torch.randn(4, 6)
    with torch.no_grad():
        assert left_inside(model, x)[0] == []
        torch._dynamo.reset()
        fast = compiled(model)
        _, made, view = fast(x)
        view.zero_()
        assert torch.equal(made, torch.zeros(6, 4)), "two views of one tensor"
        product, made, _ = fast(x)
        assert torch.equal(product, model(x)[0])
        assert torch.equal(made, model(x)[1])
        assert made.stride() == model(x)[1].stride()


def test_a_norm_of_a_parameter_is_reported_as_hoisted():
    class OfParameters(nn.Module):
        """Relative positions, which are normalized before they are used, twice."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)

        def forward(self, x):
            first, second = self.norm(self.table.weight), self.norm(self.table.weight)
            return x @ first.t() + x @ second.t()

    assert_agrees(roughened(OfParameters()), torch.randn(64, 8))
    assert [site.actions for site in normfx.report().sites] == [["hoist"], ["hoist"]]
    torch._dynamo.reset()
    assert_agrees(roughened(OfParameters()), torch.randn(64, 8), options={"rules": []})
    assert [site.actions for site in normfx.report().sites[2:]] == [[], []]
