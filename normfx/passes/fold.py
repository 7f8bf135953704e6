"""Fold: the weight and bias of a norm into the linear operators and convolutions that read it.

    norm(x; w, b) @ V^T + c  =  norm(x; 1, 0) @ (V diag(w))^T + (c + V b)        (FlashNorm,
    2407.09577, 1 and 3)

A norm whose statistics are given is s * x + t altogether, so all of it goes, and what it reads is
read in its place. With a maximum on the way, its sign p stays, and the rest moves behind that:

    max_pool(s * x + t)  =  m * (max_pool(p * x) + t / m)        with m = |s|, p = s / m

for each channel. The operator takes m over and m * t / m, too, unless it pads zeros, which t would
be missing from; then t / m is added in front of it, to fewer numbers than there were, and the same
with the mean, which may cancel. ReLU takes m out as a maximum does, where t is zero. An s next to
zero stays in p, so that nothing is divided by it. p is left out where s cannot be negative, or is
not now, under a condition. So is it with the weight of any other norm, or else that stays. Of a
weight that an activation is a factor of (a mask), the other factor is folded.

The folded weights are ordinary nodes of the graph: `hoist` moves them out of it. They are computed
in float64 and rounded once. Every reader must take its share, or the norm stays as it is; a weight
that has other readers stays whole, since a reader gets a weight of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.cost import Cost, byte_count, number_count, of_affine, of_made_bias
from normfx.laws import ASKS
from normfx.layout import plain
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.affines import is_near
from normfx.passes.channels import Channels, channel_dim, is_monotonic, is_pool
from normfx.passes.emit import Emitter, copied_bytes
from normfx.passes.fold_back import given_affine, given_channel, row_of, scale_and_shift
from normfx.passes.readers import (
    RULE,
    Reader,
    column_of,
    fold_into,
    is_number,
    reader_of,
    shifted_reader,
)
from normfx.passes.rounding import rounded
from normfx.passes.sign import is_nonnegative
from normfx.passes.sketch import Sketch, between
from normfx.passes.values import Values
from normfx.passes.verdict import (
    Permit,
    Refused,
    allows,
    change,
    not_constant,
    not_worth,
    refuse,
)
from normfx.record import Refusal

aten = torch.ops.aten

STATISTICS_RULE = "fold-statistics-into-next"

# A scale is not divided by where it is smaller than this.
_SMALL = 2.0**-32
# How large means may be, to deviations, where they go past the operators after the norm and x was
# rounded with them: 70 gave three times eager's error (BatchNorm and linear, CPU).
_FAR = 16.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Who takes a norm's affine part over.

    Attributes:
        readers: all that contract its channels.
        dim: of the norm's result, that the channels are numbered by.
        channels: how many there are.
        signed: whether p stays, for a maximum on the way or zeros at its end.
        positive: whether p is one, as no scale is negative or next to zero now.
        weight: what is folded of the norm's weight.
        rest: the factor of it that stays, or None.
    """

    readers: list[Reader]
    dim: int
    channels: int
    signed: bool
    positive: bool = False
    weight: Any = None
    rest: Any = None


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a graph: its constants, the storages written to, what is rounded."""

    constant: set[fx.Node]
    written: set[int | None]
    rounded: set[fx.Node]


def fold(
    gm: fx.GraphModule,
    options: Options,
    *,
    blocked: Refusal | None,
    permit: Permit | None = None,
    values: Values | None = None,
) -> list[fx.Node]:
    """Folds the affine part of every canonical norm whose readers are all linear.

    Of a norm whose statistics are given that is all of it.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rules may run.
        blocked: why nothing may be folded in this graph (gradients flow, say), or None.
        permit: may refuse a norm for reasons of its own; gets the node and its readers.
        values: of the parameters, as they are now.

    Returns:
        Conditions: nodes that read only parameters, and must be true whenever the graph runs.

    Every norm of an activation gets one record, of one of the two rules.

    Refuses:
        no-affine, rule-off, needs-grad, inside-a-body, weight-not-tracked, statistics-not-tracked,
        mutation-between, affine-not-constant, channels-mixed, writer-not-linear, dim-not-last,
        cancellation, no-reader, extra-user, reader-not-linear, zero-padding, sign-not-known,
        weight-not-constant, range-too-small, scale-not-known, ill-conditioned, not-worth-it.
    """
    conditions: list[fx.Node] = []
    constant = g.parameter_only(gm.graph)
    frozen = g.parameter_only(gm.graph, frozen=True)
    known = _Known(frozen, g.written_storages(gm.graph), rounded(gm.graph, constant))
    for node in list(gm.graph.find_nodes(op="call_function", target=norm)):
        if node.args[0] in constant:  # a standardised weight: hoist takes all of it
            continue
        spec: Any = node.kwargs["spec"]
        given = spec.statistic in ("running", "static")
        rule = STATISTICS_RULE if given else RULE
        plan = _check(node, known, options, given=given, blocked=blocked)
        if not given and not isinstance(plan, Refused) and plan.signed:
            plan = _never_negative_now(node, plan, options, values)
        if given and not isinstance(plan, Refused) and plan.signed and options.allows("hoist"):
            plan = replace(plan, positive=bool(_is_positive(values, node, plan)))
        if not isinstance(plan, Refused):
            judged = _statistics_not_worth if given else _affine_not_worth
            plan = judged(node, plan, constant, copies=permit is None) or plan
        if given and not isinstance(plan, Refused) and _moves_mean(node, plan):
            plan = _near(node, options, values) or plan
        if permit is not None and not isinstance(plan, Refused):
            plan = permit(node, plan.readers) or plan
        if isinstance(plan, Refused):
            refuse(node, "fold", rule, plan)
            continue
        with gm.graph.inserting_before(node):
            emit = Emitter(gm.graph, node, STATISTICS_RULE)
            if given and _moves_mean(node, plan):
                conditions.append(is_near(emit, node, _FAR))
            if not given and plan.positive:
                conditions.append(_is_nonnegative_in(emit, plan.weight))
            elif plan.positive:
                conditions.append(_is_positive(emit, node, plan))
        if given:
            _replace_all(gm.graph, node, plan)
        else:
            _replace(gm.graph, node, plan)
        # another norm may be read by the same operators, beside this one
        made = [n for reader in plan.readers for n in reader.node.all_input_nodes]
        frozen.update(n for n in made if n.meta.get("normfx_rule") == RULE)
        names = ", ".join(reader.node.name for reader in plan.readers)
        change(node, "fold", rule, f"into {names}")
    return conditions


def _affine_not_worth(
    node: fx.Node, plan: Plan, constant: set[fx.Node], *, copies: bool
) -> Refused | None:
    """Why it does not pay that readers take a weight and bias over, if so.

    Saved are reads of two vectors, and a multiplication and an addition a number.
    """
    after = _made_biases(plan) if node.args[2] is not None else Cost()
    if plan.rest is not None:
        after += Cost(byte_count(plan.rest), 0, number_count(node))
    copied = copied_bytes(reader.weight for reader in plan.readers) if copies else 0
    return not_worth(node, of_affine(node), after, copied)


def _statistics_not_worth(
    node: fx.Node, plan: Plan, constant: set[fx.Node], *, copies: bool
) -> Refused | None:
    """Why it does not pay that readers take all of a norm over, if so.

    What stays of it (its signs before a maximum, a shift in front of zeros) may cost as much.
    """
    sketch = Sketch(between(node, (reader.node for reader in plan.readers)), constant)
    before, of = sketch.cost(), sketch.of
    drawn = replace(plan, readers=[reader.drawn(of) for reader in plan.readers])
    _replace_all(sketch.graph, of[node], drawn)
    copied = copied_bytes(reader.weight for reader in plan.readers) if copies else 0
    return not_worth(node, before, sketch.cost() + _made_biases(plan), copied)


def _made_biases(plan: Plan) -> Cost:
    """What the biases cost that readers get."""
    made = [r for r in plan.readers if r.bias is None and r.out is not None]
    costs = [of_made_bias(r.node, (g.shape(r.weight) or ())[r.out or 0]) for r in made]
    return sum(costs, Cost())


def _moves_mean(node: fx.Node, plan: Plan) -> bool:
    """Whether a mean that is subtracted goes into the biases of the readers."""
    return node.args[4] is not None and not plan.signed


def _is_positive(emit: Emitter | Values | None, node: fx.Node, plan: Plan) -> Any:
    """Whether a norm scales every channel by a positive number, as a node or a value."""
    scale = None if emit is None else given_affine(emit, node, plan.channels)[0]
    if emit is None or scale is None:
        return None
    return emit(aten.all.default, emit(aten.ge.Scalar, scale, _SMALL))


def _never_negative_now(
    node: fx.Node, plan: Plan, options: Options, values: Values | None
) -> Plan | Refused:
    """The plan to fold a weight past a maximum, if it is at least zero for every channel now."""
    if options.allows("hoist") and values is not None:
        known = _is_nonnegative_in(values, plan.weight)
        if known is not None and bool(known):
            return replace(plan, positive=True)
    return Refused(Refusal.SIGN, node)  # p in place of the weight: nothing is gained


def _is_nonnegative_in(emit: Emitter | Values, weight: fx.Node) -> Any:
    """Whether no number of a weight is negative, as a node or a value."""
    compared = emit(aten.ge.Scalar, weight, 0)
    return None if compared is None else emit(aten.all.default, compared)


def _near(node: fx.Node, options: Options, values: Values | None) -> Refused | None:
    """Why a mean may not be moved past what reads it: V (x - m) = V x - V m may cancel."""
    if not options.allows("hoist"):  # which is what conditions are checked by
        return Refused(Refusal.RULE_OFF, node)
    if node.args[5] is None:
        return Refused(Refusal.CANCELS, node)
    near = None if values is None else is_near(values, node, _FAR)
    if near is None:
        return Refused(Refusal.SCALE_UNKNOWN, node)
    return None if bool(near) else Refused(Refusal.CONDITION, node)


def _check(
    node: fx.Node,
    known: _Known,
    options: Options,
    *,
    given: bool,
    blocked: Refusal | None,
) -> Plan | Refused:
    if given and not allows(options, STATISTICS_RULE, node):
        return Refused(Refusal.RULE_OFF, node)
    weight, rest = (node.args[1], None) if given else _factors(node, known.constant)
    if given:
        dim = given_channel(node, known.constant, options, STATISTICS_RULE, blocked=blocked)
    else:
        dim = _affine_dim(node, weight, known.constant, options, blocked=blocked)
    if isinstance(dim, Refused):
        return dim
    if g.storage(node) in known.written:
        return Refused(Refusal.MUTATED, node)
    if given:
        refused = _may_not_read(node, known)
        if refused is not None:
            return refused
    shape: Any = g.shape(node)
    size = plain(shape[dim])
    if not isinstance(size, int):
        return Refused(Refusal.DIM_NOT_LAST, node)
    if not node.users:
        return Refused(Refusal.NO_READER, node)
    shifted = node.args[2] is not None or (given and node.args[4] is not None)
    signed = False
    readers: dict[fx.Node, Reader] = {}
    start = Channels.along(len(shape), dim, size)
    pending = [(node, start, user, False) for user in node.users]
    while pending:
        source, channels, user, pooled = pending.pop()
        if user.op == "output":
            return Refused(Refusal.EXTRA_USER, user)
        if g.is_pure(user) and not user.users:  # the places of a maximum that nobody asked for
            continue
        if g.packet(user) in ASKS and user.args[0] is source:
            continue
        moved = channels.through(source, user, shifted=shifted, monotonic=True)
        if moved is not None:
            if g.storage(user) in known.written and g.storage(user) is not None:
                return Refused(Refusal.MUTATED, user)
            if given and g.dtype(user) not in (None, g.dtype(node)):
                return Refused(Refusal.CANCELS, user)  # rounded with its mean, not without
            if is_monotonic(user) and not _never_negative(node, weight, given=given):
                signed = True
            pooled = pooled or is_pool(user)
            pending += [(user, moved, next_user, pooled) for next_user in user.users]
            continue
        may_add = given and pooled  # before it, to fewer numbers than the norm has
        reader = reader_of(source, user, channels, known.constant, shifted=shifted, may_add=may_add)
        if isinstance(reader, Refused):
            return reader
        if user in readers:  # of two parts of its input, or twice of one
            return Refused(Refusal.NOT_LINEAR, user)
        readers[user] = reader
        signed = signed or reader.padded
    if given and not signed and node.args[4] is not None and node.args[0] not in known.rounded:
        return Refused(Refusal.CANCELS, node)
    in_order = sorted(readers.values(), key=lambda r: r.node.name)
    return Plan(in_order, dim, size, signed, weight=weight, rest=rest)


def _may_not_read(node: fx.Node, known: _Known) -> Refused | None:
    """Why what a norm reads may not be read in place of it, if so."""
    spec: Any = node.kwargs["spec"]
    source: Any = node.args[0]
    if g.storage(source) in known.written:
        return Refused(Refusal.MUTATED, source)
    if g.dtype(source) != spec.out_dtype:
        return Refused(Refusal.NOT_LINEAR_BEFORE, source)
    return None


def _factors(node: fx.Node, constant: set[fx.Node]) -> tuple[Any, Any]:
    """The factor of a norm's weight that may be folded, and the one that stays, if there is one.

    norm(x; c d) = d norm(x; c), where c is a parameter, d is made of activations, and no bias is
    added after.
    """
    weight: Any = node.args[1]
    if weight not in constant and node.args[2] is None and g.is_call(weight, aten.mul.Tensor):
        for kept, rest in (weight.args[:2], weight.args[1::-1]):
            if kept in constant and isinstance(rest, fx.Node) and rest not in constant:
                return kept, rest
    return weight, None


def _affine_dim(
    node: fx.Node,
    weight: Any,
    constant: set[fx.Node],
    options: Options,
    *,
    blocked: Refusal | None,
) -> int | Refused:
    """The dim that a norm's weight and bias run along; its last, where they are single numbers."""
    operands: Any = [operand for operand in (weight, node.args[2]) if operand is not None]
    if not operands:
        return Refused(Refusal.NOT_AFFINE, node)
    if not allows(options, RULE, node):
        return Refused(Refusal.RULE_OFF, node)
    if blocked is not None:
        return Refused(blocked, node)
    for operand in operands:
        if operand not in constant:
            return not_constant(Refusal.NOT_CONSTANT, operand, operand)
    dim = channel_dim(node, operands)
    if dim is None and all(is_number(operand) for operand in operands):
        dim = len(g.shape(node) or ()) - 1
    return Refused(Refusal.DIM_NOT_LAST, node) if dim is None else dim


