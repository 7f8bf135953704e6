"""Bounds: how large the numbers of a value can be, whatever the inputs and parameters are.

    |tanh(x)| <= 1      |a + b| <= |a| + |b|      |x_i| / sqrt(mean(x^2) + eps) <= sqrt(n)

A forward analysis. The bounds are those of the real numbers: rounding may exceed them by some ulp,
and a NaN by anything. What is not known is not bounded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from normfx import graph as g
from normfx.laws import ARRANGEMENTS, EXACT_DTYPES, VIEWS
from normfx.layout import plain
from normfx.ops import NormSpec, norm

aten = torch.ops.aten

# Operators on the way from a value to what bounds it: a longer way is taken for unbounded.
_MAX_DEPTH = 32

Law: TypeAlias = "Callable[[Bounds, fx.Node, int], float | None]"


class Bounds:
    """The bounds of a graph's values. What is written to in place has none.

    Args:
        graph: with canonical nodes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.written = g.written_storages(graph)

    def of(self, node: Any, depth: int = _MAX_DEPTH) -> float | None:
        """The largest absolute value that a node's numbers can have, or None.

        Args:
            node: a node, or a number.
            depth: how many more operators to look through.
        """
        if isinstance(node, (int, float)):
            return abs(float(node)) if math.isfinite(node) else None
        held = g.tensor(node)
        if held is None or held.dtype not in EXACT_DTYPES or not depth:
            return None
        made = None if g.storage(node) in self.written else self._of_call(node, depth - 1)
        # beyond its dtype a number is infinite
        return made if made is not None and 2 * made < torch.finfo(held.dtype).max else None

    def _of_call(self, node: fx.Node, depth: int) -> float | None:
        if g.is_call(node, norm):
            return of_norm(node)
        if g.is_call(node, operator.getitem):
            split: Any = node.args[0]
            return self.of(split.args[0], depth) if g.packet(split) in _SPLITS else None
        law = _LAWS.get(g.packet(node))
        return None if law is None else law(self, node, depth)


def count(node: fx.Node) -> int | None:
    """How many numbers each statistic of a canonical norm is taken of, if that is known."""
    spec: Any = node.kwargs["spec"]
    shape = [plain(size) for size in g.shape(node.args[0]) or ()]
    if spec.groups:
        whole = shape[spec.group_dim]
        inner = whole // spec.groups if isinstance(whole, int) else whole
        shape[spec.group_dim : spec.group_dim + 1] = [spec.groups, inner]
    sizes = [shape[d] for d in spec.dims]
    if spec.prefix and sizes:
        sizes[-1] = spec.prefix
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def multiple(spec: NormSpec, n: int | None) -> float | None:
    """How many times the mean of squares, or the biased variance, a statistic is, if known."""
    if spec.statistic == "mean-square" or (spec.statistic == "variance" and not spec.correction):
        return 1.0
    if n is None:
        return None
    if spec.statistic == "sum-square":
        return float(n)
    return (
        n / (n - spec.correction) if spec.statistic == "variance" and n > spec.correction else None
    )


def of_norm(node: fx.Node) -> float | None:
    """The bound of a norm: each of n numbers with a mean square of one is at most sqrt(n)."""
    spec: Any = node.kwargs["spec"]
    alone = all(operand is None for operand in node.args[1:])
    of_itself = spec.centre == (spec.statistic == "variance")  # or its mean square is unbounded
    n = count(node)
    times = multiple(spec, n)
    if not alone or not of_itself or spec.prefix or n is None or times is None:
        return None
    if spec.eps is None or spec.eps < 0:
        return None
    return abs(spec.scale) * math.sqrt(n / times)


def _at_most(number: float) -> Law:
    return lambda bounds, node, depth: number


def _no_larger(bounds: Bounds, node: fx.Node, depth: int) -> float | None:
    return bounds.of(node.args[0], depth)


def _dropout(bounds: Bounds, node: fx.Node, depth: int) -> float | None:
    return None if node.args[2] else bounds.of(node.args[0], depth)


def _clamp(bounds: Bounds, node: fx.Node, depth: int) -> float | None:
    named = g.arguments(node)
    ends = [named[name] for name in ("min", "max", "min_val", "max_val") if name in named]
    if not all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends):
        return None
    return max(abs(float(end)) for end in ends)


def _largest(bounds: Bounds, node: fx.Node, depth: int) -> float | None:
    terms: Any = node.args[0]
    return _over([bounds.of(term, depth) for term in terms], max)


def _sum(bounds: Bounds, node: fx.Node, depth: int) -> float | None:
    named = g.arguments(node)
    terms = [bounds.of(named[name], depth) for name in ("self", "other", "alpha")]
    return _over(terms, lambda given: given[0] + given[1] * given[2])


def _product(bounds: Bounds, node: fx.Node, depth: int) -> float | None:
    named = g.arguments(node)
    return _over([bounds.of(named[name], depth) for name in ("self", "other")], math.prod)


def _over(found: list[float | None], what: Callable[[list[float]], float]) -> float | None:
    known = [b for b in found if b is not None]
    return what(known) if known and len(known) == len(found) else None


_SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split})

_LAWS: dict[Any, Law] = {
    **dict.fromkeys(
        (aten.sigmoid, aten.hardsigmoid, aten.tanh, aten.erf, aten.sin, aten.cos), _at_most(1.0)
    ),
    **dict.fromkeys((aten.softmax, aten._softmax), _at_most(1.0)),
    aten.relu6: _at_most(6.0),
    **dict.fromkeys((aten.clamp, aten.clip, aten.hardtanh), _clamp),
    # no number that is larger than all of the input's
    **dict.fromkeys(VIEWS, _no_larger),
    **dict.fromkeys(ARRANGEMENTS, _no_larger),
    **dict.fromkeys((aten.clone, aten.contiguous, aten.alias, aten.detach), _no_larger),
    **dict.fromkeys((aten.to, aten._to_copy, aten.type_as), _no_larger),
    **dict.fromkeys((aten.expand, aten.slice, aten.narrow, aten.select, aten.flip), _no_larger),
    **dict.fromkeys((aten.neg, aten.abs, aten.mean), _no_larger),
    **dict.fromkeys((aten.relu, aten.gelu, aten.silu, aten.hardswish), _no_larger),
    aten.dropout: _dropout,
    # of several
    **dict.fromkeys((aten.cat, aten.concat, aten.stack), _largest),
    **dict.fromkeys((aten.add, aten.sub), _sum),
    aten.mul: _product,
}
