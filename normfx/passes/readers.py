"""Readers: the linear operators and convolutions that contract the channels of a value.

    norm(x; w, b) @ V^T + c  =  norm(x; 1, 0) @ (V diag(w))^T + (c + V b)

Who they are, whether they may take a scale and a shift of the channels over, and how they do. New
weights are computed in float64 and rounded once; a weight that has other readers stays whole, since
a reader gets a weight of its own. Rules decide: nothing here says whether a fold is right for what
comes before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.layout import is_one
from normfx.passes.channels import NONE, Channels
from normfx.passes.emit import Emitter
from normfx.passes.verdict import Refused, not_constant
from normfx.record import Refusal

aten = torch.ops.aten

# Stamped on the weights and biases that readers get.
RULE = "fold-affine-into-linear"

_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
_TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})
# What libraries call where torch has no kernel for the operator that it is.
_STANDS_FOR = {"transformers::grouped_mm_fallback": aten._grouped_mm}
# A weight that is put together of more pieces than this costs more than it saves.
_MAX_PIECES = 64


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear operator or convolution that contracts the channels with a parameter.

    Attributes:
        node: the operator.
        source: what it reads, which has the channels.
        weight: the parameter.
        bias: its bias, or None.
        dim: the dim of the weight that the channels are contracted with.
        out: its dim of outputs, or None if there are more than one.
        groups: of a convolution: its channels are numbered by (group, dim).
        channels: the channels along that dim.
        padded: whether it puts zeros around what it reads, and a shift would be missing there.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    dim: int
    out: int | None
    groups: int
    channels: Channels
    padded: bool = False

    def drawn(self, of: Mapping[fx.Node, fx.Node]) -> Reader:
        """The same of the copies of its nodes."""
        bias = None if self.bias is None else of[self.bias]
        return replace(
            self, node=of[self.node], source=of[self.source], weight=of[self.weight], bias=bias
        )


def reader_of(
    source: fx.Node,
    user: fx.Node,
    channels: Channels,
    constant: set[fx.Node],
    *,
    shifted: bool,
    may_add: bool = False,
) -> Reader | Refused:
    """The linear operator that reads some channels, if it may take a scale (and a shift) over.

    Args:
        source: what has the channels.
        user: what reads it.
        channels: of the source.
        constant: the nodes whose value depends on parameters alone.
        shifted: whether there is a shift.
        may_add: whether the shift may be added before an operator that pads.
    """
    packet = _STANDS_FOR.get(_name(user), g.packet(user))
    args: Any = user.args
    rank = channels.labels.dim()
    bias: Any = None
    groups, out, contracted, padded = 1, None, rank - 1, False
    if packet is aten.linear:
        x, weight, dim, out = args[0], args[1], 1, 0
        bias = args[2] if len(args) > 2 else None
    elif packet is aten.addmm:
        scaled = g.arguments(user)
        if scaled["beta"] != 1 or scaled["alpha"] != 1:
            return Refused(Refusal.NOT_LINEAR, user)
        bias, x, weight = args[:3]
        dim, out = 0, 1
    elif packet in (aten.mm, aten.matmul, aten.bmm, aten._grouped_mm):
        x, weight = args[:2]
        ranks = len(g.shape(weight) or ())
        if packet is aten._grouped_mm and ranks != 3:  # its groups are of what is contracted
            return Refused(Refusal.NOT_LINEAR, user)
        dim, out = ranks - 2, 1 if ranks == 2 else None
        bias = g.arguments(user).get("bias")
    elif packet in _CONVOLUTIONS | _TRANSPOSED:
        x, weight = args[:2]
        named = g.arguments(user)
        bias = named["bias"]
        contracted = rank + 1 - len(g.shape(weight) or ())
        groups = 1 if packet in _TRANSPOSED else named["groups"]
        dim, out = (0, None) if packet in _TRANSPOSED else (1, 0)
        padded = shifted and (packet in _TRANSPOSED or _pads(user, weight))
        if padded and not may_add:
            return Refused(Refusal.PADDING, user)
    else:
        return Refused(Refusal.NOT_LINEAR, user)
    if x is not source or sum(a is source for a in args) > 1 or dim < 0:
        return Refused(Refusal.NOT_LINEAR, user)
    if channels.dims() not in ([], [contracted]):
        return Refused(Refusal.DIM_NOT_LAST, user)
    read = [weight] if bias is None else [weight, bias]
    computed = [operand for operand in read if operand not in constant]
    if computed:
        return not_constant(Refusal.WEIGHT_NOT_CONSTANT, user, *computed)
    if g.dtype(weight) is torch.float16:
        return Refused(Refusal.RANGE, user)
    # a bias of another shape is none: `addmm` and `linear` broadcast it
    if bias is not None and len(g.shape(bias) or ()) != 1:
        return Refused(Refusal.NOT_LINEAR, user)
    if (shifted and out is None and not padded) or (
        packet is aten.linear and len(g.shape(weight) or ()) != 2
    ):
        return Refused(Refusal.NOT_LINEAR, user)
    if len(channels.stretches()) > _MAX_PIECES or (groups > 1 and not channels.dims()):
        return Refused(Refusal.NOT_LINEAR, user)
    return Reader(user, source, weight, bias, dim, out, groups, channels, padded)


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _pads(convolution: fx.Node, weight: fx.Node) -> bool:
    """Whether a convolution puts zeros around its input."""
    padding = g.arguments(convolution)["padding"]
    if padding == "same":
        return any(not is_one(taps) for taps in (g.shape(weight) or ())[2:])
    return padding != "valid" and any(not isinstance(size, int) or size for size in padding)


def fold_into(graph: fx.Graph, reader: Reader, weight: Any, bias: Any) -> None:
    """Gives a reader the weight and bias that it has with the norm's: W diag(s) and c + W t."""
    node = reader.node
    held: Any = g.tensor(reader.weight)
    shift: Any = None
    with graph.inserting_before(node):
        emit = Emitter(graph, node, RULE)
        exact = emit.exact(reader.weight)
        shape = [1] * held.dim()
        shape[reader.dim] = -1
        if reader.groups > 1:  # (out, in of a group, ...): outputs by group
            exact = emit(aten.unflatten.int, exact, 0, [reader.groups, -1])
            shape = [reader.groups, 1, *shape[1:]]
        folded: Any = reader.weight
        if weight is not None:
            scale = emit(aten.reshape.default, _at(emit, weight, reader.channels, 1.0), shape)
            product = emit(aten.mul.Tensor, exact, scale)
            if reader.groups > 1:
                product = emit(aten.flatten.using_ints, product, 0, 1)
            folded = emit(aten.to.dtype, product, held.dtype, like=held)
        if bias is not None:
            row = emit(aten.reshape.default, _at(emit, bias, reader.channels, 0.0), shape)
            product = emit(aten.mul.Tensor, exact, row)
            if reader.groups > 1:
                product = emit(aten.flatten.using_ints, product, 0, 1)
            over = [d for d in range(held.dim()) if d != reader.out]
            shift = emit(aten.sum.dim_IntList, product, over)
            if reader.bias is not None:
                given = emit.exact(reader.bias)
                shift = emit(aten.add.Tensor, shift, given)
            like = g.value(reader.bias) if reader.bias is not None else _column(reader)
            shift = emit(aten.to.dtype, shift, like.dtype, like=like)
    give(graph, reader, folded, reader.bias if shift is None else shift)


