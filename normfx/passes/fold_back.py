"""Fold back: a norm whose statistics are given into the linear operator or convolution before it.

    s * (V x + c) + t  =  (diag(s) V) x + (s * c + t)

with s = w / sqrt(v + eps) and t = b - m * s for each channel: the norm vanishes. It holds for any
padding, stride and grouping, since s and t come after the operator. The operator must have no other
reader; what lies between may only move the channels, not mix them, or put those of several
operators beside each other: then each takes its own. Folded weights are computed in float64 and
rounded once, and are ordinary nodes of the graph, which `hoist` moves out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.laws import ARRANGEMENTS, VIEWS
from normfx.layout import Axes, arranged
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.channels import channel_dim
from normfx.passes.emit import Emitter
from normfx.passes.values import Values
from normfx.passes.verdict import Permit, Refused, allows, change, not_constant, refuse
from normfx.record import Refusal

aten = torch.ops.aten

RULE = "fold-statistics-into-previous"

# What may stand between the operator and the norm: copies, and what moves channels as a whole.
_COPIES = frozenset({aten.clone, aten.contiguous, aten.alias, aten.detach})
_DROPOUTS = frozenset({aten.dropout, aten.feature_dropout, aten.alpha_dropout})  # in eval mode
_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
_JOINS = frozenset({aten.cat, aten.concat, aten.concatenate})
_TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})


@dataclass(frozen=True, slots=True)
class Writer:
    """The operator that makes the channels a norm scales.

    Attributes:
        node: the operator.
        weight: its weight, a parameter.
        bias: its bias, or None.
        dim: the dim of the weight that numbers the channels.
        groups: of a transposed convolution: its channels are numbered by (group, dim).
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    dim: int
    groups: int = 1

    @property
    def channels(self) -> Any:
        """How many channels the operator makes."""
        shape: Any = g.shape(self.weight)
        return shape[self.dim] * self.groups


@dataclass(frozen=True, slots=True)
class Part:
    """An operator and which channels of the norm it makes.

    Attributes:
        writer: the operator.
        start: the first of them.
    """

    writer: Writer
    start: int = 0


@dataclass(frozen=True, slots=True)
class Writers:
    """All operators that make the channels of a norm: one, or several whose results are joined.

    Attributes:
        parts: each of them once.
        channels: how many channels the norm has.
    """

    parts: tuple[Part, ...]
    channels: Any

    @property
    def only(self) -> Writer | None:
        """The operator that makes all channels, if one does."""
        return self.parts[0].writer if len(self.parts) == 1 else None


def fold_back(
    gm: fx.GraphModule,
    options: Options,
    *,
    blocked: Refusal | None,
    permit: Permit | None = None,
) -> None:
    """Folds every norm whose statistics are given into the operator before it, where it may.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
        blocked: why nothing may be folded in this graph (gradients flow, say), or None.
        permit: may refuse a norm for reasons of its own; gets the node and its `Writers`.

    Every norm with given statistics gets one record.

    Refuses:
        rule-off, needs-grad, inside-a-body, weight-not-tracked, statistics-not-tracked,
        mutation-between,
        affine-not-constant, writer-not-linear, extra-user, weight-not-constant, range-too-small,
        channels-mixed.
    """
    constant = g.parameter_only(gm.graph)
    frozen = g.parameter_only(gm.graph, frozen=True)
    written = g.written_storages(gm.graph)
    for node in list(gm.graph.find_nodes(op="call_function", target=norm)):
        spec: Any = node.kwargs["spec"]
        if spec.statistic not in ("running", "static") or node.args[0] in constant:
            continue
        plan = _check(node, frozen, written, options, blocked=blocked)
        if permit is not None and not isinstance(plan, Refused):
            plan = permit(node, plan) or plan
        if isinstance(plan, Refused):
            refuse(node, "fold", RULE, plan)
        else:
            _replace(gm.graph, node, plan)
            # a second norm behind the first folds into the weights that the first has made
            made = [n for part in plan.parts for n in part.writer.node.all_input_nodes]
            frozen.update(n for n in made if n.meta.get("normfx_rule") == RULE)
            change(node, "fold", RULE, ", ".join(part.writer.node.name for part in plan.parts))


def _check(
    node: fx.Node,
    constant: set[fx.Node],
    written: set[int | None],
    options: Options,
    *,
    blocked: Refusal | None,
) -> Writers | Refused:
    if not allows(options, RULE, node):
        return Refused(Refusal.RULE_OFF, node)
    channel = given_channel(node, constant, options, RULE, blocked=blocked)
    if isinstance(channel, Refused):
        return channel
    spec: Any = node.kwargs["spec"]
    parts = parts_of(node, node.args[0], channel, spec.out_dtype, constant, written)
    if isinstance(parts, Refused):
        return parts
    shape: Any = g.shape(node.args[0])
    return Writers(tuple(parts), shape[channel])


