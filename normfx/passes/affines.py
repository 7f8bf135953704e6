"""Affines: what norms whose statistics are given compute, S * (x - M) + T, while rules change it.

Each is a row of numbers for each channel, in float64, made of the norm's operands by nodes that
stand before all that reads other inputs: any operator can take them over. A norm that is left at
the end gets them as its operands, rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from normfx import graph as g
from normfx.passes.emit import Emitter
from normfx.passes.fold_back import channel_of, given_affine
from normfx.passes.values import Values

aten = torch.ops.aten

# Numbers of bfloat16 and float32 have exponents from -126 to 127. With this bound those of eager
# may lie anywhere between 2^-94 and 2^95.
LIMIT = 2.0**32
# How large means may be, to deviations, where they go into the operators after the norm: at two,
# the error measured is 1.9 of eager's, at one 1.6 (BatchNorm and linear, bfloat16, CPU).
NEAR = 1.0


class Affine(NamedTuple):
    """S * (x - M) + T for each channel, as nodes or numbers; None is zero."""

    scale: Any
    mean: Any
    shift: Any


class Affines:
    """The affines of one graph's norms that were asked for.

    Args:
        graph: the graph.
        constant: its nodes whose value depends on parameters alone.
        rule: the rule that asks.
    """

    def __init__(self, graph: fx.Graph, constant: set[fx.Node], rule: str) -> None:
        self._graph, self._constant, self._rule = graph, constant, rule
        self._held: dict[fx.Node, Affine] = {}
        self._anchor: Any = None  # the first node that reads other inputs

    def parts(self, node: fx.Node) -> tuple[bool, bool]:
        """Whether a norm has a mean, and whether it has a shift."""
        held = self._held.get(node)
        mean, shift = (node.args[4], node.args[2]) if held is None else (held.mean, held.shift)
        return mean is not None, shift is not None

    def numbers(self, node: fx.Node, size: int, values: Values) -> Affine | None:
        """What a norm's affine is now, or None if that is not known."""
        held = self._held.get(node)
        rows: list[Any] = [*node.args[1:6], *(held or ())]
        if any(row is not None and values.of(row) is None for row in rows):
            return None
        if held is None:
            return _scaled(values, *given_affine(values, node, size))
        return Affine(*(None if row is None else values.of(row) for row in held))

    def of(self, node: fx.Node, size: int) -> Affine:
        """The nodes of a norm's affine."""
        if node not in self._held:
            emit = self.emitter(node)
            self.put(node, size, _scaled(emit, *given_affine(emit, node, size)))
        return self._held[node]

    def put(self, node: fx.Node, size: int, affine: Affine) -> None:
        """Sets a norm's affine. Its nodes get a value, which folds ask for."""
        held: Any = g.tensor(node)
        for row in affine:
            if row is not None:
                with g.fake_mode(node), torch.no_grad():
                    row.meta["val"] = held.new_empty(size, dtype=torch.float64)
        self._held[node] = affine

    def without_mean(self, node: fx.Node, size: int) -> Affine:
        """The affine with its mean in the shift."""
        scale, mean, shift = self.of(node, size)
        if mean is not None:
            emit = self.emitter(node)
            moved = emit(aten.mul.Tensor, scale, mean)
            shift = _difference(emit, shift, moved)
            self.put(node, size, Affine(scale, None, shift))
        return self._held[node]

    def scale_output(self, node: fx.Node, size: int, scale: Any, shift: Any) -> None:
        """Makes a norm compute scale * y + shift in place of y; None for no scale or shift."""
        held, emit = self.of(node, size), self.emitter(node)
        made, moved = held.scale, held.shift
        if scale is not None:
            made = emit(aten.mul.Tensor, made, scale)
            moved = None if moved is None else emit(aten.mul.Tensor, moved, scale)
        self.put(node, size, Affine(made, held.mean, _sum(emit, moved, shift)))

    def scale_input(
        self, node: fx.Node, size: int, scale: fx.Node, shift: Any, inverse: Any
    ) -> None:
        """Makes a norm of scale * x + shift one of x.

        Args:
            node: the norm.
            size: the number of channels.
            scale: of what it reads.
            shift: of what it reads, or None.
            inverse: of the scale, if it may be divided by.
        """
        held, emit = self.of(node, size), self.emitter(node)
        made = emit(aten.mul.Tensor, held.scale, scale)
        if shift is None and inverse is not None:
            mean = None if held.mean is None else emit(aten.mul.Tensor, held.mean, inverse)
            self.put(node, size, Affine(made, mean, held.shift))
            return
        moved = shift if held.mean is None else _difference(emit, shift, held.mean)
        moved = None if moved is None else emit(aten.mul.Tensor, held.scale, moved)
        self.put(node, size, Affine(made, None, _sum(emit, held.shift, moved)))

    def emitter(self, node: fx.Node) -> Any:
        """Makes nodes for a norm, before all that reads other inputs."""
        self._bring_in_front()
        emitter = Emitter(self._graph, node, self._rule)

        def emit(target: Any, *args: Any, like: Any = None) -> fx.Node:
            with self._graph.inserting_before(self._anchor):
                return emitter(target, *args, like=like)

        return emit

    def forget(self, node: fx.Node) -> None:
        """Drops a norm that is about to be erased."""
        if self._anchor is node:
            self._anchor = node.next
        self._held.pop(node, None)

    def settle(self) -> None:
        """Gives the norms that are left their affines as operands."""
        for node, held in self._held.items():
            spec: Any = node.kwargs["spec"]
            rank: Any = node.kwargs["rank"]
            channel = channel_of(node)
            weight, mean, bias = (
                None if row is None else self._rounded(node, row, spec.stats_dtype) for row in held
            )
            if mean is not None:  # which broadcasts as it is
                shape = [-1 if dim == channel else 1 for dim in range(rank)]
                with g.fake_mode(node), torch.no_grad():
                    seen = g.value(mean).reshape(shape)
                mean = self.emitter(node)(aten.reshape.default, mean, shape, like=seen)
            node.args = (node.args[0], weight, bias, None, mean, None, None)
            settled = spec._replace(
                statistic="static",
                scale=1.0,
                norm_dtype=spec.stats_dtype,
                affine_dim=channel,
                origin="algebra",
            )
            node.kwargs = {**node.kwargs, "spec": settled}

    def _rounded(self, node: fx.Node, row: fx.Node, dtype: torch.dtype) -> fx.Node:
        with g.fake_mode(node), torch.no_grad():
            like = torch.empty_like(g.value(row), dtype=dtype)  # no two operands are one tensor
        return self.emitter(node)(aten.to.dtype, row, dtype, like=like)

    def _bring_in_front(self) -> None:
        """Moves what reads only parameters before all else."""
        if self._anchor is not None:
            return
        nodes = [node for node in self._graph.nodes if node.op != "placeholder"]
        first = next(i for i, node in enumerate(nodes) if node not in self._constant)
        self._anchor = nodes[first]
        for node in nodes[first:]:
            if node in self._constant:
                self._anchor.prepend(node)


