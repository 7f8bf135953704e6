"""Mean-blindness: which values may be shifted, block by block, without any result changing.

    LN(x + c 1) = LN(x),   since   mean(x + c 1) = mean(x) + c

A backward analysis. A value is blind in the blocks in which all of its readers are: a LayerNorm
over exactly one dim is blind in the rows along it, an operator that carries blocks is as blind as
its own readers are, and everything else (an output, a product, a write to memory, whatever has no
law) sees what it reads. The shifts of several values go together: each is a shift of what a norm
reads, and the norm is blind to their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks
from normfx.analyses.carried import FLOATS, Carried, Use, carried, reads_numbers
from normfx.ops import NormSpec, norm
from normfx.passes.hoist import MAX_GROWTH


class MeanBlind:
    """Which blocks of each value nobody sees a shift of.

    Args:
        graph: with canonical nodes; not changed.

    Attributes:
        blocks: of each value that something reads.
        uses: of each place where a constant is read: the blocks it may be centred in there.
        seen_by: the reader that saw a value, or some part of it.
        laws: of each operator that carries blocks.
        constant: the nodes that depend on parameters alone.
        written: the storages that are written to.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.constant = g.parameter_only(graph)
        self.written = g.written_storages(graph) - {None}
        self.blocks: dict[fx.Node, Blocks] = {}
        self.uses: dict[Use, Blocks] = {}
        self.seen_by: dict[fx.Node | Use, fx.Node] = {}
        self.laws: dict[fx.Node, tuple[Carried, tuple[Use, ...]]] = {}
        self._opaque: set[fx.Node] = set()  # what is read, but is no tensor with blocks
        for node in reversed(graph.nodes):
            self._visit(node)

    def of(self, node: fx.Node) -> Blocks | None:
        """The blocks in which a value is blind, or None if it is seen."""
        found = self.blocks.get(node)
        return None if found is None or found.is_none() else found

    def _visit(self, node: fx.Node) -> None:
        if node not in self.blocks and node not in self._opaque and _only_computes(node):
            return  # nobody reads it
        rows, law = blind_rows(node), None
        if rows is None and not self._is_written(node):
            law = carried(node, self.constant)
        if law is not None:
            self.laws[node] = law
        demanded: dict[Use, Blocks | None] = {}
        if rows is not None:
            demanded[Use(node, (0,))] = rows
        elif law is not None and node in self.blocks:
            demanded = dict(zip(law[1], law[0].back(self.blocks[node]), strict=True))
        by_law = set(demanded) if law is not None else set()
        known = any(use.reader is not node for use in demanded)  # what a split splits, say
        if not known or law is None or law[1][0].scaled is not None:
            for use in uses_of(node):
                if use not in demanded and reads_numbers(node, use.path[0]):
                    demanded[use] = None
        for use, blocks in demanded.items():
            self._demand(use, use.value, blocks, node, through=use in by_law)
        for value in set(node.all_input_nodes) - {use.value for use in uses_of(node)}:
            self._demand(Use(node, ()), value, None, node, through=False)

    def _is_written(self, node: fx.Node) -> bool:
        return g.storage(node) in self.written or bool(g.mutated_arguments(node))

    def _demand(
        self, use: Use, value: fx.Node, blocks: Blocks | None, by: fx.Node, *, through: bool
    ) -> None:
        held = g.tensor(value)
        if held is None:  # a tuple, or a value of unknown shape
            self._opaque.add(value)
            return
        if blocks is None or g.storage(value) in self.written:
            blocks = Blocks.none(held.dim())
        guilty = by
        if through and by in self.blocks and self.blocks[by].is_partial():
            guilty = self.seen_by.get(by, by)
        if blocks.is_partial():
            self.seen_by.setdefault(value, guilty)
        if value in self.constant and use.path and is_stored(value):
            before = self.uses.get(use)
            joined = blocks if before is None else before.join(blocks, held.shape)
            self.uses[use] = Blocks.none(held.dim()) if joined is None else joined.centrable()
            if self.uses[use].is_partial():
                self.seen_by.setdefault(use, guilty)
        if use.scale is not None:
            return  # the operator itself makes its numbers for all who read them
        before = self.blocks.get(value)
        joined = blocks if before is None else before.join(blocks, held.shape)
        self.blocks[value] = Blocks.none(held.dim()) if joined is None else joined


def _only_computes(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") or g.is_pure(node)


def blind_rows(node: fx.Node) -> Blocks | None:
    """The rows that a norm takes the mean from, if it is over exactly one dim, and no other."""
    if not g.is_call(node, norm) or not is_plain_layer_norm(node):
        return None
    spec: Any = node.kwargs["spec"]
    shape = g.shape(node.args[0])
    return None if shape is None else Blocks.whole(shape, spec.dims[0])


def is_plain_layer_norm(node: fx.Node) -> bool:
    """Whether a norm subtracts the mean over one whole dim and divides by the deviation from it."""
    spec: Any = node.kwargs["spec"]
    _, _, _, _, mean, square, gate = node.args
    given = [operand for operand in (mean, square, gate) if operand is not None]
    return (
        subtracts_mean(spec) and len(spec.dims) == 1 and not (given or spec.groups or spec.prefix)
    )


def subtracts_mean(spec: NormSpec) -> bool:
    """Whether a norm is (x - mean) / deviation over some dims."""
    return spec.statistic == "variance" and spec.centre


def is_stored(node: fx.Node) -> bool:
    """Whether a constant can be centred outside of the graph, once: `hoist` takes it then."""
    held = g.tensor(node)
    if held is None or held.dtype not in FLOATS or held.layout != torch.strided:
        return False
    if not all(isinstance(size, int) for size in held.shape):
        return False
    behind, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in behind:
                behind.add(source)
                pending.append(source)
    parameters = [g.tensor(n) for n in behind if n.op == "placeholder"]
    size = sum(t.numel() for t in parameters if t is not None)
    return bool(parameters) and held.numel() <= MAX_GROWTH * size


def uses_of(node: fx.Node) -> Iterator[Use]:
    """Every place among a node's arguments where a node is read."""

    def walk(argument: Any, path: tuple[int, ...]) -> Iterator[Use]:
        if isinstance(argument, fx.Node):
            yield Use(node, path)
        elif isinstance(argument, (list, tuple)):
            for index, item in enumerate(argument):
                yield from walk(item, (*path, index))

    yield from walk(node.args, ())
