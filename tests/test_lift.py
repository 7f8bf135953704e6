"""Every row of `lift.RULES`: an operator, its polynomial, and the number that both give.

A row without a case fails `test_every_row_has_a_case`. The polynomial of a value is evaluated in float64, with a
tensor that has one dim for every axis of x: x, an operand or a slice where their layouts say, moments over their own
axes. It is laid out as the value claims to be and compared with what the operators give. So are all values before it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from normfx import graph as g
from normfx.algebra import Poly
from normfx.laws import ARRANGEMENTS, RULES, VIEWS
from normfx.layout import Layout
from normfx.lift import Lift
from normfx.lifted import Lifted, Operand
from normfx.torch_internals import fused_multiply_add, trace_pre_dispatch

aten = torch.ops.aten
SHAPE = (3, 5)

# operator -> a function of x (3, 5), w (5,) and m, the mean of x over the last dim, whose last operator it is
CASES: dict[Any, Callable[..., Any]] = {
    aten.add: lambda x, w, m: torch.add(x, w, alpha=2),
    aten.sub: lambda x, w, m: torch.sub(x, m, alpha=3),
    aten.subtract: lambda x, w, m: aten.subtract.Tensor(x, m, alpha=2),
    aten.rsub: lambda x, w, m: torch.rsub(x, m, alpha=2),
    aten.mul: lambda x, w, m: x * w,
    aten.multiply: lambda x, w, m: aten.multiply.Tensor(m, x),
    aten.div: lambda x, w, m: x / 3,
    aten.divide: lambda x, w, m: aten.divide.Tensor(x, w),
    aten.true_divide: lambda x, w, m: aten.true_divide.Tensor(x, (x * x).mean(-1, True)),
    aten.neg: lambda x, w, m: -(x - m),
    aten.negative: lambda x, w, m: aten.negative.default(x),
    aten.reciprocal: lambda x, w, m: ((x * x).mean(-1, True) + 0.5).reciprocal(),
    aten.sqrt: lambda x, w, m: ((x * x).mean(-1, True) + 0.5).sqrt(),
    aten.rsqrt: lambda x, w, m: (3 * (x * x).mean(-1, True) + 0.5).rsqrt(),
    aten.square: lambda x, w, m: aten.square.default(x - m),
    aten.abs: lambda x, w, m: x.abs(),
    aten.absolute: lambda x, w, m: aten.absolute.default((x * x).mean(-1, True)),
    aten.pow: lambda x, w, m: (x - m) ** 3,
    aten.float_power: lambda x, w, m: torch.float_power((x * x).mean(-1, True), -1.5),
    aten.clamp: lambda x, w, m: (x * x).mean(-1, True).clamp(min=0.9),
    aten.clamp_min: lambda x, w, m: (x * x).mean(-1, True).clamp_min(0.0),
    aten.clip: lambda x, w, m: aten.clip.default((x * x).mean(-1, True), 0.9),
    aten.maximum: lambda x, w, m: torch.maximum(torch.full((), 0.9), x.var(-1, keepdim=True)),
    aten.max: lambda x, w, m: torch.max(x * w, x.std(-1, keepdim=True)),
    aten.addcmul: lambda x, w, m: torch.addcmul(x, m, w, value=2),
    aten.addcdiv: lambda x, w, m: torch.addcdiv(x, m, w, value=0.5),
    aten.lerp: lambda x, w, m: torch.lerp(x, m, 0.25),
    fused_multiply_add(): lambda x, w, m: fused_multiply_add()(x, (x * w), x - m),
    # the same numbers
    aten.to: lambda x, w, m: (x - m).to(torch.float64),
    aten._to_copy: lambda x, w, m: aten._to_copy.default(x, dtype=torch.float64),
    aten.type_as: lambda x, w, m: (x * 2).type_as(x),
    aten.clone: lambda x, w, m: x.clone(),
    aten.contiguous: lambda x, w, m: aten.contiguous.default(x),
    aten.alias: lambda x, w, m: aten.alias.default(x),
    aten.detach: lambda x, w, m: x.detach(),
    aten.copy: lambda x, w, m: aten.copy.default(x * w, m),
    aten.dropout: lambda x, w, m: torch.dropout(x, 0.5, False),
    # statistics
    aten.mean: lambda x, w, m: (x * x - 2 * x).mean(-1, True),
    aten.sum: lambda x, w, m: (x - m).square().sum(-1),
    aten.adaptive_avg_pool1d: lambda x, w, m: F.adaptive_avg_pool1d(x * x, 1),
    aten.adaptive_avg_pool2d: lambda x, w, m: F.adaptive_avg_pool2d(x[:, None] * 2, 1),
    aten.var: lambda x, w, m: x.var(-1, keepdim=True),
    aten.std: lambda x, w, m: x.std(-1, correction=0, keepdim=True),
    aten.var_mean: lambda x, w, m: torch.var_mean(2 * x + 1, -1, correction=2, keepdim=True)[0],
    aten.std_mean: lambda x, w, m: torch.std_mean(x, -1, keepdim=True)[1],
    aten.norm: lambda x, w, m: aten.norm.ScalarOpt_dim(x, 2, [-1], True),
    aten.linalg_vector_norm: lambda x, w, m: torch.linalg.vector_norm(x - m, 2, -1, keepdim=True),
    aten.frobenius_norm: lambda x, w, m: aten.frobenius_norm.dim(x, [-1], True),
    operator.getitem: lambda x, w, m: torch.std_mean(x, -1, keepdim=True)[0],
    aten.avg_pool1d: lambda x, w, m: F.avg_pool1d(x * x, 3, 1, 1),
    aten.avg_pool2d: lambda x, w, m: F.avg_pool2d((x * x)[:, None], (1, 5), 1, (0, 2)),
    aten.avg_pool3d: lambda x, w, m: F.avg_pool3d(
        F.pad((x - m)[:, None, :, None, None], (0, 0, 0, 0, 2, 1)), (4, 1, 1), 1
    ),
    aten.dot: lambda x, w, m: torch.dot(x.sum(0), w),
    aten.vdot: lambda x, w, m: aten.vdot.default(x.mean(0), w),
    aten.mv: lambda x, w, m: torch.mv(x, w),
    aten.bmm: lambda x, w, m: torch.bmm(x[:, None], (x * w)[:, :, None]),
    aten.matmul: lambda x, w, m: (x - m)[:, None] @ (x * w)[..., None],
    aten.inner: lambda x, w, m: torch.inner(x.mean(0), w),
    aten.linalg_vecdot: lambda x, w, m: torch.linalg.vecdot(x, x * w),
    aten.einsum: lambda x, w, m: torch.einsum("ij, j -> i", x - m, w),
    # functions of which only the name is known
    aten.sigmoid: lambda x, w, m: torch.sigmoid(w * x),
    aten.silu: lambda x, w, m: F.silu(x - m),
    aten.tanh: lambda x, w, m: torch.tanh(0.5 * x),
    # other looks at the same numbers
    aten.view: lambda x, w, m: (x - m).view(15),
    aten.reshape: lambda x, w, m: x.mean(-1).reshape(3, 1),
    aten._unsafe_view: lambda x, w, m: aten._unsafe_view.default(x, [1, 3, 5]),
    aten.unsqueeze: lambda x, w, m: x.mean(-1).unsqueeze(-1),
    aten.squeeze: lambda x, w, m: m.squeeze(-1),
    aten.flatten: lambda x, w, m: (x * w).flatten(0, 1),
    aten.unflatten: lambda x, w, m: x.mean(-1).unflatten(0, (3, 1)),
    aten.view_as: lambda x, w, m: x.mean(-1).view_as(m),
    aten.reshape_as: lambda x, w, m: x.flatten().reshape_as(x * 2),
    aten.permute: lambda x, w, m: (x - m).permute(1, 0),
    aten.transpose: lambda x, w, m: (x * w).transpose(0, 1),
    aten.t: lambda x, w, m: (x * w).t(),
    aten.movedim: lambda x, w, m: (x * w)[:, None].movedim(0, 2),
    aten.moveaxis: lambda x, w, m: aten.moveaxis.int((x * w)[:, None], 2, 0),
    aten.swapaxes: lambda x, w, m: aten.swapaxes.default(x * w, 0, 1),
    aten.swapdims: lambda x, w, m: aten.swapdims.default(x * w, 0, -1),
    aten.numpy_T: lambda x, w, m: (x * w).T,
    aten.mT: lambda x, w, m: (x * w)[:, None].mT,
    aten.adjoint: lambda x, w, m: aten.adjoint.default(x * w),
    aten.expand: lambda x, w, m: m.expand(3, 5),
    aten.expand_as: lambda x, w, m: m.expand_as(x),
    aten.repeat: lambda x, w, m: m.repeat(1, 5),
    aten.tile: lambda x, w, m: m.tile(5),
    aten.repeat_interleave: lambda x, w, m: m.repeat_interleave(5, 1),
    aten.slice: lambda x, w, m: x[:, :3],
    aten.narrow: lambda x, w, m: x.narrow(1, 1, 3),
    aten.select: lambda x, w, m: (x * w)[:, None].select(1, 0),
    aten.split: lambda x, w, m: torch.split(x - 1, 2, -1)[1],
    aten.split_with_sizes: lambda x, w, m: torch.split(x * x, [2, 3], -1)[1],
    aten.chunk: lambda x, w, m: torch.chunk(x, 2, 1)[1],
    aten.tensor_split: lambda x, w, m: torch.tensor_split(x, 2, 1)[1],
}
# Rows whose value is a tuple: the case ends in an element of it.
SEVERAL = {
    aten.var_mean,
    aten.std_mean,
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.tensor_split,
}


@contextmanager
def double():
    """Literals in float64, as everything here is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Got(NamedTuple):
    """A lifted function.

    Attributes:
        lift: the lift of x.
        output: the last node.
        value: what it was lifted to.
        gm: the graph.
    """

    lift: Lift
    output: fx.Node
    value: Any
    gm: fx.GraphModule


