"""Every row of `lift.RULES`: an operator, its polynomial, and the number that both give.

A row without a case fails `test_every_row_has_a_case`. The polynomial of a value is evaluated in float64 from the
moments of a random x and compared with what the operators give.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from normfx import graph as g
from normfx.algebra import Poly, Ring
from normfx.laws import RULES
from normfx.lift import Lift
from normfx.lifted import Lifted
from normfx.torch_internals import trace_pre_dispatch

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
    aten.addcmul: lambda x, w, m: torch.addcmul(x, m, w, value=2),
    aten.addcdiv: lambda x, w, m: torch.addcdiv(x, m, w, value=0.5),
    aten.lerp: lambda x, w, m: torch.lerp(x, m, 0.25),
    aten.to: lambda x, w, m: (x - m).to(torch.float64),
    aten._to_copy: lambda x, w, m: aten._to_copy.default(x, dtype=torch.float64),
    aten.type_as: lambda x, w, m: (x * 2).type_as(x),
    aten.clone: lambda x, w, m: x.clone(),
    aten.contiguous: lambda x, w, m: aten.contiguous.default(x),
    aten.alias: lambda x, w, m: aten.alias.default(x),
    aten.detach: lambda x, w, m: x.detach(),
    aten.dropout: lambda x, w, m: torch.dropout(x, 0.5, False),
    aten.mean: lambda x, w, m: (x * x - 2 * x).mean(-1, True),
    aten.sum: lambda x, w, m: (x - m).square().sum(-1),
    aten.adaptive_avg_pool1d: lambda x, w, m: torch.nn.functional.adaptive_avg_pool1d(x * x, 1),
    aten.adaptive_avg_pool2d: lambda x, w, m: torch.nn.functional.adaptive_avg_pool2d(
        x[:, None] * 2, 1
    ),
    aten.var: lambda x, w, m: x.var(-1, keepdim=True),
    aten.std: lambda x, w, m: x.std(-1, correction=0, keepdim=True),
    aten.var_mean: lambda x, w, m: torch.var_mean(2 * x + 1, -1, correction=2, keepdim=True)[0],
    aten.std_mean: lambda x, w, m: torch.std_mean(x, -1, keepdim=True)[1],
    aten.norm: lambda x, w, m: aten.norm.ScalarOpt_dim(x, 2, [-1], True),
    aten.linalg_vector_norm: lambda x, w, m: torch.linalg.vector_norm(x - m, 2, -1, keepdim=True),
    aten.frobenius_norm: lambda x, w, m: aten.frobenius_norm.dim(x, [-1], True),
    operator.getitem: lambda x, w, m: torch.std_mean(x, -1, keepdim=True)[0],
    aten.view: lambda x, w, m: x.mean(-1).view(3, 1),
    aten.reshape: lambda x, w, m: x.mean(-1).reshape(3, 1),
    aten.unsqueeze: lambda x, w, m: x.mean(-1).unsqueeze(-1),
    aten.squeeze: lambda x, w, m: m.squeeze(-1),
    aten.flatten: lambda x, w, m: m.flatten(0, 1),
    aten.unflatten: lambda x, w, m: x.mean(-1).unflatten(0, (3, 1)),
    aten.expand: lambda x, w, m: m.expand(3, 5),
    aten.expand_as: lambda x, w, m: m.expand_as(x),
    aten.permute: lambda x, w, m: (x - m).permute(1, 0),
    aten.transpose: lambda x, w, m: (x * w).transpose(0, 1),
}
# A row that lifts to None here, and why that is right.
REDUCES_OTHER_DIMS = {aten.adaptive_avg_pool2d: "reduction-over-other-dims"}


def lifted(
    function: Callable[..., Any], *, grad: bool = False, shape: tuple[int, ...] = SHAPE
) -> tuple[Lift, fx.Node, Any]:
    """The lift of the last value of a function of x, w and the mean of x, over the last dim of x."""

    def whole(x: Any, w: Any) -> Any:
        return function(x, w, x.mean(-1, keepdim=True))

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [torch.empty(shape), torch.empty(shape[-1:])]
        gm = trace_pre_dispatch(whole, inputs)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    x = gm.graph.find_nodes(op="placeholder")[0]
    output = gm.graph.output_node().args[0]
    lift = Lift(x, frozenset({len(shape) - 1}), order, grad=grad)
    return lift, output, lift.value_of(output)


def value(ring: Ring, p: Poly, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A polynomial of a site as a tensor that broadcasts against x."""
    total = torch.zeros((), dtype=torch.float64)
    for monomial, coefficient in p.terms.items():
        term = torch.tensor(float(coefficient), dtype=torch.float64)
        for index, exponent in monomial:
            atom = ring.atoms[index]
            if atom.kind == "x":
                base = x
            elif atom.kind == "moment":
                base = (x**atom.key).mean(-1, keepdim=True)
            elif atom.kind == "opaque":
                base = w
            elif atom.kind == "constant":
                base = torch.tensor(float(atom.key), dtype=torch.float64)
            elif atom.kind == "floor":
                base = torch.maximum(value(ring, atom.base, x, w), value(ring, atom.floor, x, w))
            else:
                assert atom.kind == "compound"
                base = value(ring, atom.base, x, w)
            term = term * base ** float(exponent)
        total = total + term
    return total


def test_every_row_has_a_case():
    assert set(CASES) == set(RULES)


def name_of(target: Any) -> str:
    return str(target).removeprefix("aten.")