def _scaled(emit: Any, scale: Any, mean: Any, shift: Any) -> Affine:
    """An affine whose scale is a row of ones where a norm has none (what `bake_` made neutral)."""
    if scale is None and (mean is not None or shift is not None):
        scale = emit(aten.ones_like.default, shift if mean is None else mean)
    return Affine(scale, mean, shift)


def is_sound(emit: Any, affine: Affine) -> Any:
    """Whether a scale is neither zero nor extreme, and all is finite, as a node or a value."""
    size = emit(aten.abs.default, affine.scale)
    small = emit(aten.le.Scalar, size, LIMIT)  # false of NaN
    sound = emit(aten.logical_and.default, small, emit(aten.ge.Scalar, size, 1 / LIMIT))
    for row in (affine.mean, affine.shift):
        if row is not None:
            sound = emit(aten.logical_and.default, sound, emit(aten.isfinite.default, row))
    return emit(aten.all.default, sound)


def is_near(emit: Any, node: fx.Node, limit: float = NEAR) -> Any:
    """Whether a norm's means are within so many deviations, by and large, as a node or a value."""
    eps, mean, square = node.args[3:6]
    spec: Any = node.kwargs["spec"]
    rows = [emit(aten.to.dtype, operand, torch.float64) for operand in (mean, square)]
    variance = emit(aten.add.Tensor, rows[1], spec.eps if eps is None else eps)
    ratio = emit(aten.div.Tensor, emit(aten.square.default, rows[0]), variance)
    return emit(aten.le.Scalar, emit(aten.mean.default, ratio), limit**2)


def _sum(emit: Any, a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    return emit(aten.add.Tensor, a, b)


def _difference(emit: Any, a: Any, b: fx.Node) -> Any:
    return emit(aten.neg.default, b) if a is None else emit(aten.sub.Tensor, a, b)