def given_channel(
    node: fx.Node,
    constant: set[fx.Node],
    options: Options,
    rule: str,
    *,
    blocked: Refusal | None,
) -> int | Refused:
    """The dim that s and t of a norm with given statistics run along, if a rule may use them."""
    if not options.allows(rule):
        return Refused(Refusal.RULE_OFF, node)
    if blocked is not None:
        return Refused(blocked, node)
    spec: Any = node.kwargs["spec"]
    held = g.tensor(node)
    on_cpu = held is not None and held.device.type == "cpu"  # where they are compared by value
    if spec.statistic == "running" and options.weights != "frozen" and not on_cpu:
        # torch raises no version when its operator updates them, so a fold would not follow
        return Refused(Refusal.STATISTICS, node)
    operands: Any = node.args[1:]
    for operand in operands:
        if operand is not None and operand not in constant:
            return not_constant(Refusal.NOT_CONSTANT, operand, operand)
    channel = channel_of(node)
    return Refused(Refusal.CHANNELS_MIXED, node) if channel is None else channel


def channel_of(node: fx.Node) -> int | None:
    """The dim that numbers the channels of a norm with given statistics, if there is just one."""
    spec: Any = node.kwargs["spec"]
    operands: Any = node.args[1:]
    given = operands[:3] + operands[5:] if spec.statistic == "running" else operands
    return channel_dim(node, given)  # the statistics themselves are one for each channel


def writer_of(
    reader: fx.Node,
    source: Any,
    channel: int,
    dtype: Any,
    constant: set[fx.Node],
    written: set[int | None],
) -> Writer | Refused:
    """The operator that makes all channels of what a reader reads, as `parts_of` finds it."""
    parts = parts_of(reader, source, channel, dtype, constant, written)
    if isinstance(parts, Refused):
        return parts
    if len(parts) > 1:
        return Refused(Refusal.NOT_LINEAR_BEFORE, source)
    return parts[0].writer


def parts_of(
    reader: fx.Node,
    source: Any,
    channel: int,
    dtype: Any,
    constant: set[fx.Node],
    written: set[int | None],
    start: int = 0,
) -> list[Part] | Refused:
    """The operators that make the channels of what a reader reads, if they may make others.

    Args:
        reader: reads them; nothing else does.
        source: what it reads.
        channel: the dim of the source that numbers the channels.
        dtype: of the source, and of all between it and the operators.
        constant: the nodes whose value depends on parameters alone.
        written: the storages that are written to.
        start: the number of the first channel of the source.
    """
    while True:
        assert isinstance(source, fx.Node)
        if len(source.users) > 1:
            others = [user for user in source.users if user is not reader]
            return Refused(Refusal.EXTRA_USER, others[0])
        if g.storage(source) in written:
            return Refused(Refusal.MUTATED, source)
        if g.dtype(source) != dtype:
            return Refused(Refusal.NOT_LINEAR_BEFORE, source)
        writer = _writer(source, channel)
        if isinstance(writer, Writer):
            break
        joined = _joined(source, channel)
        if joined is not None:
            found: list[Part] = []
            for operand, offset in joined:
                first = start + offset
                parts = parts_of(source, operand, channel, dtype, constant, written, first)
                if isinstance(parts, Refused):
                    return parts
                found += parts
            return found
        before = moved_from(source, channel)
        if writer is not None or before is None:
            return writer or Refused(Refusal.NOT_LINEAR_BEFORE, source)
        if before < 0:
            return Refused(Refusal.CHANNELS_MIXED, source)
        reader, source, channel = source, source.args[0], before
    read = [writer.weight] if writer.bias is None else [writer.weight, writer.bias]
    computed = [operand for operand in read if operand not in constant]
    if computed:
        return not_constant(Refusal.WEIGHT_NOT_CONSTANT, writer.node, *computed)
    if g.dtype(writer.weight) is torch.float16:
        return Refused(Refusal.RANGE, writer.node)
    # `linear` and `addmm` broadcast a bias: one for each row would be no bias after the scale
    if writer.bias is not None and g.shape(writer.bias) != (writer.channels,):
        return Refused(Refusal.NOT_LINEAR_BEFORE, writer.node)
    return [Part(writer, start)]


