"""Recentre: a LayerNorm whose input has mean zero is an RMSNorm; constants are centred for that.

    LN(x) = RMSNorm(x - mean(x)),  with the same eps,  as  var(x) = mean((x - mean(x))^2)
    LN(x + c 1) = LN(x)                                        (Pre-RMSNorm, 2305.14858, 3)

Where every reader of a residual stream is a LayerNorm over its channels, nobody sees the mean of
the stream. Whatever writes into it is linear in a constant, which is centred over the channels that
it makes: a weight over its outputs, a bias, each row of an embedding table, a position, a class
token. Then the stream has mean zero, and its LayerNorms need not take it.

`meanblind` says which constants may be centred, `zeromean` which norms then have an input of mean
zero. A constant is copied for the place where it is read, so that other readers (a tied head) keep
the original. Centred constants are computed in float64 and rounded once, and are ordinary nodes of
the graph, which `hoist` moves out of it. Where a table has more rows than a call looks up, these
are centred in place of it, in the graph; and so is what else a stream begins with (an input),
where enough norms read it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks, Run
from normfx.analyses.carried import Use
from normfx.analyses.meanblind import MeanBlind, is_plain_layer_norm, subtracts_mean
from normfx.analyses.zeromean import CENTRED, Reason, Zero, ZeroMean, is_zero
from normfx.laws import ARRANGEMENTS, VIEWS
from normfx.ops import NormSpec, norm
from normfx.options import Options
from normfx.passes.emit import Emitter
from normfx.passes.verdict import Refused, allows, change, refuse
from normfx.record import Refusal
from normfx.torch_internals import size_hint

aten = torch.ops.aten

RULE = "recentre"

# A value is centred in the graph if norms of this many times as many numbers become cheaper.
_SAVED = 2

# What may stand between looked-up rows and the sum of them that is the head of a stream.
_SUMS = frozenset({aten.add, aten.mul, aten.div, aten.to, aten._to_copy, aten.dropout} | VIEWS)


def recentre(
    gm: fx.GraphModule, options: Options, *, blocked: Refusal | None, frozen: bool = False
) -> None:
    """Makes an RMSNorm of every LayerNorm whose input can be given mean zero.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
        blocked: why no weight may be changed in this graph (gradients flow, say), or None.
        frozen: whether those that no gradients are wanted of may nevertheless.

    With gradients the rule runs only if it is asked for by name: the weights are centred again in
    every step, in the graph, so the parameters get the gradients that they have without it.

    Every LayerNorm of an activation gets one record.

    Refuses:
        rule-off, needs-grad, inside-a-body, weight-not-tracked, other-width, mutation-between,
        stream-read, post-norm-input, gate-not-constant, active-dropout, writer-not-linear.
    """
    training = blocked is Refusal.NEEDS_GRAD
    if training and options.asks_for(RULE):
        blocked, frozen = None, False
    elif frozen:
        blocked, training = None, False
    constant = g.parameter_only(gm.graph)
    sites = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=norm)
        if _is_layer_norm(node) and node.args[0] not in constant
    ]
    plans: dict[fx.Node, Zero | Refused] = {}
    blind: MeanBlind | None = None
    if sites and blocked is None and options.allows(RULE):
        blind = MeanBlind(gm.graph)
        plans = _plans(gm.graph, [n for n in sites if allows(options, RULE, n)], blind)
        if frozen:
            plans = {node: _of_frozen(node, plan) for node, plan in plans.items()}
    for node in sites:
        plan = plans.get(node) or _switched_off(node, options, blocked)
        if isinstance(plan, Refused):
            refuse(node, "rewrite", RULE, plan)
        else:
            _convert(node)
            names = [use.value.name for use in _ordered(plan)] + [v.name for v in plan.values]
            change(node, "rewrite", RULE, f"centres {', '.join(dict.fromkeys(names))}")
    if blind is not None:
        _centre(gm.graph, plans, blind, torch.float32 if training else torch.float64)


def _of_frozen(node: fx.Node, plan: Zero | Refused) -> Zero | Refused:
    """Refuses a plan that centres anything in every step, or what is trained."""
    if isinstance(plan, Refused):
        return plan
    read = [*(use.value for use in plan.uses), *(use.scale for use in plan.uses)]
    trained = g.is_trained(*(node for node in read if node is not None))
    return Refused(Refusal.NEEDS_GRAD, node) if plan.values or trained else plan


def _is_layer_norm(node: fx.Node) -> bool:
    spec: Any = node.kwargs["spec"]
    return subtracts_mean(spec) and spec.kind == "LayerNorm"


def _ordered(plan: Zero) -> list[Use]:
    return sorted(plan.uses, key=lambda use: (use.value.name, use.reader.name, use.path))


def _switched_off(node: fx.Node, options: Options, blocked: Refusal | None) -> Refused:
    if blocked is None or not allows(options, RULE, node):
        return Refused(Refusal.RULE_OFF, node)
    return Refused(blocked, node)


def _plans(
    graph: fx.Graph, sites: list[fx.Node], blind: MeanBlind
) -> dict[fx.Node, Zero | Refused]:
    zero = ZeroMean(graph, blind)
    plans: dict[fx.Node, Zero | Refused] = {}
    stay: list[fx.Node] = []
    for node in sites:
        other = _check(node, blind)
        found = other or is_zero(zero, node)
        if isinstance(found, Reason):
            stay.append(node)
            x: Any = node.args[0]
            found = _refused(found, blind, _made_from(x, blind))
        plans[node] = found
    if stay:
        plans.update(_with_values(ZeroMean(graph, blind, in_graph=True), stay))
    return plans


def _check(node: fx.Node, blind: MeanBlind) -> Refused | None:
    """Why a norm stays whatever the mean of its input is."""
    x: Any = node.args[0]
    if g.storage(x) in blind.written:
        return Refused(Refusal.MUTATED, x)
    given = [operand for operand in node.args[4:7] if isinstance(operand, fx.Node)]
    if given:  # others read its mean too
        return Refused(Refusal.STREAM_READ, given[0])
    spec: Any = node.kwargs["spec"]
    if not is_plain_layer_norm(node) or (spec.correction and _biased(node) is None):
        return Refused(Refusal.OTHER_WIDTH, node)
    return None


def _with_values(zero: ZeroMean, stay: list[fx.Node]) -> dict[fx.Node, Zero]:
    """The norms for which it pays to centre values in the graph: inputs of a stream, say.

    A value is centred by one pass over it. That saves one for each norm that reads the stream.
    """
    groups: list[tuple[set[fx.Node], dict[fx.Node, Zero]]] = []
    for node in stay:
        found = is_zero(zero, node)
        if isinstance(found, Reason):
            continue
        values, norms = set(found.values), {node: found}
        for group in [group for group in groups if group[0] & values]:
            groups.remove(group)
            values |= group[0]
            norms |= group[1]
        groups.append((values, norms))
    chosen: dict[fx.Node, Zero] = {}
    for values, norms in groups:
        saved = sum(_size(node.args[0]) for node in norms)
        if saved >= _SAVED * sum(_size(value) for value in values):
            chosen |= norms
    return chosen


def _size(node: Any) -> int:
    """How many numbers a value has in this call."""
    held = g.tensor(node)
    assert held is not None
    return size_hint(held.numel(), unknown=sys.maxsize)


def _refused(reason: Reason, blind: MeanBlind, stream: set[fx.Node]) -> Refused:
    """The code for a value or a reader of one; `stream` are the values that x is made from."""
    node, packet = reason.node, g.packet(reason.node)
    if g.storage(node) in blind.written or g.mutated_arguments(node):
        return Refused(Refusal.MUTATED, node)
    is_norm = g.is_call(node, norm)
    moves = VIEWS | ARRANGEMENTS | {aten.cat, aten.concat, aten.stack}
    if packet in moves and node in blind.laws:  # a row is made of several, or a part of one
        return Refused(Refusal.OTHER_WIDTH, node)
    if packet in (aten.dropout, aten.feature_dropout):
        return Refused(Refusal.DROPOUT, node)
    if reason.sees and node not in stream:
        spec: Any = node.kwargs.get("spec")
        other = is_norm and subtracts_mean(spec) and not any(node.args[4:7])
        return Refused(Refusal.OTHER_WIDTH if other else Refusal.STREAM_READ, node)
    if is_norm:
        return Refused(Refusal.POST_NORM, node)
    factors = [a for a in node.args if isinstance(a, fx.Node)]
    if packet in (aten.mul, aten.multiply) and not any(a in blind.constant for a in factors):
        return Refused(Refusal.GATED, node)
    if reason.sees:
        return Refused(Refusal.STREAM_READ, node)
    blocks = blind.of(node)
    if blocks is not None and len(blocks.labelled()) > 1:  # and no weight has such blocks
        return Refused(Refusal.OTHER_WIDTH, node)
    return Refused(Refusal.NOT_LINEAR_BEFORE, node)


def _made_from(x: fx.Node, blind: MeanBlind) -> set[fx.Node]:
    """The values that a stream is the sum of, each as it was before and after it was moved."""
    found, pending = {x}, [x]
    while pending:
        node = pending.pop()
        for use in blind.laws[node][1] if node in blind.laws else ():
            if use.value not in found:
                found.add(use.value)
                pending.append(use.value)
    return found


# ---------------------------------------------------------------------------- the norms


def _convert(node: fx.Node) -> None:
    """The same node as an RMSNorm."""
    spec: Any = node.kwargs["spec"]
    biased = _biased(node)
    assert biased is not None
    # aten.rms_norm keeps the strides of x and promotes with the weight. It has no bias: `lower`
    # takes it only if the bias was folded into the readers by then, and the body otherwise
    plain = not spec.contiguous and g.dtype(node.args[1]) in (None, g.dtype(node.args[0]))
    is_operator = spec.origin == "layer_norm" and plain
    spec = biased._replace(
        kind="RMSNorm",
        statistic="mean-square",
        centre=False,
        origin="rms_norm" if is_operator else "algebra",
    )
    node.kwargs = {**node.kwargs, "spec": spec}


def _biased(node: fx.Node) -> NormSpec | None:
    """The same norm with the number of elements as divisor of the variance, or None if unknown.

    x / sqrt(S n / (n - k) + e) = sqrt((n - k) / n) x / sqrt(S + e (n - k) / n)
    """
    spec: Any = node.kwargs["spec"]
    if not spec.correction:
        return spec
    shape: Any = g.shape(node.args[0])
    n = shape[spec.dims[0]]
    if not isinstance(n, int) or n <= spec.correction or spec.eps is None:
        return None
    share = (n - spec.correction) / n
    grown = share if spec.eps_place in ("inside", "floor-inside") else share**0.5
    return spec._replace(correction=0, scale=spec.scale * share**0.5, eps=spec.eps * grown)


# ---------------------------------------------------------------------------- what is centred


def _centre(
    graph: fx.Graph,
    plans: dict[fx.Node, Zero | Refused],
    blind: MeanBlind,
    dtype: torch.dtype,
) -> None:
    """Centres all that the plans name, each once."""
    made = [plan for plan in plans.values() if isinstance(plan, Zero)]
    uses = list({use: None for plan in made for use in _ordered(plan)})
    for value in {value: None for plan in made for value in plan.values}:
        dim = blind.blocks[value].row()
        assert dim is not None
        _centre_value(graph, value, dim).meta[CENTRED] = blind.blocks[value]
    done = _centre_heads(graph, uses, blind)
    _centre_all(graph, [use for use in uses if use not in done], blind, dtype)


def _centre_heads(graph: fx.Graph, uses: list[Use], blind: MeanBlind) -> set[Use]:
    """Centres the rows that a call looks up, where a copy of the whole table would be larger.

    Returns:
        The uses that are done with that.

    Where a stream begins as a sum of looked-up rows and constants (tokens, positions), the sum is
    centred, once a call: no table is copied. The mean is one pass over what the first norm
    reads anyway.
    """
    done: set[Use] = set()
    for use in uses:
        if use in done or g.packet(use.reader) is not aten.embedding or not _is_large(use):
            continue
        head = _head(use.reader, blind)
        rows = blind.of(head)
        dim = None if rows is None else rows.row()
        if dim is None:
            continue
        inside = _only_for(head, blind)
        done.update(u for u in uses if u.reader in inside)
        _centre_value(graph, head, dim).meta[CENTRED] = rows
    return done


def _is_large(use: Use) -> bool:
    """Whether a table has more rows than are looked up in a call."""
    return _size(use.value) > _size(use.reader)


def _head(node: fx.Node, blind: MeanBlind) -> fx.Node:
    """The largest sum of looked-up rows and constants that a value goes into, and nowhere else."""
    while len(node.users) == 1:
        (user,) = node.users
        if user not in blind.laws or not _is_looked_up(user, blind):
            break
        node = user
    return node


def _is_looked_up(node: fx.Node, blind: MeanBlind) -> bool:
    """Whether a value is made of looked-up rows and constants alone."""
    if node in blind.constant or g.packet(node) is aten.embedding:
        return True
    uses = blind.laws[node][1] if node in blind.laws else ()
    return (
        g.packet(node) in _SUMS and bool(uses) and all(_is_looked_up(u.value, blind) for u in uses)
    )


def _only_for(head: fx.Node, blind: MeanBlind) -> set[fx.Node]:
    """The operators whose results go into a value and nowhere else, and that value's own."""
    inside, pending = {head}, [head]
    while pending:
        node = pending.pop()
        for use in blind.laws[node][1] if node in blind.laws else ():
            if use.value not in inside and all(user in inside for user in use.value.users):
                inside.add(use.value)
                pending.append(use.value)
    return inside