def _never_negative(node: fx.Node, weight: Any, *, given: bool) -> bool:
    """Whether no number that goes past a maximum is negative, whatever the parameters are."""
    spec: Any = node.kwargs["spec"]
    stays = not given or spec.scale > 0  # the scale of a norm that stays
    return stays and (weight is None or is_nonnegative(weight))


def _replace(graph: fx.Graph, node: fx.Node, plan: Plan) -> None:
    for reader in plan.readers:
        fold_into(graph, reader, plan.weight, node.args[2])
    spec: Any = node.kwargs["spec"]
    # the dtype of the result stays that of the norm with its affine part
    node.args = (node.args[0], plan.rest, None, *node.args[3:])
    node.kwargs = {**node.kwargs, "spec": spec._replace(affine_dim=None)}


def _replace_all(graph: fx.Graph, node: fx.Node, plan: Plan) -> None:
    """Folds a norm whose statistics are given: what it reads is read in its place."""
    source: Any = node.args[0]
    spec: Any = node.kwargs["spec"]
    mean: Any = None
    with graph.inserting_before(node):
        emit = Emitter(graph, node, STATISTICS_RULE)
        if plan.signed and node.args[4] is not None:
            mean = row_of(emit, node.args[4], plan.channels)
            node.args = (*node.args[:4], None, *node.args[5:])
        scale, shift = scale_and_shift(emit, node, plan.channels)
        if plan.signed and not plan.positive and scale is not None:
            size = emit(aten.clamp_min.default, emit(aten.abs.default, scale), _SMALL)
            signs = emit(aten.div.Tensor, scale, size)
            mean = None if mean is None else emit(aten.mul.Tensor, mean, signs)
            source, scale = _signed(emit, node, signs, plan), size
        if spec.contiguous:
            source = graph.call_function(aten.contiguous.default, (source,))
            g.inherit_meta(source, node)
    node.replace_all_uses_with(source, propagate_meta=False)
    for found in plan.readers:
        reader = replace(found, source=source) if found.source is node else found
        if mean is not None:
            reader = shifted_reader(
                graph, reader, aten.sub.Tensor, mean, spec.stats_dtype, STATISTICS_RULE
            )
        if not reader.padded or shift is None:
            fold_into(graph, reader, scale, shift)
            continue
        before = shift
        if scale is not None:
            with graph.inserting_before(reader.node):
                before = Emitter(graph, node, STATISTICS_RULE)(aten.div.Tensor, shift, scale)
        reader = shifted_reader(
            graph, reader, aten.add.Tensor, before, spec.stats_dtype, STATISTICS_RULE
        )
        fold_into(graph, reader, scale, None)
    graph.erase_node(node)


def _signed(emit: Emitter, node: fx.Node, signs: fx.Node, plan: Plan) -> fx.Node:
    """What a norm reads, each channel times p, the sign of its scale."""
    held: Any = g.tensor(node.args[0])
    after = held.dim() - 1 - plan.dim
    column = column_of(emit, signs, plan.channels, held, held.dtype, after)
    return emit(aten.mul.Tensor, node.args[0], column, like=g.value(node))