@pytest.mark.parametrize("target", list(CASES), ids=name_of)
def test_the_polynomial_of_an_operator_is_what_it_computes(target: Any):
    function = CASES[target]
    lift, output, got = lifted(function)
    pair = target in (aten.var_mean, aten.std_mean)
    last = output.args[0] if pair else output
    called = g.packet(last) or last.target
    assert called == target, f"the case ends in {called}"
    if target in REDUCES_OTHER_DIMS:
        assert got is None
        assert lift.stuck is not None
        return
    assert isinstance(got, Lifted)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64) + 0.5
    w = torch.randn(SHAPE[-1:], generator=generator, dtype=torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wanted = function(x, w, x.mean(-1, keepdim=True))
    finally:
        torch.set_default_dtype(before)
    mine = value(lift.ring, got.poly, x, w)
    # Lay the polynomial, which broadcasts against x, along the axes that the value claims for its dims.
    mine = mine.expand(SHAPE)
    for dim in range(len(SHAPE)):
        if dim not in got.axes:
            assert torch.equal(mine, mine.narrow(dim, 0, 1).expand_as(mine)), (
                "constant along what is missing"
            )
    kept = [a for a in got.axes if a is not None]
    mine = mine[tuple(slice(None) if d in kept else 0 for d in range(len(SHAPE)))]
    mine = mine.permute([sorted(kept).index(a) for a in kept])
    mine = mine[tuple(None if a is None else slice(None) for a in got.axes)]
    assert mine.dim() == wanted.dim()
    # A handful of operations with x of size one: a few units of 2^-53.
    error = (mine - wanted).abs().max().item()
    assert error <= 64 * 2.0**-53 * wanted.abs().max().item()


REFUSED: dict[str, Callable[..., Any]] = {
    "root of a mean": lambda x, w, m: m.sqrt(),
    "root of x": lambda x, w, m: x.sqrt(),
    "root of an operand": lambda x, w, m: (m * w).sqrt(),
    "cube root": lambda x, w, m: (x * x).mean(-1, True) ** (1 / 3),
    "power that is a tensor": lambda x, w, m: x**w,
    "mean of x times an operand": lambda x, w, m: (x * w).mean(-1, True),
    "mean of |x|": lambda x, w, m: x.abs().mean(-1, True),
    "mean over another dim": lambda x, w, m: x.mean(0, True),
    "mean over all": lambda x, w, m: x.mean(),
    "mean of a part": lambda x, w, m: x[:, :3].mean(-1, True),
    "mean of a normed x": lambda x, w, m: (x / (x + 3)).mean(-1, True),
    "floor division": lambda x, w, m: torch.div(x, 2, rounding_mode="floor"),
    "ceiling": lambda x, w, m: x.clamp(max=1.0),
    "clamp from both sides": lambda x, w, m: x.clamp(-1, 1),
    "clip from both sides": lambda x, w, m: x.clip(-1, 1),
    "clip from above": lambda x, w, m: (x * x).mean(-1, True).clip(max=1.0),
    "cast to float8": lambda x, w, m: x.to(torch.float8_e4m3fn),
    "cast through float8": lambda x, w, m: x.to(torch.float8_e5m2).to(torch.float32),
    "floor that reads x": lambda x, w, m: torch.maximum(x, m),
    "active dropout": lambda x, w, m: torch.dropout(x, 0.5, True),
    "cast to integers": lambda x, w, m: x.to(torch.int32),
    "one-norm": lambda x, w, m: torch.linalg.vector_norm(x, 1, -1, keepdim=True),
    "greatest value": lambda x, w, m: torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True),
    "view of x": lambda x, w, m: x.view(5, 3),
    "flattened x": lambda x, w, m: x.flatten(0, 1),
    "pooled to two": lambda x, w, m: torch.nn.functional.adaptive_avg_pool1d(x, 2),
    "relu": lambda x, w, m: torch.relu(x),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_provable_is_not_lifted(name: str):
    _, _, got = lifted(REFUSED[name])
    assert got is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, m: x - x.mean(-1),
        lambda x, w, m: x - x.mean(-1, True).transpose(0, 1),
        lambda x, w, m: x * x.transpose(0, 1),
    ],
    ids=["dropped dim", "transposed mean", "transposed x"],
)
def test_a_square_matrix_does_not_hide_a_wrong_broadcast(function: Any):
    lift, output, got = lifted(function, shape=(4, 4))
    assert got is None
    assert lift.stuck is not None
    assert lift.stuck.law == "broadcast-axis-differs"
    assert lift.stuck.node is output


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
    function = ABSOLUTE[name]
    lift, _, got = lifted(function)
    assert isinstance(got, Lifted)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    w = torch.randn(SHAPE[-1:], generator=generator, dtype=torch.float64)
    wanted = function(x, w, x.mean(-1, keepdim=True))
    mine = value(lift.ring, got.poly, x, w)
    # The square of a difference is added up from its terms: they are as large as what they add up to, or cancel.
    bound = 64 * 2.0**-53 * max(1.0, wanted.abs().max().item())
    if name == "x - m":  # the root of such a sum
        bound = bound**0.5
    assert ((mine - wanted).abs() <= bound).all()


def test_detach_is_an_identity_only_without_gradients():
    function = CASES[aten.detach]
    assert isinstance(lifted(function, grad=False)[2], Lifted)
    assert lifted(function, grad=True)[2] is None
