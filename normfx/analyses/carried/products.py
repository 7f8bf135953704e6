"""Laws of operators that are linear in a weight: its outputs are a dim of the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks
from normfx.analyses.carried.law import Carried, Parts, Path, Use

aten = torch.ops.aten


def linear(node: fx.Node) -> Carried | None:
    """X W^T + b, in the outputs of W and b."""
    args: Any = node.args
    if len(g.shape(args[1]) or ()) != 2:
        return None
    bias = args[2] if len(args) > 2 else None
    return _outputs(node, -1, (1,), 0, None if bias is None else (2,))


def addmm(node: fx.Node) -> Carried | None:
    """B + x W, in the columns of W and in b."""
    named = g.arguments(node)
    args: Any = node.args
    if named["beta"] != 1 or named["alpha"] != 1 or len(g.shape(args[0]) or ()) != 1:
        return None
    return _outputs(node, -1, (2,), 1, (0,))


def _outputs(
    node: fx.Node, made: int, weight: Path, out: int, bias: Path | None, groups: int = 1
) -> Carried:
    """Linear in a weight and a bias: dim `out` of the weight is dim `made` of the result."""
    shape: Any = g.shape(node)
    new, rank = len(shape), len(g.shape(Use(node, weight).value) or ())
    made %= new
    sizes = shape[made]

    def moved(blocks: Blocks, dim: int, rank: int, to: int) -> Blocks:
        """The blocks along one dim of a tensor as those along one dim of another."""
        shape = [1] * rank
        shape[to] = -1
        return Blocks(blocks.only(dim).labels.reshape(shape))

    def grouped(row: Blocks) -> Blocks | None:
        """Blocks whose outputs read the same inputs."""
        count = row.labels.numel()
        if groups == 1 or count == 1:
            return row
        cut = [groups, count // groups]
        viewed = row.viewed([count], cut)
        return None if viewed is None else viewed.within(0).viewed(cut, [count])

    def back(blocks: Blocks) -> Parts:
        row = grouped(moved(blocks, made, 1, 0))
        of_weight = None if row is None else moved(row, 0, rank, out)
        return [of_weight] if bias is None else [of_weight, row]

    def forth(parts: Parts) -> Blocks | None:
        row = None if parts[0] is None else moved(parts[0], out, 1, 0)
        if bias is not None and row is not None:
            row = None if parts[1] is None else row.join(parts[1], [sizes])
        return None if row is None else moved(row, 0, new, made)

    return Carried((weight,) if bias is None else (weight, bias), back, forth)


def conv(node: fx.Node) -> Carried | None:
    """A convolution, in the output channels of weight and bias."""
    named = g.arguments(node)
    args: Any = node.args
    spatial = len(g.shape(args[1]) or ()) - 2
    if node.kwargs:
        return None
    bias = None if named["bias"] is None else (2,)
    return _outputs(node, -1 - spatial, (1,), 0, bias, named["groups"])


def conv_transpose(node: fx.Node) -> Carried | None:
    """A transposed convolution of one group, in its output channels."""
    named = g.arguments(node)
    args: Any = node.args
    if named["groups"] != 1:
        return None
    spatial = len(g.shape(args[1]) or ()) - 2
    if node.kwargs:
        return None
    bias = None if named["bias"] is None else (2,)
    return _outputs(node, -1 - spatial, (1,), 1, bias)


def matmul(node: fx.Node) -> Carried | None:
    """Rows of the second factor, mixed: its last dim is the last of the result."""
    first, second = (g.shape(a) for a in node.args[:2])
    if first is None or second is None or len(second) < 2:
        return None
    return _mixed((1,), len(second), len(g.shape(node) or ()))


def attention(node: fx.Node) -> Carried | None:
    """Weighted means of the values: softmax(q k^T) v, in the channels of v."""
    values = g.shape(node.args[2])
    return None if values is None else _mixed((2,), len(values), len(g.shape(node) or ()))


def embedding(node: fx.Node) -> Carried | None:
    """Rows of a table, in its columns."""
    return _mixed((0,), 2, len(g.shape(node) or ()))


def _mixed(path: Path, old: int, new: int) -> Carried:
    """The last dim stays the last; all others are mixed or picked from, and free."""

    def moved(blocks: Blocks | None, rank: int) -> Blocks | None:
        if blocks is None:
            return None
        last = blocks.only(blocks.labels.dim() - 1)
        return Blocks(last.labels.reshape([1] * (rank - 1) + [-1]))

    return Carried((path,), lambda b: [moved(b, old)], lambda parts: moved(parts[0], new))