def lifted(
    function: Callable[..., Any],
    *,
    grad: bool = False,
    shape: tuple[int, ...] = SHAPE,
    views: bool = False,
    dynamic: bool = False,
) -> Got:
    """The lift of the last value of a function of x, w and the mean of x over its last dim.

    Args:
        function: what to lift.
        grad: whether gradients flow.
        shape: of x; w is as long as its last dim.
        views: whether the views on the way cut the axes of x.
        dynamic: whether the sizes are symbols.
    """

    def whole(x: Any, w: Any) -> Any:
        return function(x, w, x.mean(-1, keepdim=True))

    plain = torch.empty(shape, dtype=torch.float64)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv() if dynamic else None)
    with mode, double():
        x = mode.from_tensor(plain, static_shapes=not dynamic)
        gm = trace_pre_dispatch(whole, [x, x.new_empty(x.shape[-1:])])
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    x = gm.graph.find_nodes(op="placeholder")[0]
    output: Any = gm.graph.output_node().args[0]
    lift = Lift(x, order, grad=grad, path=looks_at(x) if views else [])
    return Got(lift, output, lift.value_of(output), gm)


def looks_at(x: fx.Node) -> list[fx.Node]:
    """The last view of a tensor in the graph, and the views before it."""
    found: list[fx.Node] = []
    for node in x.graph.nodes:
        if g.packet(node) in VIEWS | ARRANGEMENTS and node.args[0] in (x, *found):
            known = found.index(node.args[0]) + 1 if node.args[0] is not x else 0
            found = [*found[:known], node]
    return found


class Run(fx.Interpreter):
    """What each node of a graph holds, for an x and a w in float64."""

    def __init__(self, gm: fx.GraphModule, shape: tuple[int, ...], seed: int) -> None:
        super().__init__(gm)
        self.held: dict[fx.Node, Any] = {}
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
        w = torch.randn(shape[-1:], generator=generator, dtype=torch.float64)
        with double():
            self.run(x, w)

    def run_node(self, n: fx.Node) -> Any:
        self.held[n] = super().run_node(n)
        return self.held[n]


