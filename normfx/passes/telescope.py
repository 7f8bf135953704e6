"""Telescope: norms whose statistics are given vanish from a residual stream (post-norm).

    y = s x + t                              the norm
    A y + a   = (A diag(s)) x + (a + A t)    a reader
    y + B z + b = s (x + B' z + b'),   B' = diag(1/s) B,  b' = (b + t) / s

for each channel. So the norm is left out, its linear readers take s and t over, and what is added
to it takes 1/s and t. The sum then has the scale s, and no shift. It goes on like that, through any
number of additions, until the next norm takes s into its own scale. Front to back, one norm after
the other vanishes, and the last one holds the product of all. A norm read by nothing but linear
operators vanishes in the same way, with no division.

Every value of the stream becomes v / s. A floating-point number is as exact at another scale, so
rounding is that of eager, unless the exponents leave their range: |s| must lie within 1/LIMIT and
LIMIT. That is checked on the values at hand, and by a condition whenever weights are made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.offset import Addend, Read, is_sum, spread
from normfx.layout import plain
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.channels import Channels
from normfx.passes.emit import Emitter
from normfx.passes.fold import Reader, fold_into, reader_of
from normfx.passes.fold_back import (
    Writer,
    given_channel,
    scale_and_shift,
    scale_weight,
    writer_of,
)
from normfx.passes.values import Values
from normfx.passes.verdict import Refused, change, refuse
from normfx.record import Refusal

aten = torch.ops.aten

RULE = "telescope"
# Numbers of bfloat16 and float32 have exponents from -126 to 127. With this bound those of eager
# may lie anywhere between 2^-94 and 2^95.
LIMIT = 2.0**32


@dataclass(frozen=True, slots=True)
class _Affine:
    """S and T of one norm, in float64, one number for each channel; no T is zero."""

    scale: Any
    shift: Any


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
    channel: int
    size: int
    readers: list[tuple[Reader, bool]]  # and whether what it reads is shifted
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
        scale-not-known, ill-conditioned.
    """
    found = [n for n in gm.graph.find_nodes(op="call_function", target=norm) if _is_given(n)]
    if not found:
        return []
    telescoping = _Telescope(gm.graph, options, blocked, values)
    for node in found:
        if node.args[0] not in telescoping.constant:
            telescoping.visit(node)
    telescoping.settle()
    return telescoping.conditions


def _is_given(node: fx.Node) -> bool:
    spec: Any = node.kwargs["spec"]
    return spec.statistic in ("running", "static")


