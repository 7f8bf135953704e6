"""In-place operators on temporaries become functional, and what anybody else can see stays."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from assertions import tensors_of
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from normfx import graph as g
from normfx.capture import capture
from normfx.passes.functional import functional


def writes_left(graph: fx.Graph) -> list[str]:
    """The names of the calls that write to something."""
    return [
        str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        for node in graph.nodes
        if g.mutated_arguments(node)
    ]


def captured(function: Any, *inputs: Any, dynamic: bool = False) -> tuple[Any, list[fx.Graph]]:
    """What the captured graphs return for these inputs, and the graphs."""
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]):
        module = capture(gm)
        module.graph.lint()
        graphs.append(copy.deepcopy(module.graph))
        return module

    return torch.compile(function, backend=backend, dynamic=dynamic)(*inputs), graphs


def copies(inputs: Any, grad: bool) -> Any:
    """Leaves of their own, that require gradients where they can."""
    return pytree.tree_map_only(
        torch.Tensor,
        lambda t: t.detach().clone().requires_grad_(grad and t.is_floating_point()),
        inputs,
    )


def assert_same(
    function: Any, *inputs: Any, grad: bool = False, dynamic: bool = False, fullgraph: bool = True
) -> list[str]:
    """Runs a function eagerly and captured, holds outputs, inputs and gradients to the same bits.

    Returns:
        The writes that capture left in place.
    """
    mine, theirs = copies(inputs, grad), copies(inputs, grad)
    with torch.set_grad_enabled(grad):
        torch.manual_seed(3)
        eager = tensors_of(function(*theirs))
        torch.manual_seed(3)
        result, graphs = captured(function, *mine, dynamic=dynamic)
        got = tensors_of(result)
    assert not fullgraph or len(graphs) == 1
    assert len(got) == len(eager)
    for a, b in zip(got, eager, strict=True):
        assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad)
        assert torch.equal(a, b)
    if grad:
        for outputs in (got, eager):
            wanted = [o.double().square().sum() for o in outputs if o.requires_grad]
            torch.stack(wanted).sum().backward()
    for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
        assert torch.equal(a, b)
        if a.grad is None or b.grad is None:
            assert a.grad is b.grad
        else:
            assert torch.equal(a.grad, b.grad)
    return [name for graph in graphs for name in writes_left(graph)]


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    deviation = (x * x).mean(-1, keepdim=True).add_(1e-5).sqrt_()
    x = x / deviation
    return x.mul_(weight).add_(bias)


def layer_norm_by_statements(x, weight, bias):
    y = x - x.mean(-1, keepdim=True)
    variance = y.square().mean(-1, keepdim=True)
    variance += 1e-5
    variance.rsqrt_()
    y = y * variance
    y *= weight
    y += bias
    return y


def l2(x, weight, bias):
    norm = (x * 1).pow_(2).sum(-1, keepdim=True).sqrt_().clamp_(min=1e-12)
    return (x / norm) * weight + bias


def with_addcmul(x, weight, bias):
    y = x - x.mean(-1, keepdim=True)
    inverse = y.pow(2).mean(-1, keepdim=True).add_(1e-5).pow_(-0.5)
    out = y * inverse
    out.mul_(weight)
    return torch.zeros_like(out).addcmul_(out, weight).add_(bias, alpha=2)


def var_mean(x, weight, bias):
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    variance.add_(1e-5).rsqrt_()
    return (x - mean).mul(variance) * weight + bias


def earlier_readers(x, weight, bias):
    y = x * weight
    before = y.sin()
    y.add_(bias)
    between = y + y
    y.mul_(bias)
    return before, between, y, y.view(-1)


def twice_itself(x, weight, bias):
    y = x + bias
    y.mul_(y).add_(y)
    return y * weight


def views_dead_or_made_after(x, weight, bias):
    y = x + bias
    total = y.view(-1).sum()
    y.mul_(weight)
    flat = y.view(-1)
    return y, flat, total


def through_the_only_view(x, weight, bias):
    y = (x + bias).view(-1, 4)
    y.mul_(3)
    return y.view(x.shape) * weight


def returned_twice(x, weight, bias):
    y = x * weight
    return y, y.add_(bias)


def relu(x, weight, bias):
    return F.relu(F.layer_norm(x, (8,), weight, bias), inplace=True) * 2


PROVABLE = [
    layer_norm,
    layer_norm_by_statements,
    l2,
    with_addcmul,
    var_mean,
    earlier_readers,
    twice_itself,
    views_dead_or_made_after,
    through_the_only_view,
    returned_twice,
    relu,
]


# In eager each of these writes to what an operator has saved for its backward.
REFUSED_BY_AUTOGRAD = (earlier_readers, twice_itself, l2)


@pytest.mark.parametrize("function", PROVABLE)
@pytest.mark.parametrize("grad", [False, True])
def test_provable(function, grad):
    if not (grad and function in REFUSED_BY_AUTOGRAD):
        inputs = torch.randn(16, 8), torch.rand(8) + 0.5, torch.randn(8)
        assert assert_same(function, *inputs, grad=grad) == []


@pytest.mark.parametrize("function", PROVABLE)
def test_dynamic_shapes(function):
    inputs = torch.randn(16, 8), torch.rand(8) + 0.5, torch.randn(8)
    assert assert_same(function, *inputs, dynamic=True) == []


@pytest.mark.parametrize("grad", [False, True])
def test_metadata(grad):
    """A result has memory of its own, and the line of the user."""
    with torch.set_grad_enabled(grad):
        inputs = copies((torch.randn(16, 8), torch.rand(8), torch.randn(8)), grad)
        _, (graph,) = captured(layer_norm, *inputs)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sqrt.default):
        assert g.storage(node) is not None
        assert g.storage(node) != g.storage(node.all_input_nodes[0])
        assert g.shape(node) == (16, 1)
        assert "test_functional.py" in g.location(node)


def test_a_promoted_result_is_cast():
    def scaled(x, weight):
        return (x * 2).mul_(weight).sub_(1)

    x, weight = torch.randn(16, 8).half(), torch.rand(8)
    assert assert_same(scaled, x, weight) == []


def test_a_scaled_addcmul():
    """Dynamo makes `addcmul_` with a value a multiply-add of prims and a `copy_`."""

    def function(x, weight):
        return (x * 1).addcmul_(x, weight, value=0.5)

    inputs = torch.randn(16, 8), torch.rand(8)
    with torch.no_grad():
        got, (graph,) = captured(function, *inputs)
        assert writes_left(graph) == []
        torch._dynamo.reset()
        # eager rounds after the multiplication: what dynamo made of it is to be kept
        assert torch.equal(got, torch.compile(function, backend="eager")(*inputs))


def test_a_comparison_is_cast():
    assert assert_same(lambda x: (x * 2).gt_(0.5), torch.randn(16, 8)) == []


def test_a_copy_is_another_memory():
    """`x.float()` of a half input is a temporary; of a float input it is the input."""

    def normed(x):
        y = x.float()
        y.mul_(2)
        return y

    assert assert_same(normed, torch.randn(16, 8).half()) == []
    torch._dynamo.reset()
    assert assert_same(normed, torch.randn(16, 8)) == ["mul_"]


def input_written(x):
    return x.mul_(2) + 1


def input_returned(x):
    y = x.view(-1)
    y.mul_(2)
    return x, y


def slice_of_a_temporary(x):
    y = x * 1
    y[:, 0].zero_()
    return y


def item_assigned(x):
    y = x * 1
    y[:, 0] = 3
    y.mul_(2)
    return y


def view_read_later(x):
    y = x * 1
    flat = y.view(-1)
    y.mul_(2)
    return flat + 1


def view_of_a_view_read_later(x):
    y = x * 1
    flat = y.view(-1)
    y.mul_(2)
    return flat.view(4, -1), y


def base_read_later(x):
    y = x * 1
    y.view(-1).mul_(2)
    return y + 1


def view_is_an_operand(x):
    y = x * 1
    return y.mul_(y.detach())


def parts_read_later(x):
    y = x * 1
    first, second = y.chunk(2, -1)
    y.mul_(2)
    return first - second


def random(x):
    return (x * 1).bernoulli_(0.5)


def dropped(x):
    return F.dropout(x * 1, 0.5, training=True, inplace=True)


def returned_by_dropout(x):
    """In eval mode `dropout` returns its operand, which neither its schema nor fake tensors say."""
    y = x * 1
    kept = F.dropout(y, 0.5, training=False)
    y.mul_(2)
    return kept


def other_strides(x):
    return (x * 1).t().contiguous().t()[:4].mul_(2)


def transposed_in_place(x):
    y = x * 1
    y.t_()
    return y.mul_(2)


def written_to_out(x):
    y = x * 1
    torch.mul(x, 2, out=y)
    return y.add_(1)


KEPT = {
    input_written: ["mul_"],
    input_returned: ["mul_"],
    slice_of_a_temporary: ["zero_"],
    item_assigned: ["fill_", "mul_"],
    view_read_later: ["mul_"],
    view_of_a_view_read_later: ["mul_"],
    base_read_later: ["mul_"],
    view_is_an_operand: ["mul_"],
    parts_read_later: ["mul_"],
    random: ["bernoulli_"],
    dropped: ["dropout_"],
    returned_by_dropout: ["mul_"],
    other_strides: ["mul_"],
    transposed_in_place: ["t_", "mul_"],
    written_to_out: ["mul", "add_"],
}


@pytest.mark.parametrize("function", KEPT)
def test_kept(function):
    assert assert_same(function, torch.randn(16, 8)) == KEPT[function]


def test_one_write_that_stays_keeps_the_others():
    """Else `g.storage` of a later view would not tell that the write left reaches it."""

    def function(x):
        y = x * 1
        y.mul_(2)
        flat = y.view(-1)
        y.add_(1)
        return flat

    assert assert_same(function, torch.randn(16, 8)) == ["mul_", "add_"]


def test_kept_where_a_write_starts_the_gradient():
    """Dynamo's value of `y` has the storage of the trace's value of `mul_`, but not of `y`."""

    def function(x, weight):
        y = x.detach() * 1
        seen = y.detach()
        y.mul_(weight)
        return seen, y

    assert assert_same(function, torch.randn(16, 8), torch.rand(8), grad=True) == ["mul_"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: (x * 2).mul_(weight),  # gradients would be rounded at another place
        lambda x, weight: torch.empty_like(x).copy_(weight) * x,  # `copy` has no derivative
        lambda x, weight: (x * 2).gt_(0) + weight,  # nor has `gt`: None instead of zeros
    ],
)
def test_kept_where_gradients_would_differ(function):
    x, weight = torch.randn(16, 8).half(), torch.rand(8)
    assert len(assert_same(function, x, weight, grad=True)) == 1
    torch._dynamo.reset()
    assert assert_same(function, x, weight) == []


def test_kept_across_a_grad_switch():
    def unseen_by_autograd(x, weight):
        y = x * weight
        with torch.no_grad():
            y.mul_(2)
        return y + 1

    inputs = torch.randn(16, 8), torch.rand(8)
    assert assert_same(unseen_by_autograd, *inputs, grad=True) == ["mul_"]

    def inside(x, weight):
        with torch.no_grad():
            y = (x * weight).mul_(2)
        return x + y

    assert assert_same(inside, *inputs, grad=True) == []


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_casts_no_in_place_operator(inside):
    """Autocast runs `x.addmm(..)` in bfloat16, and `x.addmm_(..)` in float32."""

    def function(x, weight):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y = x * 1
            y.addmm_(weight, x)
            return y, (x * 1).mul_(2)

    inputs = torch.randn(8, 8), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        assert assert_same(function, *inputs) == (["addmm_"])


class Registered(nn.Module):
    """Running statistics, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.running = nn.Buffer(torch.ones(8))
        self.constant = torch.ones(8)

    def forward(self, x):
        mean = x.mean(0)
        self.running.mul_(0.9).add_(mean, alpha=0.1)
        self.constant.add_(1)
        return (x - self.running).div_(self.constant)