class Numbers:
    """The polynomials of a lift in numbers: tensors with one dim for every axis there is.

    What is constant along an axis has size one there. Every atom is checked to vary only along the axes that it says,
    and to be nonnegative where it says so.
    """

    def __init__(self, lift: Lift, held: dict[fx.Node, Any]) -> None:
        self.lift, self.held = lift, held
        self.rank = len(lift.axes._sizes)

    def spread(self, tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
        """A tensor whose dims stand for these axes."""
        axes = [axis for dim in layout for axis in dim]
        apart = tensor.reshape([self.lift.axes.size((axis,)) for axis in axes])
        missing = [axis for axis in range(self.rank) if axis not in axes]
        apart = apart.reshape([*apart.shape, *[1] * len(missing)])
        order = [*axes, *missing]
        return apart.permute([order.index(axis) for axis in range(self.rank)])

    def x(self, varies: frozenset[int]) -> torch.Tensor:
        """X, or a slice of it, along these axes."""
        for (axis, start, size), part in self.lift.axes._slices.items():
            if part in varies:
                source = self.x(varies - {part} | {axis})
                return source.narrow(axis, start, size).transpose(axis, part)
        return self.spread(self.held[self.lift.x], self.lift.axes.whole)

    def atom(self, index: int) -> torch.Tensor:
        atom = self.lift.ring.atoms[index]
        first = None if atom.base is None else self.poly(atom.base)
        if atom.kind == "x":
            result = self.x(atom.varies)
        elif atom.kind == "opaque":
            assert isinstance(atom.key, Operand)
            result = self.spread(self.held[atom.key.node], atom.key.layout)
        elif atom.kind == "constant":
            result = torch.full([1] * self.rank, float(atom.key), dtype=torch.float64)
        elif atom.kind == "moment":
            assert first is not None
            result = first.mean(sorted(atom.key), keepdim=True)
        elif atom.kind == "compound":
            assert first is not None
            result = first
        elif atom.kind == "maximum":
            assert first is not None
            assert atom.other is not None
            result = torch.maximum(first, self.poly(atom.other))
        else:
            assert atom.kind == "function"
            assert first is not None
            result = self.function(atom.key, first)
        along = {axis for axis, size in enumerate(result.shape) if size != 1}
        assert along <= atom.varies
        if atom.nonnegative:
            assert result.min() >= -(2.0**-48) * result.abs().max()
        return result

    def function(self, name: Any, argument: torch.Tensor) -> torch.Tensor:
        if not isinstance(name, tuple):
            return {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[name](argument)
        _, axis, window = name
        shape = list(argument.shape)
        shape[axis] = self.lift.axes.size((axis,))
        last = argument.expand(shape).movedim(axis, -1)
        padded = F.pad(last, (window // 2, (window - 1) // 2))
        return padded.unfold(-1, window, 1).mean(-1).movedim(-1, axis)

    def poly(self, p: Poly) -> torch.Tensor:
        total = torch.zeros([1] * self.rank, dtype=torch.float64)
        for monomial, coefficient in p.terms.items():
            term = torch.full([1] * self.rank, float(coefficient), dtype=torch.float64)
            for index, exponent in monomial:
                term = term * self.atom(index) ** float(exponent)
            total = total + term
        return total

    def laid(self, value: Lifted) -> torch.Tensor:
        """A lifted value as the tensor that it claims to be."""
        axes = [axis for dim in value.layout for axis in dim]
        assert len(set(axes)) == len(axes)
        numbers = self.poly(value.poly)
        along = {axis for axis, size in enumerate(numbers.shape) if size != 1}
        assert along <= set(axes), "it is constant along what its layout has not"
        shape = [self.lift.axes.size((a,)) if a in axes else 1 for a in range(self.rank)]
        rest = [axis for axis in range(self.rank) if axis not in axes]
        apart = numbers.expand(shape).permute([*axes, *rest])
        return apart.reshape([self.lift.axes.size(dim) for dim in value.layout])


def assert_right(got: Got, shape: tuple[int, ...] = SHAPE, *, seed: int = 3, units: float = 64):
    """Every lifted value of a graph is what its node holds, up to some units of 2^-53."""
    run = Run(got.gm, shape, seed)
    checked = 0
    for node, value in got.lift.values.items():
        pairs = zip(value, run.held[node], strict=True) if isinstance(value, tuple) else []
        for mine, wanted in [(value, run.held[node]), *pairs]:
            if not isinstance(mine, Lifted):
                continue
            laid = Numbers(got.lift, run.held).laid(mine)
            assert torch.broadcast_shapes(laid.shape, wanted.shape) == wanted.shape, node
            # Moments are of size one; a square of a difference is added up from terms of that size.
            bound = units * 2.0**-53 * max(1.0, wanted.abs().max().item())
            assert (laid - wanted).abs().max().item() <= bound, node
            checked += 1
    assert checked


def test_every_row_has_a_case():
    assert set(CASES) == set(RULES)


def name_of(target: Any) -> str:
    return str(target).removeprefix("aten.")


@pytest.mark.parametrize("target", list(CASES), ids=name_of)
def test_the_polynomial_of_an_operator_is_what_it_computes(target: Any):
    got = lifted(CASES[target])
    last: Any = got.output.args[0] if target in SEVERAL else got.output
    called = g.packet(last) or last.target
    assert called == target, f"the case ends in {called}"
    assert isinstance(got.value, Lifted)
    assert_right(got)


# Values with several statistics, operands under a mean, slices: name -> shape of x, function.
LIFTED: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "cube root": (SHAPE, lambda x, w, m: ((x * x).mean(-1, True) + 1) ** (1 / 3)),
    "power of 3/4": (SHAPE, lambda x, w, m: (x * x).mean(-1, True) ** -0.75),
    "fourth power": (SHAPE, lambda x, w, m: x**-4),
    "masked mean": (SHAPE, lambda x, w, m: (x * w).mean(-1, True)),
    "masked variance": (
        SHAPE,
        lambda x, w, m: ((x - (x * w * w).sum(-1, True) / 7) ** 2 * w * w).sum(-1, True),
    ),
    "mean of |x|": (SHAPE, lambda x, w, m: x.abs().mean(-1, True)),
    "mean of a root": (SHAPE, lambda x, w, m: (x * x + 1).sqrt().mean(-1, True)),
    "mean of a normed x": (SHAPE, lambda x, w, m: (x / (x * x + 3)).mean(-1, True)),
    "mean of a sigmoid": (SHAPE, lambda x, w, m: torch.sigmoid(x - m).mean(-1, True)),
    "mean over the other dim": (SHAPE, lambda x, w, m: x.mean(0, True)),
    "mean over all": (SHAPE, lambda x, w, m: x.mean()),
    "mean of means": (SHAPE, lambda x, w, m: (x * x).mean(0).mean(0)),
    "sum of an empty list of dims": (SHAPE, lambda x, w, m: aten.sum.dim_IntList(x, [])),
    "variance over all": (SHAPE, lambda x, w, m: x.var()),
    "norm over all": (SHAPE, lambda x, w, m: torch.linalg.vector_norm(x - x.mean(0))),
    "mean of norms": (
        (2, 3, 4),
        lambda x, w, m: x.norm(dim=2, keepdim=True).mean(1, keepdim=True),
    ),
    "variance of means": ((2, 3, 4), lambda x, w, m: x.mean(-1).var(1, keepdim=True)),
    "variance of x centred elsewhere": (
        (2, 3, 4),
        lambda x, w, m: (x - x.mean(0, True)).var((1, 2), keepdim=True),
    ),
    "both statistics of a GRN": (
        (2, 3, 4, 2),
        lambda x, w, m: (
            x
            * x.norm(dim=(1, 2), keepdim=True)
            / (x.norm(dim=(1, 2), keepdim=True).mean(-1, True) + 1)
        ),
    ),
    "both statistics of an EvoNorm": (
        (2, 3, 4),
        lambda x, w, m: (
            x
            / torch.maximum(
                (x.var((0, 2), keepdim=True) + 0.1).sqrt(),
                w * x + (x.var(2, keepdim=True, correction=0) + 0.1).sqrt(),
            )
        ),
    ),
    "maximum that reads x": (SHAPE, lambda x, w, m: torch.maximum(x, m)),
    "maximum of the same": (SHAPE, lambda x, w, m: torch.maximum(x * w, x * w)),
    "maximum of three": (SHAPE, lambda x, w, m: torch.maximum(torch.maximum(x, m), -x)),
    "clamp to a tensor": (SHAPE, lambda x, w, m: x.var(-1, keepdim=True).clamp(min=m)),
    "statistic of a slice": (SHAPE, lambda x, w, m: x[:, :3].square().mean(-1, True)),
    "slice along both dims": (SHAPE, lambda x, w, m: x[1:, 2:4].mean((0, 1))),
    "slice of a square": (SHAPE, lambda x, w, m: (x * x - m)[:, 1:]),
    "slice of the other dim": (SHAPE, lambda x, w, m: (x * w - x.mean(0))[1:].square()),
    "slice of a slice": (SHAPE, lambda x, w, m: x[:, 1:][:, 1:3] - 1),
    "slice of all": (SHAPE, lambda x, w, m: (x * w)[:, :5] - m),
    "slice of a mean": (SHAPE, lambda x, w, m: m.expand(3, 5)[:, :2]),
    "slices with an operand": (SHAPE, lambda x, w, m: (x[:, 1:] * w[1:]).mean(-1, True)),
    "two slices": (SHAPE, lambda x, w, m: x[:, :2].mean(-1, True) - x[:, 3:].mean(-1, True)),
    "x and a slice of it": (SHAPE, lambda x, w, m: x / (x[:, :2].var(-1, keepdim=True) + 1)),
    "slices next to each other": (SHAPE, lambda x, w, m: sum(p.mean(-1) for p in x.split(2, -1))),
    "slice of one element": (SHAPE, lambda x, w, m: x[:, :1].square()),
    "scalar product": ((7,), lambda x, w, m: x / torch.dot(x, x * w)),
    "product with its transpose": ((4, 5), lambda x, w, m: torch.einsum("ij,ji->", x, x.t())),
    "product with a mean": (SHAPE, lambda x, w, m: torch.einsum("ij,ik->i", x, m)),
    "batch of products": ((2, 3, 4), lambda x, w, m: torch.einsum("bij,bij->bj", x, x * w)),
    "transposed product": ((2, 3, 4), lambda x, w, m: torch.einsum("bij,j->ib", x, w)),
    "einsum with an ellipsis": (
        (2, 3, 4),
        lambda x, w, m: torch.einsum("...j, j -> ...", x - m, w),
    ),
    "einsum over an ellipsis": (
        (2, 3, 4),
        lambda x, w, m: torch.einsum("...j,...j->j", x, x - m),
    ),
    "einsum with an ellipsis of nothing": (
        SHAPE,
        lambda x, w, m: torch.einsum("...ij,...ij->i...", x, x),
    ),
    "matmul of vectors": ((5,), lambda x, w, m: x / (x @ w)),
    "matmul of a matrix and a vector": (SHAPE, lambda x, w, m: x @ (w * x.mean(0))),
    "matmul of a batch": (
        (2, 3, 1, 4),
        lambda x, w, m: (x @ x.transpose(2, 3)) * (x * x).mean((0, 1), True),
    ),
    "matmul with its own operand": (
        (2, 3, 4),
        lambda x, w, m: x @ w[None, :, None].expand(2, 4, 1),
    ),
    "vecdot of another dim": (
        (2, 3, 4),
        lambda x, w, m: torch.linalg.vecdot(x, x - m, dim=1),
    ),
    "uneven parts": (SHAPE, lambda x, w, m: torch.tensor_split(x, [2, 4], 1)[1].square()),
    "einsum with spaces": (SHAPE, lambda x, w, m: torch.einsum(" i j , i j -> j ", x, x)),
    "outer product of statistics": (
        (3, 4),
        lambda x, w, m: torch.einsum("i,j->ij", x.mean(1), x.mean(0)),
    ),
    "mean of a permuted x": ((2, 3, 4), lambda x, w, m: x.permute(2, 0, 1).mean(0)),
    "centred through a permutation": (
        (3, 3, 3),
        lambda x, w, m: (x.permute(2, 0, 1) - x.permute(2, 0, 1).mean(0)).permute(1, 2, 0) - m,
    ),
    "mean over a flattened x": ((2, 3, 4), lambda x, w, m: x.flatten(1).var(1)[:, None, None]),
    "flattened out of order": (
        (3, 3, 3),
        lambda x, w, m: (
            x.transpose(1, 2).reshape(3, 9) - x.transpose(1, 2).flatten(1).mean(1, True)
        ),
    ),
    "window of a window": (
        (2, 6),
        lambda x, w, m: F.avg_pool1d(F.avg_pool1d(x - m, 3, 1, 1), 5, 1, 2).sum(),
    ),
    "window of a slice": ((2, 6), lambda x, w, m: F.avg_pool1d(x[:, 2:], 3, 1, 1) * w[2:]),
    "window of an even size": (
        (2, 6),
        lambda x, w, m: F.avg_pool1d(F.pad(x * x, (1, 0)), 2, 1),
    ),
    "window that is wider than x": ((2, 3), lambda x, w, m: F.avg_pool1d(x, 5, 1, 2)),
    "local response": (
        (2, 6, 3),
        lambda x, w, m: F.local_response_norm(x, 4, alpha=0.5, beta=0.75, k=2.0),
    ),
    "local response of an image": (
        (2, 6, 3, 2),
        lambda x, w, m: F.local_response_norm(x, 3, alpha=0.5, beta=0.5, k=1.0),
    ),
}


@pytest.mark.parametrize("name", list(LIFTED))
def test_values_of_several_statistics(name: str):
    shape, function = LIFTED[name]
    got = lifted(function, shape=shape)
    assert isinstance(got.value, Lifted)
    assert_right(got, shape)


def grouped(x: Any, channels_last: bool = False) -> Any:
    """X with its channels in groups of two."""
    return x.unflatten(-1 if channels_last else 1, (-1, 2))


# Views that cut an axis of x, on the way to a statistic.
CUT: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "group norm": (
        (2, 6, 3),
        lambda x, w, m: (
            (grouped(x) - grouped(x).mean((2, 3), True)) * grouped(x).var((2, 3), keepdim=True)
        ).view(2, 6, 3),
    ),
    "group norm through one dim": (
        (2, 6, 3),
        lambda x, w, m: x.view(2, 3, -1).var(2)[:, :, None].expand(2, 3, 6).reshape(2, 6, 3) - x,
    ),
    "groups of channels last": (
        (2, 3, 6),
        lambda x, w, m: grouped(x, True).square().mean((1, 3), True) * grouped(x * w, True),
    ),
    "groups through a permutation": (
        (2, 3, 6),
        lambda x, w, m: grouped(x.permute(0, 2, 1)).mean((2, 3)),
    ),
    "one mean for each group, repeated": (
        (2, 6, 3),
        lambda x, w, m: x - grouped(x).mean((2, 3)).repeat_interleave(2, 1)[:, :, None],
    ),
    "outer axes of two dims": (
        (4, 6),
        lambda x, w, m: x.view(2, 2, 3, 2).mean((0, 2), True).expand(2, 2, 3, 2).reshape(4, 6) * w,
    ),
    "window of a cut dim": (
        (2, 6, 3),
        lambda x, w, m: F.avg_pool2d(grouped(x), (3, 1), 1, (1, 0)).sum((1, 2)),
    ),
    "cut twice": ((12, 2), lambda x, w, m: x.view(6, 4).view(2, 3, 2, 2).var((1, 3))),
    "shuffled channels": (
        (2, 6, 3),
        lambda x, w, m: x.view(2, 3, 2, 3).transpose(1, 2).reshape(2, 6, 3).mean(1),
    ),
}


@pytest.mark.parametrize("name", list(CUT))
def test_views_that_cut_a_dim_on_the_way_to_a_statistic(name: str):
    shape, function = CUT[name]
    got = lifted(function, shape=shape, views=True)
    assert isinstance(got.value, Lifted)
    assert_right(got, shape)


@pytest.mark.parametrize("name", list(CUT))
def test_views_that_cut_a_dim_elsewhere(name: str):
    shape, function = CUT[name]
    got = lifted(function, shape=shape)
    assert got.lift.stuck is not None
    assert got.lift.stuck.law == "view-mixes-dims"


REFUSED: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "root of a mean": (SHAPE, lambda x, w, m: m.sqrt()),
    "root of x": (SHAPE, lambda x, w, m: x.sqrt()),
    "root of an operand": (SHAPE, lambda x, w, m: (m * w).sqrt()),
    "root of a masked mean": (SHAPE, lambda x, w, m: (x * x * w).mean(-1).sqrt()),
    "fifth power": (SHAPE, lambda x, w, m: x**5),
    "power of -4.5": (SHAPE, lambda x, w, m: (x * x).mean(-1) ** -4.5),
    "power that is a tensor": (SHAPE, lambda x, w, m: x**w),
    "power of a number": (SHAPE, lambda x, w, m: 2**x),
    "floor division": (SHAPE, lambda x, w, m: torch.div(x, 2, rounding_mode="floor")),
    "ceiling": (SHAPE, lambda x, w, m: x.clamp(max=1.0)),
    "clamp from both sides": (SHAPE, lambda x, w, m: x.clamp(-1, 1)),
    "clip from both sides": (SHAPE, lambda x, w, m: x.clip(-1, 1)),
    "clip from above": (SHAPE, lambda x, w, m: (x * x).mean(-1, True).clip(max=1.0)),
    "minimum": (SHAPE, lambda x, w, m: torch.minimum(x, m)),
    "greatest element": (SHAPE, lambda x, w, m: x.max()),
    "greatest of a row": (SHAPE, lambda x, w, m: x.max(-1)[0]),
    "cast to float8": (SHAPE, lambda x, w, m: x.to(torch.float8_e4m3fn)),
    "cast through float8": (SHAPE, lambda x, w, m: x.to(torch.float8_e5m2).to(torch.float32)),
    "active dropout": (SHAPE, lambda x, w, m: torch.dropout(x, 0.5, True)),
    "cast to integers": (SHAPE, lambda x, w, m: x.to(torch.int32)),
    "one-norm": (SHAPE, lambda x, w, m: torch.linalg.vector_norm(x, 1, -1, keepdim=True)),
    "three-norm": (SHAPE, lambda x, w, m: aten.norm.ScalarOpt_dim(x, 3, [-1])),
    "greatest value": (SHAPE, lambda x, w, m: torch.linalg.vector_norm(x, float("inf"), -1)),
    "variance of one": ((3, 1), lambda x, w, m: x.var(-1)),
    "pooled to two": (SHAPE, lambda x, w, m: F.adaptive_avg_pool1d(x, 2)),
    "pooled to a row": (SHAPE, lambda x, w, m: F.adaptive_avg_pool2d(x[None], (1, 5))),
    "relu": (SHAPE, lambda x, w, m: torch.relu(x)),
    "sum as integers": (SHAPE, lambda x, w, m: x.sum(-1, dtype=torch.int32)),
    "sum as float8": (SHAPE, lambda x, w, m: aten.sum.default(x, dtype=torch.float8_e4m3fn)),
    # numbers that are none
    "infinite factor": (SHAPE, lambda x, w, m: x * float("inf")),
    "floor without an end": (SHAPE, lambda x, w, m: x.clamp(min=float("-inf"))),
    "infinite tensor": (SHAPE, lambda x, w, m: torch.maximum(x, torch.full((), float("-inf")))),
    "not a number": (SHAPE, lambda x, w, m: m + float("nan")),
    "infinite power": (SHAPE, lambda x, w, m: x ** float("inf")),
    "infinite value": (SHAPE, lambda x, w, m: torch.addcmul(x, m, w, value=float("inf"))),
    "infinite alpha": (SHAPE, lambda x, w, m: torch.add(x, w, alpha=float("inf"))),
    # one axis of x along two dims
    "outer sum": ((4, 5), lambda x, w, m: m + x.mean(-1)),
    "outer product of a statistic": ((4, 5), lambda x, w, m: x.var(1, keepdim=True) * x.mean(1)),
    "outer maximum": ((4, 5), lambda x, w, m: torch.maximum(m, x.mean(1))),
    "x along two dims": ((4, 5), lambda x, w, m: x + x[:, None]),
    "outer sum by views": ((4, 5), lambda x, w, m: x.view(4, 1, 5) + x.view(1, 4, 5)),
    # products that are no sums of products of elements that belong together
    "Gram matrix": (SHAPE, lambda x, w, m: torch.einsum("ij,kj->ik", x, x)),
    "Gram matrix of columns": (SHAPE, lambda x, w, m: torch.einsum("ij,ik->jk", x, x)),
    "Gram matrix by bmm": ((2, 3, 4), lambda x, w, m: torch.bmm(x, x.mT)),
    "square by bmm": ((2, 4, 4), lambda x, w, m: torch.bmm(x, x)),
    "square by einsum": ((4, 4), lambda x, w, m: torch.einsum("ij,jk->ik", x, x)),
    "diagonal": ((4, 4), lambda x, w, m: torch.einsum("ii,i->i", x, w)),
    "diagonal of an operand": (
        (4, 4),
        lambda x, w, m: torch.einsum("ii,ij->j", torch.outer(w, w), x),
    ),
    "trace": ((4, 4), lambda x, w, m: torch.einsum("ii->", x)),
    "trace of a product": ((4, 4), lambda x, w, m: torch.einsum("ij,ji->", x, x)),
    "outer product": ((4,), lambda x, w, m: torch.einsum("i,j->ij", x, x)),
    "einsum of one": (SHAPE, lambda x, w, m: torch.einsum("ij->i", x)),
    "einsum of three": (SHAPE, lambda x, w, m: torch.einsum("ij,ij,j->i", x, x, w)),
    "einsum with two ellipses": (
        (2, 3, 4),
        lambda x, w, m: torch.einsum("...j,...j->...", x, x[0] * 1),
    ),
    "Gram matrix by matmul": ((4, 4), lambda x, w, m: x @ x.mT),
    "square by matmul": ((4, 4), lambda x, w, m: x @ x),
    "batch of Gram matrices": ((2, 2, 3, 4), lambda x, w, m: x @ x.transpose(2, 3)),
    "inner products of all rows": (SHAPE, lambda x, w, m: torch.inner(x, x)),
    "vector times x": (SHAPE, lambda x, w, m: x.mean(1) @ x),
    "products with the next row": (
        (4, 4),
        lambda x, w, m: torch.linalg.vecdot(x, x.t()),
    ),
    "einsum without a result": (SHAPE, lambda x, w, m: torch.einsum("ij,j", x, w)),
    "product with other rows": (
        SHAPE,
        lambda x, w, m: torch.einsum("ij,kj->ik", x, torch.outer(w, w)),
    ),
    "matrix times x": ((5,), lambda x, w, m: torch.mv(torch.outer(w, w), x)),
    # looks at x that no layout has
    "view of x": (SHAPE, lambda x, w, m: x.view(5, 3)),
    "view of a square x": ((4, 4), lambda x, w, m: x.view(2, 8)),
    "view of a transposed x": ((4, 6), lambda x, w, m: x.t().reshape(4, 6)),
    "view as another dtype": (SHAPE, lambda x, w, m: x.view(torch.int64)),
    "repeated x": (SHAPE, lambda x, w, m: x.repeat(1, 2)),
    "repeated mean": (SHAPE, lambda x, w, m: x.mean(-1).repeat(2)),
    "tiled x": (SHAPE, lambda x, w, m: x.tile(2, 1)),
    "interleaved x": (SHAPE, lambda x, w, m: x.repeat_interleave(2, 1)),
    "interleaved and flat": (SHAPE, lambda x, w, m: m.repeat_interleave(5)),
    "slice with a step": (SHAPE, lambda x, w, m: x[:, ::2]),
    "slice of x times w": (SHAPE, lambda x, w, m: (x * w)[:, :3]),
    "slice of an operand's axis": (SHAPE, lambda x, w, m: (m * w)[:, 1:]),
    "slice of a statistic": (SHAPE, lambda x, w, m: (x - x.mean(0))[:, 1:]),
    "slice of a sigmoid": (SHAPE, lambda x, w, m: torch.sigmoid(x)[:, 1:]),
    "slice of flattened x": (SHAPE, lambda x, w, m: x.flatten()[:7]),
    "split of x times w": (SHAPE, lambda x, w, m: (x * w).split(2, -1)[0]),
    "chunk of flattened x": (SHAPE, lambda x, w, m: x.flatten().chunk(2)[0]),
    "element of x": (SHAPE, lambda x, w, m: x[:, 1]),
    # slices of one axis are axes of their own
    "difference of slices": (SHAPE, lambda x, w, m: x[:, 1:] - x[:, :-1]),
    "product of slices": ((4, 4), lambda x, w, m: x[:2, :2] * x[:2, 2:]),
    "slice of a window": (SHAPE, lambda x, w, m: F.avg_pool1d(x, 3, 1, 1)[:2]),
    # windows
    "stride": (SHAPE, lambda x, w, m: F.avg_pool1d(x, 3, 2, 1)),
    "stride of the window": (SHAPE, lambda x, w, m: F.avg_pool1d(x, 3, padding=1)),
    "no padding": (SHAPE, lambda x, w, m: F.avg_pool1d(x, 3, 1)),
    "padded on the wrong side": (SHAPE, lambda x, w, m: F.avg_pool1d(F.pad(x, (0, 1)), 2, 1)),
    "padded on one side": (SHAPE, lambda x, w, m: F.avg_pool1d(F.pad(x, (2, 0)), 3, 1)),
    "padded along another dim": (
        SHAPE,
        lambda x, w, m: F.avg_pool2d(F.pad(x[:, None], (1, 1, 0, 0, 1, 1)), (1, 3), 1),
    ),
    "padded twice": (SHAPE, lambda x, w, m: F.avg_pool1d(F.pad(x, (1, 1)), 5, 1, 1)),
    "padded with ones": (SHAPE, lambda x, w, m: F.avg_pool1d(F.pad(x, (1, 1), value=1.0), 3, 1)),
    "padded with x": (
        SHAPE,
        lambda x, w, m: F.avg_pool1d(F.pad(x[None], (1, 1), mode="reflect"), 3, 1),
    ),
    "padding that is not counted": (
        SHAPE,
        lambda x, w, m: F.avg_pool1d(x, 3, 1, 1, count_include_pad=False),
    ),
    "window of two dims": (SHAPE, lambda x, w, m: F.avg_pool2d(x[None], 3, 1, 1)),
    "window of two dims as one number": (
        SHAPE,
        lambda x, w, m: aten.avg_pool2d(x[None], [3], [1], [1]),
    ),
    "window of none": (SHAPE, lambda x, w, m: F.avg_pool1d(x, 1, 1)),
    "another divisor": (
        SHAPE,
        lambda x, w, m: F.avg_pool2d(x[:, None], (1, 3), 1, (0, 1), divisor_override=2),
    ),
    "window of a dim of size one": (
        SHAPE,
        lambda x, w, m: F.avg_pool2d(x[:, None], (3, 1), 1, (1, 0)),
    ),
    "window of flattened x": (SHAPE, lambda x, w, m: F.avg_pool1d(x.flatten()[None], 3, 1, 1)),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_provable_is_not_lifted(name: str):
    shape, function = REFUSED[name]
    got = lifted(function, shape=shape)
    assert got.value is None
    assert got.output not in got.lift.values or got.lift.stuck is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, m: x - x.mean(-1),
        lambda x, w, m: x - x.mean(-1, True).transpose(0, 1),
        lambda x, w, m: x * x.transpose(0, 1),
        lambda x, w, m: torch.maximum(x, x.mT),
        lambda x, w, m: torch.addcmul(x, m, x.mean(-1)),
        lambda x, w, m: x.var(0) + x.var(1),
    ],
    ids=["dropped", "transposed mean", "transposed x", "maximum", "addcmul", "1d"],
)
def test_a_square_matrix_does_not_hide_a_wrong_broadcast(function: Any):
    got = lifted(function, shape=(4, 4))
    assert got.value is None
    assert got.lift.stuck is not None
    assert got.lift.stuck.law == "broadcast-axis-differs"
    assert got.lift.stuck.node is got.output


