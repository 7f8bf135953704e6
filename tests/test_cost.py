"""The cost model: exact numbers for small graphs, and Inductor's own counts in the same order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import roughened
from torch import fx, nn

from normfx.cost import CALLS, FLOPS_A_BYTE, KERNEL_BYTES, Cost, cost_of, saves
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal


def cost(
    model: Any,
    *inputs: Any,
    stage: str = "recognise",
    dynamic: bool | None = None,
    rules: tuple[str, ...] | None = None,
) -> Cost:
    """The cost of the model's graphs after a stage."""
    found: list[Cost] = []

    def backend(gm: fx.GraphModule, _: list[Any]):
        def observe(at: str, module: fx.GraphModule) -> None:
            if at == stage:
                found.append(cost_of(module.graph.nodes))

        rewrite(gm, Options(rules=rules), Journal(), observe=observe)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    return sum(found, Cost())


X = 4 * 8 * 4  # bytes of a (4, 8) in float32


def test_costs_add():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_chain_of_pointwise_operators_is_one_kernel(dynamic):
    x = torch.randn(4, 8)
    assert cost(lambda x: F.relu(x * 2 + 1), x, dynamic=dynamic) == Cost(2 * X, 1, 3 * 32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_linear_layer_reads_its_weight_and_bias(dynamic):
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    moved = X + 4 * (16 * 8 + 16) + 4 * 4 * 16
    assert cost(layer, x, dynamic=dynamic) == Cost(moved, 1, 2 * 4 * 16 * 8)


def test_half_the_bytes_in_bfloat16():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    assert cost(lambda x: x + 1, x) == Cost(X, 1, 32)


def test_views_are_free():
    def model(x):
        a, b = x.view(8, 4).t().reshape(4, 8).split(4, 1)
        return F.relu(a) * b

    x = torch.randn(4, 8)
    assert cost(lambda x: x.view(8, 4).t(), x) == Cost()
    # `reshape` copies here: a view of x is read and x is written; the halves are read and one made
    assert cost(model, x).kernels == 1


def test_an_expanded_operand_is_read_once():
    x, row = torch.randn(4, 8), torch.randn(8)
    assert cost(lambda x, r: x + r.expand(4, 8), x, row) == Cost(2 * X + 32, 1, 32)


def test_an_embedding_reads_the_rows_it_gives():
    ids = torch.zeros(4, dtype=torch.long)
    assert cost(nn.Embedding(100_000, 8), ids) == Cost(2 * X + 4 * 8, 1, 32)


def test_norms_by_their_flops():
    x = torch.randn(4, 8)
    assert cost(nn.LayerNorm(8), x) == Cost(2 * X + 64, 1, 7 * 32)
    assert cost(nn.LayerNorm(8, elementwise_affine=False), x) == Cost(2 * X, 1, 5 * 32)
    assert cost(nn.RMSNorm(8, 1e-6), x) == Cost(2 * X + 32, 1, 4 * 32)


def test_a_norm_that_is_spelled_out_is_one_kernel_too():
    def model(x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + 1e-5)

    x = torch.randn(4, 8)
    for stage in ("capture", "recognise"):
        found = cost(model, x, stage=stage)
        assert (found.kernels, found.bytes) == (1, 2 * X)


def test_what_stands_behind_a_product_is_another_kernel():
    """Though it reads what the first kernel makes: fused with it, it would wait for itself."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            h = x * 2
            return h + self.linear(self.norm(h))

    found = cost(Block(), torch.randn(4, 8))
    first = 3 * X + 64  # reads x, w and b; writes h and the norm of it
    assert found.kernels == 3
    assert found.bytes == first + (2 * X + 4 * 72) + 3 * X


def stack(first: nn.Module, then: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    return roughened(nn.Sequential(conv, nn.ReLU(), first, then)).eval()


POOL, IMAGE = nn.MaxPool2d(2), torch.randn(2, 3, 8, 8)


def test_a_pool_computes_a_relu_but_no_batch_norm_on_the_fly():
    full, quarter = 4 * 2 * 4 * 64, 4 * 2 * 4 * 16
    conv = 4 * 2 * 3 * 64 + 4 * (4 * 27 + 4) + full
    before = cost(stack(nn.BatchNorm2d(4), POOL), IMAGE)
    behind = cost(stack(POOL, nn.BatchNorm2d(4)), IMAGE)
    bare = cost(stack(POOL, nn.Identity()), IMAGE)
    assert (before.kernels, before.bytes) == (3, conv + (2 * full + 64) + (full + quarter))
    assert (behind.kernels, behind.bytes) == (2, conv + full + quarter + 64)
    assert (bare.kernels, bare.bytes) == (2, conv + full + quarter)
    assert saves(before, behind)
    assert saves(before, bare)
    assert not saves(bare, behind)


def test_a_map_of_biases_does_not_pay_where_it_takes_the_place_of_a_norm_in_a_pointwise_kernel():
    """A shift under zero padding: the map is read, as the norm's vectors were."""
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    constant = torch.randn(1, 4, 8, 8)
    norm = roughened(nn.BatchNorm2d(4)).eval()
    before = cost(lambda x: norm(F.relu(conv(x))), IMAGE)
    after = cost(lambda x, m: F.relu(conv(x) + m), IMAGE, constant)
    assert not saves(before, after)


def test_a_scale_past_a_product_is_read_and_written_once_more():
    """Of rows: norm(x) @ W as (x @ W) * r pays only where the product is narrower than x."""
    r = torch.randn(64, 1)

    def before(x, r, w):
        return (x * r) @ w

    def after(x, r, w):
        return (x @ w) * r

    narrow, wide = torch.randn(256, 8), torch.randn(256, 1024)
    x = torch.randn(64, 256)
    assert saves(cost(before, x, r, narrow), cost(after, x, r, narrow))
    assert not saves(cost(before, x, r, wide), cost(after, x, r, wide))


def test_without_the_mean_a_norm_moves_as_much():
    """Recentring saves flops, for copies of what writes the stream: as many as those are worth."""
    x = torch.randn(64, 768)
    before, after = cost(nn.LayerNorm(768, bias=False), x), cost(nn.RMSNorm(768, 1e-6), x)
    assert (before.bytes, before.kernels) == (after.bytes, after.kernels)
    assert before.flops - after.flops == 2 * x.numel()
    gain = 2 * x.numel() // FLOPS_A_BYTE
    assert saves(before, after, CALLS * gain)
    assert not saves(before, after, CALLS * gain + 1)


def test_affine_parts_are_worth_copies_of_some_size():
    """Two vectors less to read in each call, for a copy of every reader's weight."""
    x = torch.randn(64, 768)
    before = cost(nn.LayerNorm(768), x)
    after = cost(nn.LayerNorm(768, elementwise_affine=False), x)
    layer, vocabulary = 768 * 3072 * 4, 768 * 50257 * 4
    assert saves(before, after, layer)
    assert not saves(before, after, vocabulary)


def test_bounds():
    one, more = Cost(100, 1, 7), Cost(101, 1, 7)
    assert saves(more, one, CALLS)
    assert not saves(more, one, CALLS + 1)
    assert not saves(one, one)
    assert not saves(one, more)
    assert saves(Cost(0, 0, FLOPS_A_BYTE), Cost())
    assert saves(Cost(0, 2), Cost(KERNEL_BYTES - 1, 1))
    assert not saves(Cost(0, 2), Cost(KERNEL_BYTES, 1))


def test_an_unknown_size_counts_as_one():
    def model(x):
        return x.nonzero().to(torch.float32) * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = cost(model, torch.ones(5))
    assert found.kernels >= 1
    assert found.bytes < 100


@pytest.mark.inductor
@pytest.mark.parametrize(
    "model",
    [
        stack(nn.BatchNorm2d(4), POOL),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 8)),
    ],
    ids=["bn before a pool", "bn between convolutions", "layer norm"],
)
def test_rewrites_change_inductors_kernels_as_the_model_says(model):
    from torch._inductor import metrics

    roughened(model).eval()
    counted, modelled = [], []
    for rules in ([], None):
        torch._dynamo.reset()
        metrics.reset()
        with torch.no_grad():
            options = {"strict": True, "rules": rules}
            torch.compile(model, backend="normfx", options=options)(IMAGE)
        counted.append(metrics.generated_kernel_count)
        given = None if rules is None else tuple(rules)
        modelled.append(cost(model, IMAGE, stage="hoist", rules=given).kernels)
    assert (counted[0] > counted[1]) == (modelled[0] > modelled[1])
    assert counted[0] >= counted[1]