def _at(emit: Emitter, operand: fx.Node, channels: Channels, beside: float) -> fx.Node:
    """An operand in float64, as one number for each that the reader contracts.

    Args:
        emit: makes the nodes.
        operand: the norm's weight or bias.
        channels: of what the reader contracts.
        beside: the number for what is no channel of the norm.
    """
    row = emit(aten.reshape.default, emit(aten.to.dtype, operand, torch.float64), [-1])
    stretches = channels.stretches()
    last = max((first + count for first, count in stretches if first != NONE), default=0)
    if is_number(operand):
        row = emit(aten.expand.default, row, [last])
    pieces = [
        emit(aten.new_full.default, row, [count], beside)
        if first == NONE
        else emit(aten.narrow.default, row, 0, first, count)
        for first, count in stretches
    ]
    return pieces[0] if len(pieces) == 1 else emit(aten.cat.default, pieces, 0)


def give(graph: fx.Graph, reader: Reader, weight: fx.Node, bias: fx.Node | None) -> None:
    """Makes an operator read another weight and bias."""
    node, source = reader.node, reader.source
    if g.packet(node) is aten.addmm:
        node.args = (bias, source, weight)
    elif g.packet(node) is aten.linear:
        node.args = (source, weight) if bias is None else (source, weight, bias)
    elif g.packet(node) in _CONVOLUTIONS | _TRANSPOSED:
        node.args = (source, weight, bias, *node.args[3:])
    elif bias is reader.bias:
        node.args = (source, weight, *node.args[2:])
    else:  # a bias is made: the product becomes a linear layer, which adds it in its epilogue
        with graph.inserting_before(node), g.fake_mode(node), torch.no_grad():
            held: Any = g.value(weight)
            transposed = Emitter(graph, node, RULE)(aten.t.default, weight, like=held.t())
        node.target = aten.linear.default
        node.args = (source, transposed, bias)