def polys(function: Callable[..., Any], **how: Any) -> tuple[Poly, Poly]:
    """The two values that a function adds up under different letters: f(x, w, m)[0] and [1]."""
    got = lifted(lambda x, w, m: torch.stack(function(x, w, m)), **how)
    stacked: Any = got.output.args[0]
    first, second = (got.lift.value_of(node) for node in stacked)
    assert isinstance(first, Lifted)
    assert isinstance(second, Lifted)
    assert first.layout == second.layout
    return first.poly, second.poly


# Spellings of one value.
SAME: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "two-step mean": ((2, 3, 4), lambda x, w, m: (x.mean(1).mean(1), x.mean((1, 2)))),
    "mean of a flattened x": ((2, 3, 4), lambda x, w, m: (x.flatten(1).mean(1), x.mean((2, 1)))),
    "mean of an arranged x": ((2, 3, 4), lambda x, w, m: (x.permute(2, 0, 1).mean(0), x.mean(2))),
    "sum of sums": ((2, 3, 4), lambda x, w, m: (x.sum(2).sum(1) / 12, x.mean((1, 2)))),
    "unbiased": (SHAPE, lambda x, w, m: (x.var(-1) * 0.8, (x - m).square().mean(-1))),
    "norm and product": ((7,), lambda x, w, m: (x.norm() ** 2, torch.dot(x, x))),
    "products": (SHAPE, lambda x, w, m: (torch.mv(x, w), (x * w).sum(-1))),
    "einsum": (SHAPE, lambda x, w, m: (torch.einsum("ij,ij->i", x, x), x.norm(dim=1) ** 2)),
    "bmm": (
        SHAPE,
        lambda x, w, m: (torch.bmm(x[:, None], x[:, :, None]).flatten(), x.square().sum(1)),
    ),
    "matrix between vectors": (
        (4, 5),
        lambda x, w, m: (torch.dot(x.mean(1), torch.mv(x, w)), ((x * w).sum(1) * x.mean(1)).sum()),
    ),
    "maxima": (SHAPE, lambda x, w, m: (torch.maximum(x * w, m), torch.max(m, w * x))),
    "clamp and maximum": (
        SHAPE,
        lambda x, w, m: (m.clamp(min=0.25), torch.maximum(torch.full((), 0.25), m)),
    ),
    "floor that is never reached": (SHAPE, lambda x, w, m: (x.var(-1).clamp(min=0), x.var(-1))),
    "silu": (SHAPE, lambda x, w, m: (F.silu(x), x * torch.sigmoid(1.0 * x))),
    "slices": (SHAPE, lambda x, w, m: (x[:, :2].square(), x.square().split([2, 3], 1)[0])),
    "narrow and slice": (SHAPE, lambda x, w, m: (x.narrow(1, 2, 2), x[:, 2:4])),
    "pools": (
        (2, 6),
        lambda x, w, m: (
            F.avg_pool1d(F.pad(x, (1, 1)), 3, 1),
            F.avg_pool2d(x[:, None], (1, 3), 1, (0, 1)).squeeze(1),
        ),
    ),
}


