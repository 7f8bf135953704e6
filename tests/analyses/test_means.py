"""Mean-blindness and zero mean: each claim is held to the numbers of the graph that it is about.

A value that is blind in some blocks is shifted, in every block by another number, and no result may
change. A value of mean zero has that once the constants that the analysis names are centred.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import roughened
from torch import fx, nn

from normfx import graph as g
from normfx.analyses.blocks import Blocks
from normfx.analyses.meanblind import MeanBlind
from normfx.analyses.zeromean import Zero, ZeroMean
from normfx.capture import capture
from normfx.ops import norm
from normfx.passes.recognise import recognise
from normfx.record import Journal

WIDTH, EPS = 8, 1e-3
# Results are of order one, computed in float64 by some hundreds of operations.
SAME = 1e-12


class Reads(nn.Module):
    """A function of weights w (8, 8), a bias b (8), a table (5, 8) and a gate c (8)."""

    def __init__(self, read: Callable[..., Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.wide = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))
        self.k = nn.Parameter(torch.randn(WIDTH, 4, 2, 2))
        self.b = nn.Parameter(torch.randn(WIDTH))
        self.c = nn.Parameter(torch.randn(WIDTH))
        self.table = nn.Parameter(torch.randn(5, WIDTH))
        self.read = read

    def forward(self, x: torch.Tensor) -> Any:
        return self.read(self, x)


def ln(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def y(m: Reads, x: torch.Tensor) -> torch.Tensor:
    """What writes into the stream: (2, 4, 8)."""
    return F.linear(x, m.w, m.b)


def captured(read: Callable[..., Any], x: torch.Tensor) -> tuple[fx.GraphModule, list[Any]]:
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]):
        module = capture(gm)
        recognise(module, Journal(), grad=False)
        module.recompile()
        found.append((module, list(inputs)))
        return gm

    with torch.no_grad():
        torch.compile(roughened(Reads(read)).double().eval(), backend=backend)(x)
    ((module, inputs),) = found
    return module, inputs


def spread(blocks: Blocks, shape: torch.Size) -> torch.Tensor:
    """A number for each number of a value: which block of which row it is in, or -1."""
    labels = blocks.labels.expand(shape).clone()
    step = blocks.labels.numel()
    for dim, size in enumerate(shape):
        if blocks.is_free(dim):
            index = torch.arange(size).reshape([-1] + [1] * (len(shape) - dim - 1))
            labels = torch.where(labels < 0, -1, labels + step * index)
            step *= size
    return labels


class Shifted(fx.Interpreter):
    """Runs a graph and adds a number of its own to every block of some values."""

    def __init__(self, module: fx.GraphModule, blind: MeanBlind, values: set[fx.Node]) -> None:
        super().__init__(module)
        self._blind, self._values = blind, values
        self.moved = 0.0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n not in self._values:
            return result
        labels = spread(self._blind.blocks[n], result.shape)
        numbers = torch.randn(int(labels.max()) + 1, dtype=result.dtype)
        shift = torch.where(labels < 0, 0.0, numbers[labels.clamp_min(0)])
        self.moved = max(self.moved, float(shift.abs().max()))
        return result + shift


class Centred(fx.Interpreter):
    """Runs a graph in which constants are centred where they are read; keeps every value."""

    def __init__(self, module: fx.GraphModule, zero: dict[fx.Node, Zero], blind: MeanBlind) -> None:
        super().__init__(module)
        self._uses = {use for found in zero.values() for use in found.uses}
        self._blind = blind
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        for use in self._uses:
            if use.reader is n:
                blocks = self._blind.uses[use]
                sizes = [-1 if d in blocks.labelled() else 1 for d in range(blocks.labels.dim())]
                # a factor for each channel (LayerScale) goes into the constant before it is centred
                factor = 1.0 if use.scale is None else self.env[use.scale].reshape(sizes)
                held = self.env[use.value]
                self.env[use.value] = without_means(held * factor, blocks) / factor
        result = super().run_node(n)
        self.values[n] = result
        return result


def without_means(held: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    labels = spread(blocks, held.shape)
    named = labels.clamp_min(0).flatten()
    total = torch.zeros(int(labels.max()) + 1, dtype=held.dtype)
    count = torch.zeros_like(total)
    inside = (labels >= 0).flatten().to(held.dtype)
    total.scatter_add_(0, named, held.flatten() * inside)
    count.scatter_add_(0, named, inside)
    means = (total / count.clamp_min(1))[named].reshape(held.shape)
    return torch.where(labels < 0, held, held - means)


def drawn(labels: torch.Tensor) -> str:
    """Rows of blocks: a letter for each, a dot for a number of no block; dims without are left out."""
    rows = labels.flatten().unflatten(0, (-1, max(labels.shape[-1], 1))).tolist()
    first = dict.fromkeys(label for row in rows for label in row if label >= 0)
    names = {label: chr(ord("a") + i) for i, label in enumerate(first)}
    return "|".join("".join(names.get(label, ".") for label in row) for row in rows)


# The blocks of y, row by row; "" where it is seen.
ROW, HEADS = "aaaaaaaa", "aaaabbbb"
BLIND = {
    "layer-norm": (lambda m, x: ln(y(m, x)), ROW),
    "two-readers": (lambda m, x: (ln(y(m, x)), ln(2 * y(m, x))), ROW),
    "residual": (lambda m, x: ln(x + y(m, x)), ROW),
    "chain": (lambda m, x: ln((h := y(m, x)) + F.linear(ln(h), m.w)), ROW),
    "scaled": (lambda m, x: ln(-0.5 * y(m, x)), ROW),
    "scaled-by-token": (lambda m, x: ln(x[..., :1].exp() * y(m, x)), ROW),
    "gated": (lambda m, x: ln(x.sigmoid() * y(m, x)), ""),
    "gate-of-channels": (lambda m, x: ln(m.c * torch.tanh(y(m, x))), ""),
    "viewed": (lambda m, x: ln(y(m, x).reshape(8, WIDTH)), ROW),
    "moved": (lambda m, x: ln(y(m, x).transpose(0, 1)), ROW),
    "tokens-picked": (lambda m, x: ln(y(m, x)[:, :2]), "aaaaaaaa|bbbbbbbb|cdefghij|klmnopqr"),
    "tokens-joined": (lambda m, x: ln(torch.cat([x, y(m, x)], 1)), ROW),
    "channels-cut": (lambda m, x: ln(y(m, x)[..., :6]), "aaaaaabc"),
    "channels-joined": (lambda m, x: ln(torch.cat([x, y(m, x)], -1)), ""),
    "heads": (lambda m, x: ln(y(m, x).unflatten(-1, (2, 4))), HEADS),
    "heads-and-row": (lambda m, x: (ln((h := y(m, x)).unflatten(-1, (2, 4))), ln(h)), ROW),
    "merged": (
        lambda m, x: ln(y(m, x).reshape(2, 2, 2 * WIDTH)),
        "aaaaaaaa|aaaaaaaa|bbbbbbbb|bbbbbbbb",
    ),
    "pooled-tokens": (lambda m, x: ln(y(m, x).mean(1)), ROW),
    "dropout-off": (lambda m, x: ln(F.dropout(y(m, x), 0.5, training=False)), ROW),
    "returned": (lambda m, x: (h := y(m, x), ln(h)), ""),
    "read-by-relu": (lambda m, x: ln(h := y(m, x)) + h.relu(), ""),
    "read-by-a-linear": (lambda m, x: F.linear(y(m, x), m.w), ""),
    "rms-norm": (lambda m, x: F.rms_norm(y(m, x), (WIDTH,)), ""),
    "tokens": (lambda m, x: ln(y(m, x).transpose(1, 2)), "a|a|a|a"),
    "two-dims": (lambda m, x: F.layer_norm(y(m, x), (4, WIDTH)), ""),
    "group-norm": (lambda m, x: F.group_norm(y(m, x).transpose(1, 2), 2), ""),
    "mean-by-hand": (lambda m, x: (h := y(m, x)) - h.mean(-1, keepdim=True), ""),
    "softmax": (lambda m, x: y(m, x).softmax(-1), ""),
    "masked-rows": (lambda m, x: ln(torch.where(x[..., :1] > 0, y(m, x), x)), ROW),
    "masked-numbers": (lambda m, x: ln(torch.where(x > 0, y(m, x), x)), ""),
    "written-to": (lambda m, x: ln(y(m, x).add_(1).clamp_(max=1e3)), ""),
}


@pytest.mark.parametrize("case", BLIND)
@torch.no_grad()
def test_no_result_sees_a_shift_of_what_is_blind(case):
    read, expected = BLIND[case]
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    module, inputs = captured(read, x)
    blind = MeanBlind(module.graph)
    writers = [n for n in module.graph.nodes if g.packet(n) is torch.ops.aten.linear]
    blocks = blind.of(writers[0])
    assert ("" if blocks is None else drawn(blocks.labels)) == expected
    want = module(*inputs)
    for node in blind.blocks:
        if blind.of(node) is None or node in blind.constant:
            continue
        run = Shifted(module, blind, {node})
        assert_same(run.run(*inputs), want)
        assert run.moved > 0.1, node


@pytest.mark.parametrize("case", [case for case, (_, blocks) in BLIND.items() if blocks])
@torch.no_grad()
def test_a_shift_of_what_is_not_blind_is_seen(case):
    """The check can fail: one number more in a block, and the results differ."""
    read, _ = BLIND[case]
    module, inputs = captured(read, torch.randn(2, 4, WIDTH, dtype=torch.float64))
    blind = MeanBlind(module.graph)
    writer = next(n for n in module.graph.nodes if g.packet(n) is torch.ops.aten.linear)
    blind.blocks[writer] = Blocks.singles(len(g.shape(writer)))
    want = module(*inputs)
    with pytest.raises(AssertionError):
        assert_same(Shifted(module, blind, {writer}).run(*inputs), want)


def assert_same(got: Any, want: Any) -> None:
    pairs = zip(*(t if isinstance(t, (tuple, list)) else [t] for t in (got, want)), strict=True)
    for a, b in pairs:
        assert float((a - b).abs().max()) <= SAME * max(float(b.abs().max()), 1.0)


# Whether x of the (last) norm has mean zero in its rows.
ZERO = {
    "linear": (lambda m, x: ln(y(m, x)), True),
    "no-bias": (lambda m, x: ln(F.linear(x, m.w)), True),
    "table": (lambda m, x: ln(F.embedding(x[..., 0].long() % 5, m.table)), True),
    "table-and-position": (
        lambda m, x: ln(F.embedding(x[..., 0].long() % 5, m.table) + m.table[:4]),
        True,
    ),
    "convolution": (
        lambda m, x: ln(F.conv2d(x.unsqueeze(-1).expand(-1, -1, -1, 8), m.k).flatten(2).mT),
        True,
    ),
    "product": (lambda m, x: ln(x @ m.w), True),
    "sum": (lambda m, x: ln(y(m, x) + F.linear(x.relu(), m.w)), True),
    "stream": (lambda m, x: ln((h := y(m, x)) + F.linear(ln(h), m.w)), True),
    "class-token": (
        lambda m, x: ln(torch.cat([m.table[:1].expand(2, 1, WIDTH), y(m, x)], 1)),
        True,
    ),
    "layer-scale": (lambda m, x: ln(m.c * y(m, x)), True),
    "heads": (lambda m, x: ln(F.linear(x, m.wide).unflatten(-1, (3, WIDTH))), True),
    "queries": (lambda m, x: ln(F.linear(x, m.wide).chunk(3, -1)[0]), True),
    "attention": (
        lambda m, x: ln((x @ x.mT).softmax(-1) @ F.linear(x, m.w)),
        True,
    ),
    "input": (lambda m, x: ln(x), False),
    "input-added": (lambda m, x: ln(x + y(m, x)), False),
    "activation": (lambda m, x: ln(y(m, x).relu()), False),
    "gate": (lambda m, x: ln(x.sigmoid() * y(m, x)), False),
    "post-norm": (
        lambda m, x: ln(F.layer_norm(y(m, x), (WIDTH,), m.c, m.b, EPS) + y(m, x)),
        False,
    ),
    "returned": (lambda m, x: (h := y(m, x), ln(h)), False),
    "merged": (lambda m, x: ln(y(m, x).reshape(2, 2, 2 * WIDTH)), False),
    "softmax": (lambda m, x: ln(y(m, x).softmax(-1)), False),
}


@pytest.mark.parametrize("case", ZERO)
@torch.no_grad()
def test_what_is_zero_has_mean_zero_once_constants_are_centred(case):
    read, expected = ZERO[case]
    module, inputs = captured(read, torch.randn(2, 4, WIDTH, dtype=torch.float64))
    blind = MeanBlind(module.graph)
    zero = ZeroMean(module.graph, blind)
    centred = Centred(module, zero.values, blind)
    want = module(*inputs)
    assert_same(centred.run(*inputs), want)  # and no result has seen it
    for node, found in zero.values.items():
        held = centred.values.get(node)
        if found.uses and isinstance(held, torch.Tensor) and node not in blind.constant:
            left = held - without_means(held, found.blocks)
            assert float(left.abs().max()) <= SAME * float(held.abs().max()), node
    last = module.graph.find_nodes(op="call_function", target=norm)[-1]
    x = last.args[0]
    is_zero = x in zero.values and zero.values[x].blocks.covers(
        Blocks.whole(g.shape(x), last.kwargs["spec"].dims[0]), g.shape(x)
    )
    assert is_zero == expected