class _Telescope:
    """One graph on its way; `affine` has S and T of norms that have taken over those of others."""

    def __init__(
        self, graph: fx.Graph, options: Options, blocked: Refusal | None, values: Values
    ) -> None:
        self.graph, self.options, self.blocked, self.values = graph, options, blocked, values
        self.constant = g.parameter_only(graph)
        self.written = g.written_storages(graph) - {None}
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.affine: dict[fx.Node, _Affine] = {}
        self.conditions: list[fx.Node] = []
        self._in_front = False
        self._anchor: Any = None  # the first node that reads other inputs

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
        found = spread(node, channels, self.order, shifted=self._is_shifted(node))
        for value in found.values:
            if g.storage(value) in self.written:
                return Refused(Refusal.MUTATED, value)
            if g.dtype(value) is torch.float16:
                return Refused(Refusal.RANGE, value)
        plan = _Plan(channel, size, [], [], [])
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

    def _is_shifted(self, node: fx.Node) -> bool:
        if node in self.affine:
            return self.affine[node].shift is not None
        return node.args[2] is not None or node.args[4] is not None

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
        if not plan.branches:
            return plan
        if not self.options.allows("hoist"):  # which is what conditions are checked by
            return Refused(Refusal.RULE_OFF, node)
        affine = self._numbers(node, plan.size)
        if affine is None:
            return Refused(Refusal.SCALE_UNKNOWN, node)
        if not _is_sound(self.values, affine):
            return Refused(Refusal.CONDITION, node)
        return plan

    def _numbers(self, node: fx.Node, size: int) -> _Affine | None:
        """S and T of a norm as they are now, or None if they are not known."""
        held = self.affine.get(node)
        operands: Any = node.args[1:6] if held is None else (held.scale, held.shift)
        numbers = [None if operand is None else self.values.of(operand) for operand in operands]
        if any((a is None) != (b is None) for a, b in zip(operands, numbers, strict=True)):
            return None
        if held is None:
            return _Affine(*scale_and_shift(self.values, node, size))
        return _Affine(*numbers)

    # ------------------------------------------------------------------------ the replacement

    def _replace(self, node: fx.Node, plan: _Plan) -> None:
        self._bring_in_front()
        held = self._affine_of(node, plan.size)
        for reader, shifted in plan.readers:
            fold_into(self.graph, reader, held.scale, held.shift if shifted else None)
            self._learn(reader.node)
        for following, shifted in plan.norms:
            before = held if shifted else _Affine(held.scale, None)
            self._compose(following, plan.size, inner=before)
        if plan.branches:
            inverse, shift = self._inverse(node, held)
            for branch in plan.branches:
                self._divide(branch, plan.size, inverse, shift)
        self._take_out(node)

    def _divide(self, branch: _Branch, size: int, inverse: fx.Node, shift: Any) -> None:
        """Makes a branch compute (y + T) / S in place of y, or y / S where the stream has no T."""
        addend = branch.addend
        terms: Any = self._terms(addend.node, addend.operand, branch.dim)
        shift = shift if addend.offset.shifted else None
        for term in terms:
            if isinstance(term, Writer):
                with self.graph.inserting_before(term.node):
                    scale_weight(Emitter(self.graph, term.node, RULE), term, inverse, shift)
                self._learn(term.node)
            else:
                self._compose(term, size, outer=_Affine(inverse, shift))
            shift = None

    def _inverse(self, node: fx.Node, held: _Affine) -> tuple[fx.Node, Any]:
        """1/S and T/S. That they may be used becomes a condition."""
        with self.graph.inserting_before(self._anchor):
            emit = Emitter(self.graph, node, RULE)
            self.conditions.append(_is_sound(emit, held))
            inverse = emit(aten.reciprocal.default, held.scale)
            shift = held.shift
            return inverse, None if shift is None else emit(aten.mul.Tensor, shift, inverse)

    def _affine_of(self, node: fx.Node, size: int) -> _Affine:
        """The nodes of S and T of a norm."""
        if node not in self.affine:
            with self.graph.inserting_before(self._anchor):
                emit = Emitter(self.graph, node, RULE)
                self.affine[node] = _valued(node, size, *scale_and_shift(emit, node, size))
        return self.affine[node]

    def _compose(
        self,
        node: fx.Node,
        size: int,
        *,
        inner: _Affine | None = None,
        outer: _Affine | None = None,
    ) -> None:
        """Makes a norm scale and shift what it reads before, or what it makes after."""
        held = self._affine_of(node, size)
        first, second = (inner, held) if inner is not None else (held, outer)
        assert first is not None
        assert second is not None
        with self.graph.inserting_before(self._anchor):
            emit = Emitter(self.graph, node, RULE)
            scale = emit(aten.mul.Tensor, second.scale, first.scale)
            shift = second.shift
            if first.shift is not None:
                moved = emit(aten.mul.Tensor, second.scale, first.shift)
                shift = moved if shift is None else emit(aten.add.Tensor, shift, moved)
        self.affine[node] = _valued(node, size, scale, shift)

    def _take_out(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        spec: Any = node.kwargs["spec"]
        if spec.contiguous:
            with self.graph.inserting_before(node):
                source = self.graph.call_function(aten.contiguous.default, (source,))
            g.inherit_meta(source, node)
            self.order[source] = self.order[node]
        if self._anchor is node:
            self._anchor = node.next
        node.replace_all_uses_with(source, propagate_meta=False)
        self.graph.erase_node(node)
        del self.affine[node]

    def settle(self) -> None:
        """Gives every norm that is left the S and T that it has taken over."""
        for node, held in self.affine.items():
            spec: Any = node.kwargs["spec"]
            channel = given_channel(node, self.constant, self.options, RULE, blocked=None)
            like = self._row_like(node, held.scale)
            with self.graph.inserting_before(node):
                emit = Emitter(self.graph, node, RULE)
                weight, bias = (
                    None if row is None else emit(aten.to.dtype, row, spec.stats_dtype, like=like)
                    for row in (held.scale, held.shift)
                )
            node.args = (node.args[0], weight, bias, None, None, None, None)
            settled = spec._replace(
                statistic="static",
                scale=1.0,
                norm_dtype=spec.stats_dtype,
                affine_dim=channel,
                origin="algebra",
            )
            node.kwargs = {**node.kwargs, "spec": settled}

    @staticmethod
    def _row_like(node: fx.Node, row: fx.Node) -> Any:
        spec: Any = node.kwargs["spec"]
        with g.fake_mode(node), torch.no_grad():
            return g.value(row).to(spec.stats_dtype)

    def _bring_in_front(self) -> None:
        """Moves what reads only parameters before all else, so that any operator can read it."""
        if self._in_front:
            return
        nodes = [node for node in self.graph.nodes if node.op != "placeholder"]
        self._anchor = next(node for node in nodes if node not in self.constant)
        first = self.order[self._anchor]
        for node in nodes:
            if node in self.constant and self.order[node] > first:
                self._anchor.prepend(node)
        self._in_front = True

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


def _is_sound(emit: Any, affine: _Affine) -> Any:
    """Whether a scale is neither zero nor extreme, and a shift finite, as a node or a value."""
    size = emit(aten.abs.default, affine.scale)
    small = emit(aten.le.Scalar, size, LIMIT)  # false of NaN
    sound = emit(aten.logical_and.default, small, emit(aten.ge.Scalar, size, 1 / LIMIT))
    if affine.shift is not None:
        sound = emit(aten.logical_and.default, sound, emit(aten.isfinite.default, affine.shift))
    return emit(aten.all.default, sound)


def _valued(node: fx.Node, size: int, scale: fx.Node, shift: Any) -> _Affine:
    """S and T with what they look like, which later folds ask for."""
    held: Any = g.tensor(node)
    with g.fake_mode(node), torch.no_grad():
        row = held.new_empty(size, dtype=torch.float64)
    for made in (scale, shift):
        if made is not None:
            made.meta["val"] = row
    return _Affine(scale, shift)
