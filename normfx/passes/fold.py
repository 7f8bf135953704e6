"""Fold: the weight and bias of a norm into the linear operators that read it.

    norm(x; w, b) @ V^T + c  =  norm(x; 1, 0) @ (V diag(w))^T + (c + V b)        (FlashNorm,
    2407.09577, 1 and 3)

The folded weights are ordinary nodes of the graph: `hoist` moves them out of it. They are computed
in float64 and rounded once. Every reader must take its share, or the norm keeps its affine part; a
weight that has other readers stays whole, since a reader gets a weight of its own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.ops import norm
from normfx.options import Options
from normfx.passes.emit import Emitter
from normfx.record import Record, Refusal

aten = torch.ops.aten

RULE = "fold-affine-into-linear"

# Views and copies that keep every row of the last dim whole and in place.
_KEEPS_LAST_DIM = frozenset(
    {
        aten.view,
        aten.reshape,
        aten._unsafe_view,
        aten.unsqueeze,
        aten.squeeze,
        aten.flatten,
        aten.unflatten,
        aten.expand,
        aten.transpose,
        aten.permute,
        aten.slice,
        aten.select,
        aten.index,
        aten.clone,
        aten.contiguous,
        aten.alias,
        aten.detach,
        aten.to,
        aten._to_copy,
        aten.dropout,
        aten.chunk,
        aten.split,
        aten.split_with_sizes,
        aten.unbind,
    }
)


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear operator that contracts the last dim of a norm's result with a parameter.

    Attributes:
        node: the operator.
        weight: the parameter.
        out_first: whether the parameter is (out, in); else (in, out).
        bias: its bias, or None.
    """

    node: fx.Node
    weight: fx.Node
    out_first: bool
    bias: fx.Node | None


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a norm keeps its affine part, and the node that made it so."""

    code: Refusal
    node: fx.Node


def fold(gm: fx.GraphModule, options: Options, *, blocked: Refusal | None) -> None:
    """Folds the affine part of every canonical norm whose readers are all linear.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says whether the rule may run.
        blocked: why nothing may be folded in this graph (gradients flow, say), or None.

    Every norm of an activation gets one record.

    Refuses:
        no-affine, rule-off, needs-grad, inside-a-body, weight-not-tracked, mutation-between,
        affine-not-constant, dim-not-last, no-reader, extra-user, reader-not-linear,
        weight-not-constant, range-too-small.
    """
    constant = g.parameter_only(gm.graph)
    written = g.written_storages(gm.graph)
    for node in list(gm.graph.nodes):
        if (
            not g.is_call(node, norm) or node.args[0] in constant
        ):  # a standardised weight: hoist takes all of it
            continue
        site = node.meta["normfx_site"]
        plan = _check(node, constant, written, options, blocked=blocked)
        if isinstance(plan, Refused):
            record = Record("fold", RULE, False, plan.code, plan.node.name, g.location(plan.node))
        else:
            _replace(gm.graph, node, plan)
            names = ", ".join(reader.node.name for reader in plan)
            record = Record("fold", RULE, True, None, node.name, site.location, f"into {names}")
        site.records.append(record)


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
    spec: Any = node.kwargs["spec"]
    rank: Any = node.kwargs["rank"]
    if g.storage(node) in written:
        return Refused(Refusal.MUTATED, node)
    operands: Any = node.args[1:3]
    for operand in operands:
        if operand is None:
            continue
        if operand not in constant:
            return Refused(Refusal.NOT_CONSTANT, operand)
        shape = g.shape(operand)
        along_last = shape is not None and all(str(s) == "1" for s in shape[:-1])
        if not along_last or spec.affine_dim not in (None, rank - 1):
            return Refused(Refusal.DIM_NOT_LAST, node)
    readers: list[Reader] = []
    pending = [(node, user) for user in node.users]
    if not pending:
        return Refused(Refusal.NO_READER, node)
    while pending:
        source, user = pending.pop()
        if user.op == "output":
            return Refused(Refusal.EXTRA_USER, user)
        if _keeps_last_dim(source, user):
            if g.storage(user) in written and g.storage(user) is not None:
                return Refused(Refusal.MUTATED, user)
            pending += [(user, next_user) for next_user in user.users]
            continue
        reader = _reader(source, user, constant)
        if isinstance(reader, Refused):
            return reader
        readers.append(reader)
    return sorted(set(readers), key=lambda r: r.node.name)


def _keeps_last_dim(source: fx.Node, user: fx.Node) -> bool:
    packet = g.packet(user)
    if g.is_call(user, operator.getitem):
        return isinstance(g.value(user), torch.Tensor)
    if packet not in _KEEPS_LAST_DIM or user.args[0] is not source:
        return False
    old = g.value(source)
    new = g.value(user)
    if isinstance(old, (list, tuple)):
        old = old[0]
    parts = list(new) if isinstance(new, (list, tuple)) else [new]
    if not all(isinstance(p, torch.Tensor) and p.dim() for p in parts) or not isinstance(
        old, torch.Tensor
    ):
        return False
    rank = old.dim()
    if any(
        str(p.shape[-1]) != str(old.shape[-1])
        or p.dtype.is_floating_point != old.dtype.is_floating_point
        for p in parts
    ):
        return False
    if packet in (aten.transpose, aten.permute):
        return g.permutation(user, rank)[-1] == rank - 1
    if packet is aten.dropout:
        return not user.args[2]
    if packet in (
        aten.slice,
        aten.select,
        aten.chunk,
        aten.split,
        aten.split_with_sizes,
        aten.unbind,
    ):
        dim = g.arguments(user).get("dim", 0)
        return isinstance(dim, int) and dim % rank != rank - 1
    if packet is aten.index:
        indices = user.args[1]
        return (
            isinstance(indices, (list, tuple))
            and (len(indices) < rank)
            and parts[0].dim() >= 1
            and _rows_only(user, rank)
        )
    if packet in (aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten):
        return _rows_stay(old, parts[0])
    if packet in (aten.unsqueeze, aten.squeeze):
        return _rows_stay(old, parts[0])
    if packet is aten.expand:
        return str(parts[0].shape[-1]) == str(old.shape[-1])
    return True


def _rows_only(user: fx.Node, rank: int) -> bool:
    """Whether an index selects along leading dims alone, and leaves the last dim last."""
    indices = user.args[1]
    assert isinstance(indices, (list, tuple))
    first = [i for i in indices if isinstance(i, fx.Node)]
    return len(indices) < rank and len(first) == len(indices)


def _rows_stay(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether a view keeps the last dim: rows of equal length stay rows, whatever comes before."""
    return (
        new.dim() > 0
        and old.dim() > 0
        and str(new.shape[-1]) == str(old.shape[-1])
        and str(old.shape[-1]) != "1"
    )