def test_no_kernel_is_added_for_fewer_bytes():
    before, after = Cost(10 * KERNEL_BYTES, 1), Cost(0, 2)
    assert after.traffic < before.traffic
    assert not saves(before, after)


def test_what_is_added_to_the_product_of_matrices_is_added_in_its_kernel():
    w = torch.randn(8, 8)
    for x, kernels in ((torch.randn(4, 8), 1), (torch.randn(2, 2, 8), 2)):
        assert cost(lambda x, w, c: c + F.linear(x, w), x, w, x).kernels == kernels
    x = torch.randn(4, 8)
    assert cost(lambda x, w: x + F.linear(x, w, w[0]), x, w).kernels == 2


def test_a_reduction_waits_for_the_kernel_that_reads_it():
    """A row's statistic and what scales a narrow product by it: one kernel, behind the product."""

    def model(x, w):
        return (x @ w) * torch.rsqrt(x.square().mean(-1, keepdim=True))

    assert cost(model, torch.randn(64, 256), torch.randn(256, 8)).kernels == 2


def test_a_text():
    assert str(Cost(1, 2, 3)) == "1 bytes, 2 kernels, 3 flops"


def test_copies_must_be_repaid_within_so_many_calls():
    cheap, dear = Cost(10, 1), Cost(20, 1)
    assert saves(dear, cheap)
    assert not saves(cheap, dear)
    assert saves(dear, cheap, 10 * CALLS)
    assert not saves(dear, cheap, 10 * CALLS + 1)