@pytest.mark.parametrize("name", list(SAME))
def test_spellings_of_one_value_have_one_polynomial(name: str):
    shape, function = SAME[name]
    first, second = polys(function, shape=shape)
    assert first.is_close(second)


# Values that are equal in shape, and perhaps for some x, but not the same.
DIFFERENT: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "other slices": (SHAPE, lambda x, w, m: (x[:, :2].mean(-1), x[:, 1:3].mean(-1))),
    "slices of another size": (SHAPE, lambda x, w, m: (x[:, :2].mean(-1), x[:, :3].mean(-1))),
    "slice and all": (SHAPE, lambda x, w, m: (x[:, :2].mean(-1), x.mean(-1))),
    "mean of squares": (SHAPE, lambda x, w, m: ((x * x).mean(-1), x.mean(-1) ** 2)),
    "mean of roots": (
        (2, 3, 4),
        lambda x, w, m: (x.norm(dim=2).mean(1), (x.square().sum(2).mean(1)).sqrt()),
    ),
    "mean of products": (
        (2, 3, 4),
        lambda x, w, m: ((x.mean(2) * x.var(2)).mean(1), x.mean((1, 2)) * x.var(2).mean(1)),
    ),
    "windows": (SHAPE, lambda x, w, m: (F.avg_pool1d(x, 3, 1, 1), F.avg_pool1d(x, 5, 1, 2))),
    "a window and what it is of": (SHAPE, lambda x, w, m: (F.avg_pool1d(x, 3, 1, 1), x * 1)),
    "functions": (SHAPE, lambda x, w, m: (torch.tanh(x), torch.sigmoid(x))),
    "maximum and what it is of": (SHAPE, lambda x, w, m: (torch.maximum(x, m), x * 1)),
}