def test_buffers_are_written_to():
    eager, x = Registered(), torch.randn(16, 8)
    model = copy.deepcopy(eager)
    with torch.no_grad():
        got, (graph,) = captured(model, x)
        assert torch.equal(got, eager(x))
    assert torch.equal(model.running, eager.running)
    assert torch.equal(model.constant, eager.constant)
    assert writes_left(graph) == ["mul_", "add_", "add_"]


def test_batch_norm_updates_its_statistics():
    eager, x = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(inplace=True)), torch.randn(16, 8)
    model = copy.deepcopy(eager)
    got, (graph,) = captured(model, x)
    assert torch.equal(got, eager(x))
    for (name, mine), theirs in zip(model.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert "relu_" not in writes_left(graph)


def test_kept_where_a_higher_order_operator_reads_it():
    """A checkpointed body may return its operand."""

    def function(x):
        y = x.sin()
        kept = checkpoint(lambda t: t, y, use_reentrant=False)
        y.mul_(2)
        return kept + y

    left = assert_same(function, torch.randn(16, 8))
    assert "mul_" in left


@torch.library.custom_op("normfx_tests::touch", mutates_args={"x"})
def touch(x: torch.Tensor) -> None:
    x.add_(1)


def test_kept_where_a_custom_operator_writes_to_it():
    def function(x):
        y = (x * 1).mul_(2)
        touch(y)
        return y.sub_(3)

    assert assert_same(function, torch.randn(16, 8)) == ["mul_", "touch", "sub_"]


def test_a_duplicate_item_of_a_tuple_is_the_same_tensor():
    x = torch.randn(4, 8)

    class Twice(nn.Module):
        def forward(self, x):
            return x

    gm = fx.symbolic_trace(Twice())
    fake = FakeTensorMode().from_tensor(x)
    graph = gm.graph
    (given,) = graph.find_nodes(op="placeholder")
    given.meta["val"] = fake
    (output,) = graph.find_nodes(op="output")
    aten = torch.ops.aten
    with graph.inserting_before(output):

        def call(target, *args):
            node = graph.call_function(target, args)
            values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
            with fake.fake_mode:
                node.meta["val"] = target(*values)
            return node

        pair = call(aten.var_mean.correction, given, [-1])
        first = call(operator.getitem, pair, 0)
        call(aten.add_.Scalar, first, 1)
        second = call(operator.getitem, pair, 0)
    output.args = (second,)
    functional(gm)
    gm.recompile()
    assert writes_left(graph) == ["add_"]
    assert torch.equal(gm(x), x.var(-1) + 1)