def _centre_value(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    """Takes the mean from a value, in the graph and in float32 at least."""
    dtype: Any = g.dtype(node)
    wider = torch.promote_types(dtype, torch.float32)
    with graph.inserting_before(_after(node)):
        emit = Emitter(graph, node, RULE)
        wide = node if wider == dtype else emit(aten.to.dtype, node, wider)
        mean = emit(aten.mean.dim, wide, [dim], True)
        centred = emit(aten.sub.Tensor, wide, mean)
        made = {wide, mean, centred}
        if wider != dtype:
            centred = emit(aten.to.dtype, centred, dtype)
    node.replace_all_uses_with(centred, lambda user: user not in made, propagate_meta=False)
    g.inherit_meta(centred, node)
    return centred


def _centre_all(graph: fx.Graph, uses: list[Use], blind: MeanBlind, dtype: torch.dtype) -> None:
    """Makes each place read a centred copy: one for each constant, its blocks and its scale.

    Args:
        graph: changed in place.
        uses: the places.
        blind: says which blocks.
        dtype: to compute in, or that of the constant if it is wider.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    made: dict[Any, fx.Node] = {}
    values = [use.value for use in uses]
    for use, value in zip(uses, values, strict=True):
        blocks = blind.uses[use]
        (dim,) = blocks.labelled()
        key = (value, dim, tuple(blocks.labels.flatten().tolist()), use.scale)
        if key not in made:
            latest = max((n for n in (value, use.scale) if n is not None), key=order.__getitem__)
            with graph.inserting_before(_after(latest)):
                made[key] = _centred(Emitter(graph, value, RULE), use, blocks, dim, dtype)
            made[key].meta[CENTRED] = blocks
        use.replace(made[key])
    for product in {use.scaled: None for use in uses if use.scaled is not None}:
        factor = next(use.scale for use in uses if use.scaled is product)
        (kept,) = (a for a in product.args if a is not factor)
        assert isinstance(kept, fx.Node)
        product.replace_all_uses_with(kept, propagate_meta=False)
        graph.erase_node(product)


def _after(node: fx.Node) -> fx.Node:
    """Where to insert so that a node is known: after it, and after all inputs of the graph."""
    after = node.next
    while after.op == "placeholder":
        after = after.next
    return after


def _centred(emit: Emitter, use: Use, blocks: Blocks, dim: int, dtype: torch.dtype) -> fx.Node:
    """The constant, scaled and without the mean of each block, rounded once to its dtype."""
    value = use.value
    wide = torch.promote_types(g.dtype(value), dtype)  # pyright: ignore[reportArgumentType]
    source = value
    if g.packet(value) is aten.to and "normfx_rule" in value.meta:  # of another rule: not twice
        source = value.args[0]
    exact = emit(aten.to.dtype, source, wide)
    if use.scale is not None:
        rank = len(g.shape(value) or ())
        factor = emit(aten.to.dtype, use.scale, wide)
        sizes = [1] * rank
        sizes[dim] = -1
        exact = emit(aten.mul.Tensor, exact, emit(aten.reshape.default, factor, sizes))
    runs = blocks.runs()
    if len({(run.size, run.is_block) for run in runs}) == 1:
        centred = _without_means(emit, exact, dim, runs)
    else:
        pieces = []
        for run in runs:
            piece = emit(aten.narrow.default, exact, dim, run.start, run.size)
            pieces.append(_without_means(emit, piece, dim, [run]) if run.is_block else piece)
        centred = emit(aten.cat.default, pieces, dim)
    return emit(aten.to.dtype, centred, g.dtype(value), like=g.value(value))


def _without_means(emit: Emitter, value: fx.Node, dim: int, runs: list[Run]) -> fx.Node:
    """A value without the means of blocks of equal size that are all of it."""
    if len(runs) > 1:
        value = emit(aten.unflatten.int, value, dim, [len(runs), runs[0].size])
    over = dim + (len(runs) > 1)
    centred = emit(aten.sub.Tensor, value, emit(aten.mean.dim, value, [over], True))
    return centred if len(runs) == 1 else emit(aten.flatten.using_ints, centred, dim, dim + 1)