@pytest.mark.parametrize("name", list(DIFFERENT))
def test_other_values_have_other_polynomials(name: str):
    shape, function = DIFFERENT[name]
    first, second = polys(function, shape=shape)
    assert not first.is_close(second)


# What may be refused, but if it is lifted, then to the right value.
CAREFUL: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "window of a mean": (SHAPE, lambda x, w, m: F.avg_pool1d(m.expand(3, 5), 3, 1, 1)),
    "mean of a window of a mean": (
        SHAPE,
        lambda x, w, m: F.avg_pool1d(m.expand(3, 5), 3, 1, 1).mean(-1),
    ),
    "window of a constant": (SHAPE, lambda x, w, m: F.avg_pool1d(x - x + 1, 3, 1, 1).sum(1)),
    "expanded slice of one": (SHAPE, lambda x, w, m: x[:, :1].expand(3, 5)),
    "repeated slice of one": (SHAPE, lambda x, w, m: x[:, 2:3].repeat(1, 5).square()),
    "slice of one and an operand": (SHAPE, lambda x, w, m: (x[:, :1] * w).mean(-1)),
    "slices of one": (SHAPE, lambda x, w, m: x[:, :1] - x[:, 1:2]),
    "slice of one in another place": ((3, 3), lambda x, w, m: x[:, :1] * x[:1]),
    "squeezed slice of one": (SHAPE, lambda x, w, m: x[:, 1:2].squeeze(1)),
    "element of a slice of one": (SHAPE, lambda x, w, m: x[:, 1:2].select(1, 0)),
    "statistic of an element of a slice of one": (
        SHAPE,
        lambda x, w, m: x * x[:, 2:3].select(1, 0).square().mean(),
    ),
    "operand that is a statistic too": ((4, 4), lambda x, w, m: (x - w) * (w - w.mean())),
    "mean of an outer sum": ((4, 5), lambda x, w, m: (x.var(1, keepdim=True) + x.mean(1)).mean(1)),
}