def _joined(node: fx.Node, channel: int) -> list[tuple[fx.Node, int]] | None:
    """What a concatenation joins, each with the number of its first channel in the result.

    None for another operator, and where an operand stands twice: it would be scaled twice.
    """
    if g.packet(node) not in _JOINS:
        return None
    named = g.arguments(node)
    operands, rank = list(named["tensors"]), len(g.shape(node) or ())
    shapes: list[Any] = [g.shape(operand) for operand in operands]
    # ATen skips operands of shape (0,), whatever the others are
    if len(set(operands)) < len(operands) or any(len(s or ()) != rank for s in shapes):
        return None
    if named["dim"] % rank != channel:
        return [(operand, 0) for operand in operands]
    sizes = [shape[channel] for shape in shapes]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return list(zip(operands, accumulate(sizes, initial=0), strict=False))


def moved_from(node: fx.Node, dim: int) -> int | None:
    """Where a dim was before a view or a copy: -1 if it was none; None for another operator."""
    packet, shape = g.packet(node), g.shape(node)
    if packet in _COPIES:
        return dim
    if packet in _DROPOUTS:
        return None if node.args[2] else dim
    before = g.shape(node.args[0]) if node.args else None
    if shape is None or before is None:
        return None
    axes = Axes(before)
    if packet in ARRANGEMENTS:
        layout = arranged(g.permutation(node, len(shape)), axes.whole)
    elif packet in VIEWS:
        layout = axes.view(axes.whole, shape, split=True)
    else:
        return None
    if layout is None or not layout[dim] or layout[dim] not in axes.whole:
        return -1
    return axes.whole.index(layout[dim])


def _writer(node: fx.Node, channel: int) -> Writer | Refused | None:
    """The operator that makes these channels; refused if it makes others; None if it is none."""
    packet, rank = g.packet(node), len(g.shape(node) or ())
    args: Any = node.args
    if packet in _CONVOLUTIONS | _TRANSPOSED:
        named = g.arguments(node)
        spatial = len(g.shape(args[1]) or ()) - 2
        made = rank - spatial - 1
        transposed = packet in _TRANSPOSED
        groups = named["groups"] if transposed else 1
        found = Writer(node, args[1], named["bias"], 1 if transposed else 0, groups)
    elif packet is aten.linear:
        made = rank - 1
        found = Writer(node, args[1], args[2] if len(args) > 2 else None, 0)
    elif packet is aten.addmm:
        named = g.arguments(node)
        if named["beta"] != 1 or named["alpha"] != 1:
            return Refused(Refusal.NOT_LINEAR_BEFORE, node)
        made, found = 1, Writer(node, args[2], args[0], 1)
    elif packet is aten.mm or (packet is aten.matmul and len(g.shape(args[1]) or ()) == 2):
        made, found = rank - 1, Writer(node, args[1], None, 1)
    else:
        return None
    if made != channel or (packet is aten.linear and len(g.shape(args[1]) or ()) != 2):
        return Refused(Refusal.CHANNELS_MIXED, node)
    return found


def _replace(graph: fx.Graph, node: fx.Node, plan: Writers) -> None:
    nodes = {part.writer.node for part in plan.parts}
    first = next(n for n in graph.nodes if n in nodes) if len(nodes) > 1 else nodes.pop()
    _bring_up(node, first)
    with graph.inserting_before(first):
        emit = Emitter(graph, first, RULE)
        scale, shift = scale_and_shift(emit, node, plan.channels)
        if scale is None and node.args[4] is None and plan.only and plan.only.bias is None:
            if g.shape(node.args[2]) == (plan.channels,):
                shift = node.args[2]  # as it is, without a copy
    for part in plan.parts:
        with graph.inserting_before(part.writer.node):
            emit = Emitter(graph, part.writer.node, RULE)
            own = [_own(emit, row, part, plan.channels) for row in (scale, shift)]
            scale_weight(emit, part.writer, *own)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    spec: Any = node.kwargs["spec"]
    if spec.contiguous:
        with graph.inserting_before(node):
            source = graph.call_function(aten.contiguous.default, (source,))
            g.inherit_meta(source, node)
    node.replace_all_uses_with(source, propagate_meta=False)
    graph.erase_node(node)


def _own(emit: Emitter, row: Any, part: Part, channels: Any) -> Any:
    """The numbers of a row that belong to the channels of one operator."""
    count = part.writer.channels
    if row is None or count == channels:
        return row
    return emit(aten.narrow.default, row, 0, part.start, count)


