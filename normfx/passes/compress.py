"""Compress: a residual stream of mean zero needs one channel less.

    u = x[:-1] of x with mean zero in R^d:  x[-1] = -sum(u)
    RMSNorm(x)[:-1] = CRMSNorm(u) = u / sqrt((sum(u^2) + sum(u)^2) / d + eps)
    W RMSNorm(x) = (W[:, :-1] - W[:, -1:]) CRMSNorm(u)          (Pre-CRMSNorm, 2305.14858, 3)

What writes into the stream drops its last output; what reads a norm of it takes the last column of
its weight from the others. Runs after `recentre`, which made the stream have mean zero, and after
the fold, as a weight of the norm would make another row of it.

Off unless it is named: a width of d - 1 is odd, so that rows are no longer aligned. Its speed is in
docs/rewrites.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from normfx import graph as g
from normfx.analyses.carried import Use
from normfx.analyses.meanblind import MeanBlind
from normfx.analyses.zeromean import Zero, ZeroMean
from normfx.cost import Cost, cost_of, number_count
from normfx.layout import is_one, plain
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.channels import Channels
from normfx.passes.emit import Emitter, copied_bytes
from normfx.passes.readers import Reader, give, reader_of
from normfx.passes.verdict import Refused, allows, change, not_worth, refuse
from normfx.record import Refusal

aten = torch.ops.aten

RULE = "compress"

# What computes each channel of the stream from the same channel: it works as well with one less.
_EACH = frozenset(
    {
        aten.add,
        aten.sub,
        aten.neg,
        aten.to,
        aten._to_copy,
        aten.clone,
        aten.contiguous,
        aten.alias,
        aten.detach,
    }
)
_SCALED = frozenset({aten.mul, aten.div})
_DROPOUTS = frozenset({aten.dropout, aten.feature_dropout})
_PARTS = frozenset({aten.slice, aten.select, aten.narrow})
_VIEWS = frozenset({aten.view, aten.reshape, aten._unsafe_view, aten.expand})
_MOVES = _VIEWS | _PARTS | {aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias}


@dataclass(slots=True)
class _Stream:
    """All values that are computed from each other channel by channel.

    Attributes:
        width: how many channels they have.
        values: the values.
        inside: what is made by operators that work as well with one channel less.
        norms: that read them, each with the operators that read the norm.
    """

    width: int
    values: set[fx.Node] = field(default_factory=set)
    inside: set[fx.Node] = field(default_factory=set)
    norms: dict[fx.Node, list[Reader]] = field(default_factory=dict)


def compress(gm: fx.GraphModule, options: Options, *, blocked: Refusal | None) -> None:
    """Drops the last channel of each stream of mean zero that only RMSNorms read.

    Args:
        gm: a graph with canonical nodes, whose norms have given away their affine parts; changed in
            place.
        options: says whether the rule is asked for.
        blocked: why no weight may be changed in this graph (gradients flow, say), or None.

    Every RMSNorm of an input of mean zero gets one record, if the rule is asked for.

    Refuses:
        rule-off, needs-grad, inside-a-body, weight-not-tracked, mutation-between, stream-read,
        reader-not-linear, dim-not-last, weight-not-constant, range-too-small, other-width,
        not-worth-it.
    """
    if not options.asks_for(RULE):
        return
    zero = ZeroMean(gm.graph, MeanBlind(gm.graph))
    constant = g.parameter_only(gm.graph)
    written = g.written_storages(gm.graph)
    sites = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=norm)
        if node.args[0] not in constant and _is_of_mean_zero(node, zero)
    ]
    done: set[fx.Node] = set()
    for node in sites:
        if node in done:
            continue
        found = Refused(blocked, node) if blocked is not None else None
        found = found or _stream(node, set(sites), constant, written)
        if isinstance(found, _Stream):
            off = next((n for n in found.norms if not allows(options, RULE, n)), None)
            found = found if off is None else Refused(Refusal.RULE_OFF, off)
        if isinstance(found, Refused):
            refuse(node, "fold", RULE, found)
            continue
        done.update(found.norms)
        refused = _not_worth(found, constant)
        for site in found.norms:
            if refused is not None:
                refuse(site, "fold", RULE, refused)
            else:
                change(site, "fold", RULE, f"{found.width} channels to {found.width - 1}")
        if refused is None:
            _narrow(gm.graph, found)


def _is_of_mean_zero(node: fx.Node, zero: ZeroMean) -> bool:
    """Whether a norm divides rows of mean zero by their root mean square, and no more."""
    spec: Any = node.kwargs["spec"]
    rank: Any = node.kwargs["rank"]
    if spec.statistic != "mean-square" or spec.dims != (rank - 1,) or spec.groups or spec.prefix:
        return False
    found = zero.at(Use(node, (0,)))
    return isinstance(found, Zero) and not found.uses and found.blocks.row() == rank - 1


# ------------------------------------------------------------------------------------ the stream


def _stream(
    start: fx.Node, sites: set[fx.Node], constant: set[fx.Node], written: set[int | None]
) -> _Stream | Refused:
    first: Any = start.args[0]
    width = plain((g.shape(first) or (0,))[-1])
    if not isinstance(width, int) or width < 3:
        return Refused(Refusal.OTHER_WIDTH, first)
    stream = _Stream(width)
    pending = [first]
    while pending:
        value = pending.pop()
        if value in stream.values:
            continue
        stream.values.add(value)
        if g.storage(value) in written:
            return Refused(Refusal.MUTATED, value)
        operands = None if value in constant else _operands(value, width)
        if operands is not None:
            stream.inside.add(value)
            pending += operands
        for user in [] if value in constant else value.users:
            if user in sites and user.args[0] is value:
                moves: list[fx.Node] = []
                readers = _readers(user, width, constant, moves)
                if isinstance(readers, Refused):
                    return readers
                stream.norms[user] = readers
                stream.inside.update(moves)
            elif _operands(user, width) is not None:
                pending.append(user)
            else:
                return Refused(Refusal.STREAM_READ, user)
    return stream


def _operands(node: fx.Node, width: int) -> list[Any] | None:
    """What a node computes each channel from; None: it does something else."""
    packet, shape = g.packet(node), g.shape(node)
    args: Any = node.args
    if not shape or plain(shape[-1]) != width:
        return None
    if packet in (aten.cat, aten.concat):
        along = g.arguments(node)["dim"] % len(shape)
        return None if along == len(shape) - 1 else list(args[0])
    if packet in _EACH or packet in _SCALED:
        tensors = [a for a in args if isinstance(a, fx.Node) and g.tensor(a) is not None]
        wide = [t for t in tensors if _last(t) == width]
        narrow = [t for t in tensors if _last(t) != width]
        if packet in _EACH:
            return wide if wide and not narrow and _are_tensors(node) else None
        one = len(wide) == 1 and all(is_one(_last(t)) for t in narrow)
        return wide if one and g.arguments(node).get("rounding_mode") is None else None
    if packet in _DROPOUTS:
        return None if args[2] else [args[0]]
    if packet in _PARTS:
        old = g.shape(args[0]) or ()
        dim = g.arguments(node).get("dim", 0) % len(old)
        return [args[0]] if dim != len(old) - 1 else None
    if packet in _VIEWS and _last(args[0]) == width:
        return [args[0]] if args[1][-1] in (width, -1) else None
    return None


def _are_tensors(node: fx.Node) -> bool:
    """Whether no number is added to all channels: the sum would have another mean."""
    terms = node.args[:2] if g.packet(node) in (aten.add, aten.sub) else node.args[:1]
    return all(isinstance(term, fx.Node) and g.tensor(term) is not None for term in terms)


def _last(node: Any) -> Any:
    shape = g.shape(node)
    return plain(shape[-1]) if shape else 1


def _readers(
    node: fx.Node, width: int, constant: set[fx.Node], moves: list[fx.Node]
) -> list[Reader] | Refused:
    """The linear operators that read a norm, if all that read it are.

    What stands between is appended to `moves`.
    """
    if any(operand is not None for operand in node.args[1:]):
        return Refused(Refusal.NOT_CONSTANT, node)
    found: list[Reader] = []
    pending = [(node, user) for user in node.users]
    while pending:
        source, user = pending.pop()
        if user.op == "output":
            return Refused(Refusal.EXTRA_USER, user)
        if g.packet(user) in _MOVES and _operands(user, width) == [source]:
            moves.append(user)
            pending += [(user, following) for following in user.users]
            continue
        rank = len(g.shape(source) or ())
        channels = Channels.along(rank, rank - 1, width)
        reader = reader_of(source, user, channels, constant, shifted=False)
        if isinstance(reader, Refused):
            return reader
        if reader.groups > 1 or len(g.shape(reader.weight) or ()) != 2:
            return Refused(Refusal.NOT_LINEAR, user)
        found.append(reader)
    return found


def _not_worth(stream: _Stream, constant: set[fx.Node]) -> Refused | None:
    """Why it does not pay, if so: each norm has one more sum, and all else is less by a channel."""
    readers = [reader for found in stream.norms.values() for reader in found]
    nodes = {*stream.values, *stream.inside, *stream.norms, *(r.node for r in readers)} - constant
    before = cost_of(sorted(nodes))
    share = (stream.width - 1) / stream.width
    after = Cost(int(before.bytes * share), before.kernels, int(before.flops * share))
    sums = Cost(flops=sum(map(number_count, stream.norms)))
    written = [a for n in stream.values - stream.inside for a in n.all_input_nodes if a in constant]
    copied = copied_bytes([*written, *(reader.weight for reader in readers)])
    return not_worth(next(iter(stream.norms)), before, after + sums, copied)


# ------------------------------------------------------------------------------------ one less


def _narrow(graph: fx.Graph, stream: _Stream) -> None:
    """Drops the last channel of each value, and from what is computed with them."""
    for value in [n for n in graph.nodes if n in stream.values and n not in stream.inside]:
        _narrow_source(graph, value, stream)
    for node in [n for n in graph.nodes if n in stream.inside or n in stream.norms]:
        if g.packet(node) in _VIEWS:
            sizes: Any = node.args[1]
            last = -1 if sizes[-1] == -1 else stream.width - 1
            node.args = (node.args[0], [*sizes[:-1], last], *node.args[2:])
        if node in stream.norms:
            spec: Any = node.kwargs["spec"]
            spec = spec._replace(kind="CRMSNorm", statistic="compressed", origin="algebra")
            node.kwargs = {**node.kwargs, "spec": spec}
        _refreshed(node)
    for readers in stream.norms.values():
        for reader in readers:
            _take_last_column(graph, reader, stream.width)


def _narrow_source(graph: fx.Graph, value: fx.Node, stream: _Stream) -> None:
    """Gives those in the stream that read a value one without its last channel."""
    args: Any = value.args
    last = stream.width - 1
    if g.packet(value) is aten.linear and len(g.shape(args[1]) or ()) == 2:
        with graph.inserting_before(value):
            emit = Emitter(graph, value, RULE)
            rows = [_refreshed(emit(aten.slice.Tensor, a, 0, 0, last)) for a in args[1:]]
        value.args = (args[0], *rows)
        _refreshed(value)
        return
    after = value.next
    while after.op == "placeholder":
        after = after.next
    with graph.inserting_before(after):
        narrowed = Emitter(graph, value, RULE)(aten.slice.Tensor, value, -1, 0, last)
    for user in [user for user in value.users if user in stream.inside or user in stream.norms]:
        user.replace_input_with(value, narrowed)
    _refreshed(narrowed)


def _take_last_column(graph: fx.Graph, reader: Reader, width: int) -> None:
    """W[:, :-1] - W[:, -1:]."""
    like: Any = g.value(reader.weight)
    with graph.inserting_before(reader.node), g.fake_mode(reader.node), torch.no_grad():
        emit = Emitter(graph, reader.node, RULE)
        exact = emit(aten.to.dtype, reader.weight, torch.float64)
        kept = emit(aten.slice.Tensor, exact, reader.dim, 0, width - 1)
        last = emit(aten.slice.Tensor, exact, reader.dim, width - 1)
        like = torch.empty_like(like.narrow(reader.dim, 0, width - 1))
        weight = emit(aten.to.dtype, emit(aten.sub.Tensor, kept, last), like.dtype, like=like)
    give(graph, reader, weight, reader.bias)


def _refreshed(node: fx.Node) -> fx.Node:
    """The same node, with the value that it has with the operands it has now."""
    target: Any = node.target
    args, kwargs = map_arg((node.args, node.kwargs), g.value)
    with g.fake_mode(node.all_input_nodes[0]), torch.no_grad():
        node.meta["val"] = target(*args, **kwargs)
    return node