def _column(reader: Reader) -> torch.Tensor:
    """A fake tensor like the bias that a reader has not got: one element for each output."""
    held = g.tensor(reader.weight)
    assert held is not None
    assert reader.out is not None
    with g.fake_mode(reader.weight), torch.no_grad():
        return held.new_empty(held.shape[reader.out])


def shifted_reader(
    graph: fx.Graph,
    reader: Reader,
    combine: Any,
    shift: fx.Node,
    dtype: torch.dtype,
    rule: str,
) -> Reader:
    """The reader of what it reads with a number added to (or taken from) each channel.

    Args:
        graph: the graph.
        reader: the reader.
        combine: adds or subtracts.
        shift: a number for each channel, in float64.
        dtype: to add them in.
        rule: that makes the nodes.
    """
    node = reader.node
    held: Any = g.tensor(reader.source)
    is_convolution = g.packet(node) in _CONVOLUTIONS | _TRANSPOSED
    after = len(g.shape(reader.weight) or ()) - 2 if is_convolution else 0
    count = sum(count for _, count in reader.channels.stretches())
    with graph.inserting_before(node):
        emit = Emitter(graph, node, rule)
        row = _at(emit, shift, reader.channels, 0.0)
        column = column_of(emit, row, count, held, dtype, after)
        with g.fake_mode(node), torch.no_grad():
            wide = torch.empty_like(held, dtype=dtype)
        source = reader.source
        if held.dtype != dtype:
            source = emit(aten.to.dtype, source, dtype, like=wide)
        source = emit(combine, source, column, like=wide)
        if held.dtype != dtype:
            source = emit(aten.to.dtype, source, held.dtype, like=held)
    node.replace_input_with(reader.source, source)
    return replace(reader, source=source)


def column_of(
    emit: Emitter, row: fx.Node, count: int, beside: torch.Tensor, dtype: torch.dtype, after: int
) -> fx.Node:
    """A row of numbers, one for each channel, with so many dims after that of the channels."""
    shape = [count, *[1] * after]
    with g.fake_mode(emit.at), torch.no_grad():
        flat = beside.new_empty(count, dtype=dtype)
        column = flat.reshape(shape)
    rounded_once = emit(aten.to.dtype, row, dtype, like=flat)
    return emit(aten.reshape.default, rounded_once, shape, like=column)


def is_number(operand: fx.Node) -> bool:
    """Whether an operand is one number."""
    return all(is_one(size) for size in g.shape(operand) or ())