def _reader(source: fx.Node, user: fx.Node, constant: set[fx.Node]) -> Reader | Refused:
    packet = g.packet(user)
    args: Any = user.args
    if packet is aten.linear and args[0] is source and source not in args[1:]:
        reader = Reader(user, args[1], True, args[2] if len(args) > 2 else None)
    elif packet is aten.addmm and args[1] is source and source not in (args[0], args[2]):
        scaled = g.arguments(user)
        if scaled["beta"] != 1 or scaled["alpha"] != 1:
            return Refused(Refusal.NOT_LINEAR, user)
        reader = Reader(user, args[2], False, args[0])
    elif packet in (aten.mm, aten.matmul) and args[0] is source and args[1] is not source:
        reader = Reader(user, args[1], False, None)
    else:
        return Refused(Refusal.NOT_LINEAR, user)
    if reader.weight not in constant or (reader.bias is not None and reader.bias not in constant):
        return Refused(Refusal.WEIGHT_NOT_CONSTANT, user)
    if g.dtype(reader.weight) is torch.float16:
        return Refused(Refusal.RANGE, user)
    if len(g.shape(reader.weight) or ()) != 2:
        return Refused(Refusal.NOT_LINEAR, user)
    if reader.bias is not None and len(g.shape(reader.bias) or ()) != 1:
        return Refused(Refusal.NOT_LINEAR, user)
    return reader


def _replace(graph: fx.Graph, node: fx.Node, readers: list[Reader]) -> None:
    weight, bias = node.args[1], node.args[2]
    for reader in readers:
        _fold_into(graph, reader, weight, bias)
    spec: Any = node.kwargs["spec"]
    # the dtype of the result stays that of the norm with its affine part
    node.args = (node.args[0], None, None, *node.args[3:])
    node.kwargs = {**node.kwargs, "spec": spec._replace(affine_dim=None)}


def _fold_into(graph: fx.Graph, reader: Reader, weight: Any, bias: Any) -> None:
    node = reader.node
    dtype = g.dtype(reader.weight)
    assert dtype is not None
    with graph.inserting_before(node):
        emit = Emitter(graph, node, RULE)
        exact = emit(aten.to.dtype, reader.weight, torch.float64)
        folded, shift = reader.weight, None
        if weight is not None:
            scale = emit(aten.reshape.default, emit(aten.to.dtype, weight, torch.float64), [-1])
            if not reader.out_first:
                scale = emit(aten.unsqueeze.default, scale, 1)
            product = emit(aten.mul.Tensor, exact, scale)
            folded = emit(aten.to.dtype, product, dtype, like=g.value(reader.weight))
        if bias is not None:
            row = emit(aten.reshape.default, emit(aten.to.dtype, bias, torch.float64), [-1])
            width = (g.shape(reader.weight) or ())[1 if reader.out_first else 0]
            row = emit(aten.expand.default, row, [width])
            shift = emit(
                aten.mv.default, exact if reader.out_first else emit(aten.t.default, exact), row
            )
            bias_dtype = dtype
            if reader.bias is not None:
                bias_dtype = g.dtype(reader.bias) or dtype
                shift = emit(
                    aten.add.Tensor, shift, emit(aten.to.dtype, reader.bias, torch.float64)
                )
            like = g.value(reader.bias) if reader.bias is not None else _column(reader)
            shift = emit(aten.to.dtype, shift, bias_dtype, like=like)
    new_bias = shift if shift is not None else reader.bias
    source = node.args[1] if g.packet(node) is aten.addmm else node.args[0]
    if g.packet(node) is aten.addmm:
        node.args = (new_bias, source, folded)
    elif g.packet(node) is aten.linear:
        node.args = (source, folded, new_bias) if new_bias is not None else (source, folded)
    elif new_bias is None:
        node.args = (source, folded)
    else:  # a bias is made: the product becomes a linear layer, which adds it in its epilogue
        with graph.inserting_before(node):
            transposed = Emitter(graph, node, RULE)(aten.t.default, folded)
        node.target = aten.linear.default
        node.args = (source, transposed, new_bias)


def _column(reader: Reader) -> torch.Tensor:
    """A fake tensor like the bias that a reader has not got: one element for each output."""
    held = g.tensor(reader.weight)
    assert held is not None
    with g.fake_mode(reader.weight), torch.no_grad():
        return held.new_empty(held.shape[0 if reader.out_first else 1])
