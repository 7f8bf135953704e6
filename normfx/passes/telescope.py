"""Telescope: norms whose statistics are given vanish from a residual stream (post-norm).

    n(h + f) = s (h + (f - m)) + b           the norm: its mean goes into the branch before
    A y + a  = (A diag(s)) x + (a + A b)     a reader of y = s x + b
    y + B z + c = s (x + B' z + c'),         B' = diag(1/s) B,  c' = (c + b) / s

for each channel. So the norm is left out, its linear readers take s and b over, and what is added
to it takes 1/s and b. The sum then has the scale s, and no shift. It goes on like that, through any
number of additions, until the next norm takes s into its own scale. Front to back, one norm after
the other vanishes, and the last one holds the product of all. A norm that only linear operators
read vanishes in the same way, with no division.

Rounding is that of eager. Every value of the stream is what it was but for its scale, and a
floating-point number is as exact at another scale, unless its exponent leaves the range: |s| must
lie within 1/LIMIT and LIMIT. A mean that no branch can take would go into a + A (b - s m), which is
small where both of its parts are large: it must not be larger than the deviation. Both are checked
on the values at hand, and by a condition whenever weights are made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.offset import Addend, Read, is_sum, spread
from normfx.cost import Cost, of_affine, of_made_bias
from normfx.layout import plain
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.affines import Affine, Affines, is_near, is_sound
from normfx.passes.channels import Channels
from normfx.passes.emit import Emitter, copied_bytes
from normfx.passes.fold_back import (
    Writer,
    given_channel,
    moved_from,
    scale_weight,
    writer_of,
)
from normfx.passes.readers import Reader, fold_into, reader_of
from normfx.passes.values import Values
from normfx.passes.verdict import Refused, allows, change, not_worth, refuse
from normfx.record import Refusal

aten = torch.ops.aten

RULE = "telescope"


@dataclass(frozen=True, slots=True)
class _Branch:
    """What is added to the stream: operators and norms whose sum it is, to be divided by s.

    Attributes:
        addend: where it is added.
        dim: the dim of the addend that numbers the channels.
    """

    addend: Addend
    dim: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a norm goes into.

    Attributes:
        channel: the dim that numbers the channels.
        size: how many there are.
        centred: what makes a part of its input, and can take its mean; None: nothing can.
        readers: linear operators, and whether what they read is shifted.
        norms: that read the stream, and whether what they read is shifted.
        branches: what is added.
    """

    channel: int
    size: int
    centred: fx.Node | Writer | None
    readers: list[tuple[Reader, bool]]
    norms: list[tuple[fx.Node, bool]]
    branches: list[_Branch]


def telescope(
    gm: fx.GraphModule, options: Options, *, blocked: Refusal | None, values: Values
) -> list[fx.Node]:
    """Takes norms whose statistics are given out of the graph, where all that reads them allows it.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
        blocked: why nothing may be folded in this graph (gradients flow, say), or None.
        values: of the parameters, as they are now.

    Returns:
        Conditions: nodes that read only parameters, and must be true whenever the graph runs.

    Every norm with given statistics gets one record.

    Refuses:
        rule-off, needs-grad, inside-a-body, weight-not-tracked, statistics-not-tracked,
        mutation-between, affine-not-constant, channels-mixed, writer-not-linear, range-too-small,
        no-reader, extra-user, reader-not-linear, zero-padding, dim-not-last, weight-not-constant,
        scale-not-known, ill-conditioned, not-worth-it.
    """
    found = [n for n in gm.graph.find_nodes(op="call_function", target=norm) if _is_given(n)]
    if not found:
        return []
    telescoping = _Telescope(gm.graph, options, blocked, values)
    for node in found:
        if node.args[0] not in telescoping.constant:
            telescoping.visit(node)
    telescoping.affines.settle()
    return telescoping.conditions


def _is_given(node: fx.Node) -> bool:
    spec: Any = node.kwargs["spec"]
    return spec.statistic in ("running", "static")


