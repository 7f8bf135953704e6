"""Fold: the weight and bias of a norm into the linear operators and convolutions that read it.

    norm(x; w, b) @ V^T + c  =  norm(x; 1, 0) @ (V diag(w))^T + (c + V b)        (FlashNorm,
    2407.09577, 1 and 3)

The folded weights are ordinary nodes of the graph: `hoist` moves them out of it. They are computed
in float64 and rounded once. Every reader must take its share, or the norm keeps its affine part; a
weight that has other readers stays whole, since a reader gets a weight of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.layout import is_one, plain
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.channels import NONE, Channels, channel_dim
from normfx.passes.emit import Emitter
from normfx.passes.verdict import Refused, change, refuse
from normfx.record import Refusal

aten = torch.ops.aten

RULE = "fold-affine-into-linear"

_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
_TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})
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
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    dim: int
    out: int | None
    groups: int
    channels: Channels


def fold(gm: fx.GraphModule, options: Options, *, blocked: Refusal | None) -> None:
    """Folds the affine part of every canonical norm whose readers are all linear.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
        blocked: why nothing may be folded in this graph (gradients flow, say), or None.

    Every norm of an activation gets one record.

    Refuses:
        no-affine, rule-off, needs-grad, inside-a-body, weight-not-tracked, mutation-between,
        affine-not-constant, dim-not-last, no-reader, extra-user, reader-not-linear, zero-padding,
        weight-not-constant, range-too-small.
    """
    constant = g.parameter_only(gm.graph)
    written = g.written_storages(gm.graph)
    for node in list(gm.graph.nodes):
        if (
            not g.is_call(node, norm) or node.args[0] in constant
        ):  # a standardised weight: hoist takes all of it
            continue
        plan = _check(node, constant, written, options, blocked=blocked)
        if isinstance(plan, Refused):
            refuse(node, "fold", RULE, plan)
        else:
            _replace(gm.graph, node, plan)
            # another norm may be read by the same operators, beside this one
            made = [n for reader in plan for n in reader.node.all_input_nodes]
            constant.update(n for n in made if n.meta.get("normfx_rule") == RULE)
            names = ", ".join(reader.node.name for reader in plan)
            change(node, "fold", RULE, f"into {names}")


def _check(
    node: fx.Node,
    constant: set[fx.Node],
    written: set[int | None],
    options: Options,
    *,
    blocked: Refusal | None,
) -> list[Reader] | Refused:
    if node.args[1] is None and node.args[2] is None:
        return Refused(Refusal.NOT_AFFINE, node)
    if not options.allows(RULE):
        return Refused(Refusal.RULE_OFF, node)
    if blocked is not None:
        return Refused(blocked, node)
    if g.storage(node) in written:
        return Refused(Refusal.MUTATED, node)
    operands: Any = [operand for operand in node.args[1:3] if operand is not None]
    for operand in operands:
        if operand not in constant:
            return Refused(Refusal.NOT_CONSTANT, operand)
    start = _start(node, operands)
    if start is None:
        return Refused(Refusal.DIM_NOT_LAST, node)
    if not node.users:
        return Refused(Refusal.NO_READER, node)
    shifted = node.args[2] is not None
    readers: dict[fx.Node, Reader] = {}
    pending = [(node, start, user) for user in node.users]
    while pending:
        source, channels, user = pending.pop()
        if user.op == "output":
            return Refused(Refusal.EXTRA_USER, user)
        moved = channels.through(source, user, shifted=shifted)
        if moved is not None:
            if g.storage(user) in written and g.storage(user) is not None:
                return Refused(Refusal.MUTATED, user)
            pending += [(user, moved, next_user) for next_user in user.users]
            continue
        reader = reader_of(source, user, channels, constant, shifted=shifted)
        if isinstance(reader, Refused):
            return reader
        if user in readers:  # of two parts of its input, or twice of one
            return Refused(Refusal.NOT_LINEAR, user)
        readers[user] = reader
    return sorted(readers.values(), key=lambda r: r.node.name)


def _start(node: fx.Node, operands: list[fx.Node]) -> Channels | None:
    """The channels of a norm's result: its last dim, where the operands are single numbers."""
    shape: Any = g.shape(node)
    dim = channel_dim(node, operands)
    if dim is None and all(_is_number(operand) for operand in operands):
        dim = len(shape) - 1
    size = None if dim is None else plain(shape[dim])
    if dim is None or not isinstance(size, int):
        return None
    return Channels.along(len(shape), dim, size)