@pytest.mark.parametrize("name", list(CAREFUL))
def test_what_is_lifted_is_right(name: str):
    shape, function = CAREFUL[name]
    assert_right(lifted(function, shape=shape), shape)


ABSOLUTE: dict[str, Callable[..., Any]] = {
    "m": lambda x, w, m: m.abs(),
    "w": lambda x, w, m: (m * w).abs(),
    "x - m": lambda x, w, m: (x - m).abs(),
    "square of |x - m|": lambda x, w, m: (x - m).abs() ** 2 * 1.0,
    "mean of |x - m|^2": lambda x, w, m: (x - m).abs().square().mean(-1, True) + 0.5,
    "root of m^2": lambda x, w, m: (m**2).sqrt() * 2,
}


@pytest.mark.parametrize("name", list(ABSOLUTE))
def test_absolute_values(name: str):
    got = lifted(ABSOLUTE[name])
    assert isinstance(got.value, Lifted)
    # |x - m| is the root of a square that is added up from its terms.
    assert_right(got, seed=4, units=2.0**29 if name == "x - m" else 64)


# -- random programs -----------------------------------------------------------------------------


def some(a: Any, n: int) -> list[int]:
    """Some of the dims of a tensor."""
    return [d for d in range(a.dim()) if n >> d & 1]


def one(a: Any, n: int) -> int:
    """A dim of a tensor."""
    return n % max(a.dim(), 1)