class _Telescope:
    """One graph on its way: its norms, what was asked of the weights, and how to change it."""

    def __init__(
        self, graph: fx.Graph, options: Options, blocked: Refusal | None, values: Values
    ) -> None:
        self.graph, self.options, self.blocked, self.values = graph, options, blocked, values
        self.constant = g.parameter_only(graph)
        self.written = g.written_storages(graph) - {None}
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.affines = Affines(graph, self.constant, RULE)
        self.conditions: list[fx.Node] = []

    def visit(self, node: fx.Node) -> None:
        """Decides about one norm, and takes it out if it may go."""
        plan = self._check(node)
        if isinstance(plan, Refused):
            refuse(node, "fold", RULE, plan)
            return
        names = [reader.node.name for reader, _ in plan.readers]
        names += [branch.addend.operand.name for branch in plan.branches]
        names += [following.name for following, _ in plan.norms]
        change(node, "fold", RULE, f"into {', '.join(names)}")
        self._replace(node, plan)

    # ------------------------------------------------------------------------ the check

    def _check(self, node: fx.Node) -> _Plan | Refused:
        if not allows(self.options, RULE, node):
            return Refused(Refusal.RULE_OFF, node)
        channel = given_channel(node, self.constant, self.options, RULE, blocked=self.blocked)
        if isinstance(channel, Refused):
            return channel
        source: Any = node.args[0]
        spec: Any = node.kwargs["spec"]
        shape: Any = g.shape(node)
        size = plain(shape[channel])
        if not isinstance(size, int):
            return Refused(Refusal.CHANNELS_MIXED, node)
        if g.storage(source) in self.written:
            return Refused(Refusal.MUTATED, source)
        if g.dtype(source) != spec.out_dtype:
            return Refused(Refusal.NOT_LINEAR_BEFORE, source)
        if not node.users:
            return Refused(Refusal.NO_READER, node)
        channels = Channels.along(len(shape), channel, size)
        centred = self._centred(node, source, channel)
        has_mean, has_shift = self.affines.parts(node)
        shifted = has_shift or (has_mean and centred is None)
        found = spread(node, channels, self.order, shifted=shifted)
        for value in found.values:
            if g.storage(value) in self.written:
                return Refused(Refusal.MUTATED, value)
            if g.dtype(value) is torch.float16:
                return Refused(Refusal.RANGE, value)
        plan = _Plan(channel, size, centred, [], [], [])
        for read in found.reads:
            refused = self._read(read, plan)
            if refused is not None:
                return refused
        for addend in found.addends:
            dim = _whole(addend.offset.channels, plan.size)
            if dim is None:
                return Refused(Refusal.CHANNELS_MIXED, addend.node)
            terms = self._terms(addend.node, addend.operand, dim)
            if isinstance(terms, Refused):
                return terms
            plan.branches.append(_Branch(addend, dim))
        return self._conditioned(node, plan)

    def _centred(self, reader: fx.Node, node: Any, dim: int) -> Writer | fx.Node | None:
        """What makes one term of a value that has one reader, and can subtract a mean from it."""
        if len(node.users) > 1 or g.storage(node) in self.written:
            return None
        if is_sum(node):
            found = (self._centred(node, term, dim) for term in node.args[:2])
            return next((taker for taker in found if taker is not None), None)
        if g.is_call(node, norm) and _is_given(node):
            terms = self._terms(reader, node, dim)
            return None if isinstance(terms, Refused) else node
        writer = writer_of(reader, node, dim, g.dtype(node), self.constant, self.written)
        if isinstance(writer, Writer):
            return writer
        before = moved_from(node, dim)
        return None if before is None or before < 0 else self._centred(node, node.args[0], before)

    def _read(self, read: Read, plan: _Plan) -> Refused | None:
        """Puts an operator that reads the stream into the plan, or says why it cannot be there."""
        user, offset = read.user, read.offset
        if user.op == "output":
            return Refused(Refusal.EXTRA_USER, user)
        if g.is_call(user, norm) and _is_given(user) and user.args[0] is read.source:
            channel = given_channel(user, self.constant, self.options, RULE, blocked=self.blocked)
            if isinstance(channel, Refused):
                return channel
            if _whole(offset.channels, plan.size) != channel:
                return Refused(Refusal.CHANNELS_MIXED, user)
            plan.norms.append((user, offset.shifted))
            return None
        reader = reader_of(
            read.source, user, offset.channels, self.constant, shifted=offset.shifted
        )
        if isinstance(reader, Refused):
            return reader
        if any(user is known.node for known, _ in plan.readers):  # of two values of the stream
            return Refused(Refusal.NOT_LINEAR, user)
        plan.readers.append((reader, offset.shifted))
        return None

    def _terms(self, reader: fx.Node, node: fx.Node, dim: int) -> list[Writer | fx.Node] | Refused:
        """The operators and norms that a branch is the sum of, where each may make others."""
        if len(node.users) == 1 and g.storage(node) not in self.written:
            if g.is_call(node, norm) and _is_given(node):
                channel = given_channel(
                    node, self.constant, self.options, RULE, blocked=self.blocked
                )
                return [node] if channel == dim else Refused(Refusal.CHANNELS_MIXED, node)
            if is_sum(node):
                terms: Any = node.args[:2]
                a, b = (self._terms(node, term, dim) for term in terms)
                if isinstance(a, Refused) or isinstance(b, Refused):
                    return a if isinstance(a, Refused) else b
                return [*a, *b]
        dtype = g.dtype(node)
        writer = writer_of(reader, node, dim, dtype, self.constant, self.written)
        return writer if isinstance(writer, Refused) else [writer]

    def _conditioned(self, node: fx.Node, plan: _Plan) -> _Plan | Refused:
        """The plan, if the weights are such that it may be carried out."""
        refused = self._not_worth(node, plan)
        if refused is not None:
            return refused
        has_mean, _ = self.affines.parts(node)
        far = has_mean and plan.centred is None
        if not plan.branches and not far:
            return plan
        if not self.options.allows("hoist"):  # which is what conditions are checked by
            return Refused(Refusal.RULE_OFF, node)
        numbers = self.affines.numbers(node, plan.size, self.values)
        if numbers is None:
            return Refused(Refusal.SCALE_UNKNOWN, node)
        if plan.branches and not is_sound(self.values, numbers):
            return Refused(Refusal.CONDITION, node)
        if far and (node.args[5] is None or not is_near(self.values, node)):
            return Refused(Refusal.CONDITION, node)
        return plan

    def _not_worth(self, node: fx.Node, plan: _Plan) -> Refused | None:
        """Why it does not pay to take a norm out, if so: biases may be made, and weights copied."""
        has_mean, _ = self.affines.parts(node)
        takers: list[tuple[Any, bool]] = [
            (taker, branch.addend.offset.shifted)
            for branch in plan.branches
            for taker in self._written(branch)
        ]
        takers += [(plan.centred, True)] if has_mean else []
        writers = [(taker, shifted) for taker, shifted in takers if isinstance(taker, Writer)]
        made = [(w.node, w.channels) for w, shifted in writers if shifted and w.bias is None]
        for reader, shifted in plan.readers:
            if shifted and reader.bias is None and reader.out is not None:
                made.append((reader.node, (g.shape(reader.weight) or ())[reader.out]))
        after = sum((of_made_bias(user, outputs) for user, outputs in made), Cost())
        weights = [writer.weight for writer, _ in writers]
        copied = copied_bytes([*weights, *(reader.weight for reader, _ in plan.readers)])
        return not_worth(node, of_affine(node), after, copied)

    def _written(self, branch: _Branch) -> list[Writer | fx.Node]:
        """What makes a branch; the first of it takes the shift."""
        terms = self._terms(branch.addend.node, branch.addend.operand, branch.dim)
        assert not isinstance(terms, Refused)
        return terms

    # ------------------------------------------------------------------------ the replacement

    def _replace(self, node: fx.Node, plan: _Plan) -> None:
        affines = self.affines
        held, emit = affines.of(node, plan.size), affines.emitter(node)
        if plan.branches:
            self.conditions.append(is_sound(emit, held))
        if held.mean is not None and plan.centred is None:
            self.conditions.append(is_near(emit, node))
        elif held.mean is not None:
            self._give(plan.centred, plan.size, shift=emit(aten.neg.default, held.mean))
            affines.put(node, plan.size, held._replace(mean=None))
        held = affines.without_mean(node, plan.size)
        for reader, shifted in plan.readers:
            fold_into(self.graph, reader, held.scale, held.shift if shifted else None)
            self._learn(reader.node)
        inverse = emit(aten.reciprocal.default, held.scale) if plan.branches else None
        for branch in plan.branches:
            self._divide(branch, plan.size, held, inverse)
        for following, shifted in plan.norms:
            affines.scale_input(
                following, plan.size, held.scale, held.shift if shifted else None, inverse
            )
        self._take_out(node)

    def _divide(self, branch: _Branch, size: int, held: Affine, inverse: Any) -> None:
        """Makes a branch compute (y + T) / S in place of y, or y / S where the stream has no T."""
        addend = branch.addend
        terms = self._written(branch)
        shift: Any = None
        if addend.offset.shifted and held.shift is not None:
            shift = self.affines.emitter(addend.node)(aten.mul.Tensor, held.shift, inverse)
        for term in terms:
            self._give(term, size, inverse, shift)
            shift = None

    def _give(self, taker: Any, size: int, scale: Any = None, shift: Any = None) -> None:
        """Makes an operator or a norm compute scale * y + shift in place of y."""
        if not isinstance(taker, Writer):
            self.affines.scale_output(taker, size, scale, shift)
            return
        with self.graph.inserting_before(taker.node):
            scale_weight(Emitter(self.graph, taker.node, RULE), taker, scale, shift)
        self._learn(taker.node)

    def _take_out(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        spec: Any = node.kwargs["spec"]
        if spec.contiguous:
            with self.graph.inserting_before(node):
                source = self.graph.call_function(aten.contiguous.default, (source,))
            g.inherit_meta(source, node)
            self.order[source] = self.order[node]
        self.affines.forget(node)
        node.replace_all_uses_with(source, propagate_meta=False)
        self.graph.erase_node(node)

    def _learn(self, node: fx.Node) -> None:
        """Another norm may be read by the same operators, beside this one."""
        made = [n for n in node.all_input_nodes if n.meta.get("normfx_rule")]
        self.constant.update(made)


def _whole(channels: Channels, size: int) -> int | None:
    """The dim along which the channels run, all of them in order, or None."""
    dims = channels.dims()
    if len(dims) != 1 or channels.labels.numel() != size:
        return None
    in_order = torch.equal(channels.labels.flatten(), torch.arange(size, device="cpu"))
    return dims[0] if in_order else None