def _is_number(operand: fx.Node) -> bool:
    return all(is_one(size) for size in g.shape(operand) or ())


def reader_of(
    source: fx.Node, user: fx.Node, channels: Channels, constant: set[fx.Node], *, shifted: bool
) -> Reader | Refused:
    """The linear operator that reads some channels, if it may take a scale (and a shift) over."""
    packet = g.packet(user)
    args: Any = user.args
    rank = channels.labels.dim()
    bias: Any = None
    groups, out, contracted = 1, None, rank - 1
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
        padded = isinstance(named["padding"], str) or any(named["padding"])
        if shifted and (padded or packet in _TRANSPOSED):
            return Refused(Refusal.PADDING, user)
    else:
        return Refused(Refusal.NOT_LINEAR, user)
    if x is not source or sum(a is source for a in args) > 1 or dim < 0:
        return Refused(Refusal.NOT_LINEAR, user)
    if channels.dims() not in ([], [contracted]):
        return Refused(Refusal.DIM_NOT_LAST, user)
    if weight not in constant or (bias is not None and bias not in constant):
        return Refused(Refusal.WEIGHT_NOT_CONSTANT, user)
    if g.dtype(weight) is torch.float16:
        return Refused(Refusal.RANGE, user)
    # a bias of another shape is none: `addmm` and `linear` broadcast it
    if bias is not None and len(g.shape(bias) or ()) != 1:
        return Refused(Refusal.NOT_LINEAR, user)
    if (shifted and out is None) or (packet is aten.linear and len(g.shape(weight) or ()) != 2):
        return Refused(Refusal.NOT_LINEAR, user)
    if len(channels.stretches()) > _MAX_PIECES or (groups > 1 and not channels.dims()):
        return Refused(Refusal.NOT_LINEAR, user)
    return Reader(user, source, weight, bias, dim, out, groups, channels)


def _replace(graph: fx.Graph, node: fx.Node, readers: list[Reader]) -> None:
    weight, bias = node.args[1], node.args[2]
    for reader in readers:
        fold_into(graph, reader, weight, bias)
    spec: Any = node.kwargs["spec"]
    # the dtype of the result stays that of the norm with its affine part
    node.args = (node.args[0], None, None, *node.args[3:])
    node.kwargs = {**node.kwargs, "spec": spec._replace(affine_dim=None)}


def fold_into(graph: fx.Graph, reader: Reader, weight: Any, bias: Any) -> None:
    """Gives a reader the weight and bias that it has with the norm's: W diag(s) and c + W t."""
    node = reader.node
    held: Any = g.tensor(reader.weight)
    shift: Any = None
    with graph.inserting_before(node):
        emit = Emitter(graph, node, RULE)
        exact = emit(aten.to.dtype, reader.weight, torch.float64)
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
                given = emit(aten.to.dtype, reader.bias, torch.float64)
                shift = emit(aten.add.Tensor, shift, given)
            like = g.value(reader.bias) if reader.bias is not None else _column(reader)
            shift = emit(aten.to.dtype, shift, like.dtype, like=like)
    _give(graph, reader, folded, reader.bias if shift is None else shift)


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
    if _is_number(operand):
        row = emit(aten.expand.default, row, [last])
    pieces = [
        emit(aten.new_full.default, row, [count], beside)
        if first == NONE
        else emit(aten.narrow.default, row, 0, first, count)
        for first, count in stretches
    ]
    return pieces[0] if len(pieces) == 1 else emit(aten.cat.default, pieces, 0)


def _give(graph: fx.Graph, reader: Reader, weight: fx.Node, bias: fx.Node | None) -> None:
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