LETTERS = "ij,ij->i ij,ij->j ij,ij-> ij,jk->ik ij,jk->jk ij,j->i ij,k->ijk bij,bij->b bij,bj->bi"

# Steps: functions of two values before, w and a number. (A window of a constant, and a slice of size one: see above.)
STEPS: list[Callable[..., Any]] = [
    lambda a, b, w, n: a + b,
    lambda a, b, w, n: a - b,
    lambda a, b, w, n: a * b,
    lambda a, b, w, n: a / (b * b + 1),
    lambda a, b, w, n: torch.maximum(a, b),
    lambda a, b, w, n: torch.addcmul(a, b, w),
    lambda a, b, w, n: a * w,
    lambda a, b, w, n: a * torch.arange(1.0, a.shape[-1] + 1),
    lambda a, b, w, n: (a * a + 0.5).rsqrt(),
    lambda a, b, w, n: a.abs(),
    lambda a, b, w, n: torch.sigmoid(a),
    lambda a, b, w, n: a.mean(some(a, n), keepdim=n % 3 > 0),
    lambda a, b, w, n: a.sum(some(a, n), keepdim=n % 3 > 0),
    lambda a, b, w, n: a.square().mean(some(a, n), keepdim=True),
    lambda a, b, w, n: a.var(some(a, n), keepdim=n % 3 > 0, correction=n % 2),
    lambda a, b, w, n: a.norm(dim=some(a, n) or None, keepdim=True),
    lambda a, b, w, n: torch.einsum(LETTERS.split()[n % 9], a, b),
    lambda a, b, w, n: torch.bmm(a, b if n % 2 else b.mT),
    lambda a, b, w, n: torch.mv(a, b),
    lambda a, b, w, n: a @ (b if n % 2 else w),
    lambda a, b, w, n: torch.linalg.vecdot(a, b, dim=one(a, n)),
    lambda a, b, w, n: a.select(one(a, n), 0),
    lambda a, b, w, n: torch.dot(a, b),
    lambda a, b, w, n: a.transpose(one(a, n), one(a, n // 4)),
    lambda a, b, w, n: a.movedim(one(a, n), one(a, n // 4)),
    lambda a, b, w, n: a.flatten(one(a, n), one(a, n) + 1),
    lambda a, b, w, n: a.unflatten(one(a, n), (-1, 2)),
    lambda a, b, w, n: a.unsqueeze(one(a, n)),
    lambda a, b, w, n: a.squeeze(one(a, n)),
    lambda a, b, w, n: a.reshape(b.shape),
    lambda a, b, w, n: a.expand_as(b),
    lambda a, b, w, n: a.tile(2),
    lambda a, b, w, n: a.repeat_interleave(n % 4 + 1, one(a, n)),
    lambda a, b, w, n: a.narrow(one(a, n), n % 2, max(2, a.shape[one(a, n)] - 1)),
    lambda a, b, w, n: a.split(2, one(a, n))[0],
]


class Program:
    """Steps from x, w and the mean of x, those left out that do not run on a first x.

    Args:
        steps: for each the step, which of the values before it reads, and a number.
    """

    def __init__(self, steps: list[tuple[int, int, int, int]]) -> None:
        self.steps = steps

    def run(self, x: Any, w: Any, m: Any, *, trying: bool = False) -> Any:
        values, left = [x, m, x], []
        for step, first, second, n in self.steps:
            a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
            try:
                made = STEPS[step](a, b, w, n)
            except (RuntimeError, IndexError, ValueError, UserWarning):
                if not trying:
                    raise
                continue
            if trying and not (0 < made.numel() < 4000 and made.isfinite().all()):
                continue
            values.append(made)
            left.append((step, first, second, n))
        self.steps = left
        return values[-1]


SHAPES = [(5,), (3, 3), (6, 4), (2, 3, 4), (4, 4, 4), (2, 2, 2, 2), (1, 3, 3)]
numbers = st.integers(0, 63)


@settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    st.sampled_from(SHAPES),
    st.lists(
        st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 3), numbers, numbers),
        min_size=3,
        max_size=9,
    ),
    st.booleans(),
)
def test_whatever_is_lifted_of_a_random_program_is_right(shape, steps, views):
    program = Program(steps)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    w = torch.randn(shape[-1:], generator=generator, dtype=torch.float64)
    program.run(x, w, x.mean(-1, keepdim=True), trying=True)
    got = lifted(program.run, shape=shape, views=views)
    for node in got.gm.graph.nodes:
        got.lift.value_of(node)
    # |a| is the root of a square that is added up from its terms.
    assert_right(got, shape, units=2.0**34)


def test_detach_is_an_identity_only_without_gradients():
    function = CASES[aten.detach]
    assert isinstance(lifted(function, grad=False).value, Lifted)
    assert lifted(function, grad=True).value is None


# -- sizes that are not known --------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, m: (x.sum(1) / x.shape[1], x.mean(1)),
        lambda x, w, m: (x.flatten(1).sum(1), x.sum((1, 2))),
        lambda x, w, m: (x.flatten().unflatten(0, x.shape).sum(2), x.mean(2) * x.shape[2]),
        lambda x, w, m: (x - m.expand(x.shape), x - m),
        lambda x, w, m: (x - m.repeat(1, 1, x.shape[2]), x - m),
        lambda x, w, m: (x[:, 1:].sum(1), x.narrow(1, 1, x.shape[1] - 1).sum(1)),
    ],
    ids=["mean", "flattened", "there and back", "expand", "repeat", "slice"],
)
def test_a_symbolic_number_of_elements_is_a_symbol(function):
    first, second = polys(function, shape=(2, 3, 4), dynamic=True)
    assert first.is_close(second)


def test_an_unbiased_variance_of_a_symbolic_number_is_refused():
    got = lifted(lambda x, w, m: x.var(-1), dynamic=True)
    assert got.value is None
    assert got.lift.stuck is not None
    assert got.lift.stuck.law == "symbolic-correction"


def test_lifting_symbolic_sizes_guards_nothing():
    got = lifted(lambda x, w, m: (x * w - m).flatten().square().mean(), dynamic=True)
    assert isinstance(got.value, Lifted)
    held = g.tensor(got.lift.x)
    assert held is not None
    shape: Any = held.shape
    assert not shape[0].node.shape_env.guards


def test_a_whole_slice_of_a_symbolic_size_is_the_value_itself():
    got = lifted(lambda x, w, m: x.narrow(1, 0, x.shape[1]), dynamic=True)
    assert isinstance(got.value, Lifted)
    assert got.value.poly.terms == got.lift.ring.x.terms
    assert got.value.layout == got.lift.axes.whole


@pytest.mark.parametrize(
    "function", [lambda p: p.abs(), lambda p: p.clamp(min=0)], ids=["abs", "max"]
)
def test_a_symbolic_number_may_be_negative(function):
    first, second = polys(
        lambda x, w, m: (function(m * m * (x.shape[0] - 5)), m * m * (x.shape[0] - 5)), dynamic=True
    )
    assert not first.is_close(second)