def _bring_up(node: fx.Node, writer: fx.Node) -> None:
    """Moves what a norm's operands are computed by in front of the operator, which will read it."""
    needed = {operand for operand in node.args[1:] if isinstance(operand, fx.Node)}
    found, current = [], node.prev
    while current is not writer:
        if current in needed:
            needed.update(current.all_input_nodes)
            found.append(current)
        current = current.prev
    for current in reversed(found):
        writer.prepend(current)


def scale_and_shift(emit: Emitter, node: fx.Node, channels: int) -> tuple[Any, Any]:
    """(s, t) of s * x + t, in float64, a number for each channel; None for s = 1 and t = 0."""
    scale, mean, shift = given_affine(emit, node, channels)
    if mean is not None:
        moved = mean if scale is None else emit(aten.mul.Tensor, mean, scale)
        shift = (
            emit(aten.neg.default, moved) if shift is None else emit(aten.sub.Tensor, shift, moved)
        )
    return scale, shift


def given_affine(emit: Emitter | Values, node: fx.Node, channels: int) -> tuple[Any, Any, Any]:
    """(s, m, b) of s * (x - m) + b, in float64, a number for each channel.

    As new nodes, or as the numbers they have now; None for s = 1, m = 0 and b = 0.
    """
    spec: Any = node.kwargs["spec"]
    weight, bias, eps, mean, square = (
        None if operand is None else row_of(emit, operand, channels) for operand in node.args[1:6]
    )
    scale: Any = None
    if spec.statistic == "running":
        shifted = emit(aten.add.Tensor, square, spec.eps if eps is None else eps)
        scale = emit(aten.rsqrt.default, shifted)
    if weight is not None:
        scale = weight if scale is None else emit(aten.mul.Tensor, scale, weight)
    if scale is not None and spec.scale != 1.0:
        scale = emit(aten.mul.Tensor, scale, spec.scale)
    return scale, mean, bias


def row_of(emit: Emitter | Values, operand: Any, channels: int) -> fx.Node:
    """An operand in float64, as one number for each channel."""
    row = emit(aten.reshape.default, emit(aten.to.dtype, operand, torch.float64), [-1])
    return emit(aten.expand.default, row, [channels])


def scale_weight(emit: Emitter, writer: Writer, scale: Any, shift: Any) -> None:
    """Makes an operator compute s * y + t in place of y; None for no scale or shift."""
    node, weight, bias = writer.node, writer.weight, writer.bias
    folded = weight if scale is None else _scaled(emit, writer, scale)
    if bias is not None and (scale is not None or shift is not None):
        exact = emit.exact(bias)
        scaled = exact if scale is None else emit(aten.mul.Tensor, exact, scale)
        shift = scaled if shift is None else emit(aten.add.Tensor, shift, scaled)
    if shift is not None:
        like = g.value(bias)
        if like is None:
            with g.fake_mode(weight), torch.no_grad():
                like = g.value(weight).new_empty(writer.channels)
        if g.dtype(shift) != like.dtype:
            shift = emit(aten.to.dtype, shift, like.dtype, like=like)
    packet = g.packet(node)
    if packet is aten.addmm:
        node.args = (shift, node.args[1], folded)
    elif packet in (aten.mm, aten.matmul) and shift is None:
        node.args = (node.args[0], folded)
    elif packet in (aten.mm, aten.matmul):  # a bias is made: the product becomes a linear layer
        with g.fake_mode(weight), torch.no_grad():
            transposed = emit(aten.t.default, folded, like=g.value(weight).t())
        node.target = aten.linear.default
        node.args = (node.args[0], transposed, shift)
    else:
        node.args = (node.args[0], folded, shift, *node.args[3:])


def _scaled(emit: Emitter, writer: Writer, scale: fx.Node) -> fx.Node:
    """The weight of an operator with each channel that it makes scaled."""
    weight = writer.weight
    shape: Any = g.shape(weight)
    exact = emit.exact(weight)
    if writer.groups > 1:  # (in, out of a group, ...): a number for each group and each out
        exact = emit(aten.unflatten.int, exact, 0, [writer.groups, -1])
        scale_shape: list[Any] = [writer.groups, 1, shape[1], *[1] * (len(shape) - 2)]
    else:
        scale_shape: list[Any] = [1] * len(shape)
        scale_shape[writer.dim] = shape[writer.dim]
    product = emit(aten.mul.Tensor, exact, emit(aten.reshape.default, scale, scale_shape))
    if writer.groups > 1:
        product = emit(aten.flatten.using_ints, product, 0, 1)
    return emit(aten.to.dtype, product, g.dtype(weight), like=g.value(weight))
