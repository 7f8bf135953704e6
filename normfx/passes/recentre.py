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
are centred in place of it, in the graph; and so is what else a stream begins with (an input). The
cost model says where that pays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks, Run
from normfx.analyses.carried import Use
from normfx.analyses.meanblind import MeanBlind, is_plain_layer_norm, subtracts_mean
from normfx.analyses.zeromean import CENTRED, Reason, Zero, ZeroMean, is_zero
from normfx.cost import Cost, adds_nothing, of_mean
from normfx.laws import ARRANGEMENTS, VIEWS
from normfx.ops import NormSpec, norm
from normfx.options import Options
from normfx.passes.emit import Emitter, copied_bytes
from normfx.passes.sketch import Sketch
from normfx.passes.verdict import Refused, allows, change, not_worth, refuse
from normfx.record import Refusal
from normfx.torch_internals import size_hint

aten = torch.ops.aten

RULE = "recentre"

# What may stand between looked-up rows and the sum of them that is the head of a stream.
_SUMS = frozenset({aten.add, aten.mul, aten.div, aten.to, aten._to_copy, aten.dropout} | VIEWS)


def recentre(
    gm: fx.GraphModule,
    options: Options,
    *,
    blocked: Refusal | None,
    frozen: bool = False,
    baked: bool = False,
) -> None:
    """Makes an RMSNorm of every LayerNorm whose input can be given mean zero.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
        blocked: why no weight may be changed in this graph (gradients flow, say), or None.
        frozen: whether those that no gradients are wanted of may nevertheless.
        baked: whether `bake_` was called on the model, so that no weight may have a second copy,
            unless the rule is asked for by name.

    With gradients the rule runs only if it is asked for by name: the weights are centred again in
    every step, in the graph, so the parameters get the gradients that they have without it.

    Every LayerNorm of an activation gets one record.

    Refuses:
        rule-off, needs-grad, inside-a-body, weight-not-tracked, other-width, mutation-between,
        stream-read, post-norm-input, gate-not-constant, active-dropout, writer-not-linear,
        not-worth-it, weights-baked.
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
        asked = [node for node in sites if allows(options, RULE, node)]
        plans = _plans(gm.graph, asked, blind, training=training)
        if frozen:
            plans = {node: _of_frozen(node, plan) for node, plan in plans.items()}
    made = [plan for plan in plans.values() if isinstance(plan, Zero)]
    heads, done = _heads(_uses(made), blind) if blind is not None else ({}, set())
    if baked and not options.asks_for(RULE):
        for node, plan in plans.items():
            if isinstance(plan, Zero) and not done.issuperset(plan.uses):
                plans[node] = Refused(Refusal.BAKED, node)
        made = [plan for plan in plans.values() if isinstance(plan, Zero)]
        heads, done = _heads(_uses(made), blind) if blind is not None else ({}, set())
    for node in sites:
        plan = plans.get(node) or _switched_off(node, options, blocked)
        if isinstance(plan, Refused):
            refuse(node, "rewrite", RULE, plan)
        else:
            _convert(node)
            names = [use.value.name for use in _ordered(plan)] + [v.name for v in plan.values]
            change(node, "rewrite", RULE, f"centres {', '.join(dict.fromkeys(names))}")
    if blind is not None:
        for value, rows in ({v: blind.blocks[v] for v in _values(made)} | heads).items():
            _centre_value(gm.graph, value, rows)
        stored = [use for use in _uses(made) if use not in done]
        _centre_all(gm.graph, stored, blind, torch.float32 if training else torch.float64)


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
    graph: fx.Graph, sites: list[fx.Node], blind: MeanBlind, *, training: bool
) -> dict[fx.Node, Zero | Refused]:
    zero = ZeroMean(graph, blind)
    plans: dict[fx.Node, Zero | Refused] = {}
    legal: dict[fx.Node, Zero] = {}
    stay: list[fx.Node] = []
    for node in sites:
        found = _check(node, blind) or is_zero(zero, node)
        if isinstance(found, Zero):
            legal[node] = found
        elif isinstance(found, Refused):
            plans[node] = found
        else:
            stay.append(node)
            x: Any = node.args[0]
            plans[node] = _refused(found, blind, _made_from(x, blind))
    for group in _groups(legal):  # in training the rule is asked for by name
        plans |= group if training else _judged(group, blind)
    if stay:
        zero = ZeroMean(graph, blind, in_graph=True)
        found = {node: is_zero(zero, node) for node in stay}
        legal = {node: at for node, at in found.items() if isinstance(at, Zero)}
        for group in _groups(legal):
            # to centre what one norm reads is what that norm does
            plans |= _judged(group, blind) if len(group) > 1 else {}
    return plans


def _groups(plans: dict[fx.Node, Zero]) -> list[dict[fx.Node, Zero]]:
    """The norms by what has to be centred: those that share a part of it go together."""
    above: dict[Any, Any] = {}

    def top(item: Any) -> Any:
        while above.setdefault(item, item) != item:
            above[item] = above[above[item]]
            item = above[item]
        return item

    for node, plan in plans.items():
        for part in plan.uses | plan.values:
            above[top(part)] = top(node)
    groups: dict[Any, dict[fx.Node, Zero]] = {}
    for node, plan in plans.items():
        groups.setdefault(top(node), {})[node] = plan
    return list(groups.values())


def _judged(norms: dict[fx.Node, Zero], blind: MeanBlind) -> dict[fx.Node, Zero | Refused]:
    """The plans of some norms if it pays to centre all that these need, else why not.

    A value that is centred in the graph needs a mean of its own, and may be written once more. One
    norm behind looked-up rows gains nothing by that, nor does it lose.
    """
    uses = _uses(norms.values())
    heads, done = _heads(uses, blind)
    centred = {value: blind.blocks[value] for value in _values(norms.values())} | heads
    before, after = sum(map(of_mean, norms), Cost()), Cost()
    for value, rows in centred.items():
        without, with_mean = _in_graph(value, rows, blind)
        before, after = before + without, after + with_mean
    copied = copied_bytes(use.value for use in uses if use not in done)
    constants = not copied and centred.keys() == heads.keys()
    if constants and adds_nothing(before, after):
        return dict(norms)
    guilty = next(iter((*centred, *norms)))
    refused = not_worth(guilty, before, after, copied)
    return dict.fromkeys(norms, refused) if refused is not None else dict(norms)


def _in_graph(value: fx.Node, rows: Blocks, blind: MeanBlind) -> tuple[Cost, Cost]:
    """What the kernels around a value cost, and what if it is centred there."""
    sketch = Sketch([value], blind.constant)
    before = sketch.cost()
    _centre_value(sketch.graph, sketch.of[value], rows)
    return before, sketch.cost()


def _uses(plans: Iterable[Zero]) -> list[Use]:
    return list({use: None for plan in plans for use in _ordered(plan)})


def _values(plans: Iterable[Zero]) -> list[fx.Node]:
    return list({value: None for plan in plans for value in sorted(plan.values)})


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


def _heads(uses: list[Use], blind: MeanBlind) -> tuple[dict[fx.Node, Blocks], set[Use]]:
    """Where rows are centred once a call, as a copy of their whole table would be larger.

    Where a stream begins as a sum of looked-up rows and constants (tokens, positions), the sum is
    centred: no table is copied. The mean is one pass over what the first norm reads anyway.

    Returns:
        These sums and their rows, and the uses that are done with that.
    """
    heads: dict[fx.Node, Blocks] = {}
    done: set[Use] = set()
    for use in uses:
        if use in done or g.packet(use.reader) is not aten.embedding or not _is_large(use):
            continue
        head = _head(use.reader, blind)
        rows = blind.of(head)
        if rows is None or rows.row() is None:
            continue
        before, after = _in_graph(head, rows, blind)
        if after.bytes > before.bytes or after.kernels > before.kernels:
            continue  # not in a kernel that is there anyway
        inside = _only_for(head, blind)
        done.update(u for u in uses if u.reader in inside)
        heads[head] = rows
    return heads, done


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


def _centre_value(graph: fx.Graph, node: fx.Node, rows: Blocks) -> None:
    """Takes the mean of each row from a value, in the graph and in float32 at least."""
    held, dim = g.tensor(node), rows.row()
    assert held is not None
    assert dim is not None
    dtype = torch.promote_types(held.dtype, torch.float32)
    with g.fake_mode(node), torch.no_grad():
        wide = torch.empty_like(held, dtype=dtype)
        one, result = wide.mean(dim, keepdim=True), torch.empty_like(held)
    with graph.inserting_before(_after(node)):
        emit = Emitter(graph, node, RULE)
        source = node if dtype == held.dtype else emit(aten.to.dtype, node, dtype, like=wide)
        mean = emit(aten.mean.dim, source, [dim], True, like=one)
        centred = emit(aten.sub.Tensor, source, mean, like=wide)
        made = {source, mean, centred}
        if dtype != held.dtype:
            centred = emit(aten.to.dtype, centred, held.dtype, like=result)
    node.replace_all_uses_with(centred, lambda user: user not in made, propagate_meta=False)
    g.inherit_provenance(centred, node)
    centred.meta[CENTRED] = rows


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
