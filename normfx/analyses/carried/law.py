"""A law: what an operator does with the blocks of the operands that it carries; broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.blocks import Blocks

aten = torch.ops.aten


Path: TypeAlias = "tuple[int, ...]"
Parts: TypeAlias = "list[Blocks | None]"


class Use(NamedTuple):
    """One place where a value is read.

    Attributes:
        reader: the node that reads.
        path: where among its arguments.
        scale: a factor for each output that goes into the value first (LayerScale), or None.
        scaled: the product with that factor, which then goes.
    """

    reader: fx.Node
    path: Path
    scale: fx.Node | None = None
    scaled: fx.Node | None = None

    @property
    def value(self) -> Any:
        """What is read."""
        found: Any = self.reader.args
        for index in self.path:
            found = found[index]
        return found

    def replace(self, new: fx.Node) -> None:
        """Makes the reader read another node there."""

        def replaced(old: Any, rest: Path) -> Any:
            if not rest:
                return new
            return tuple(
                replaced(item, rest[1:]) if i == rest[0] else item for i, item in enumerate(old)
            )

        self.reader.args = replaced(self.reader.args, self.path)


aten = torch.ops.aten

PRODUCTS = frozenset({aten.mul, aten.multiply})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class Carried:
    """What an operator does with the blocks of the operands it carries.

    Attributes:
        paths: where these operands stand among the arguments; the others are seen.
        back: from blocks of the result to those of each operand: an addition to these does no more
            than one to the result's. None for an operand without such blocks.
        forth: from blocks of zero mean of each operand (None: none are known) to the result's.
    """

    paths: tuple[Path, ...]
    back: Callable[[Blocks], Parts]
    forth: Callable[[Parts], Blocks | None]


def one(
    path: int, back: Callable[[Blocks], Blocks | None], forth: Callable[[Blocks], Blocks | None]
) -> Carried:
    """The law of an operator that carries the operand at one place."""

    def forward(parts: Parts) -> Blocks | None:
        return None if parts[0] is None else forth(parts[0])

    return Carried(((path,),), lambda blocks: [back(blocks)], forward)


def is_float(node: Any) -> bool:
    """Whether a node holds floating-point numbers that blocks are known of."""
    return g.dtype(node) in FLOATS


def narrowed(blocks: Blocks, new: Sequence[Any], old: Sequence[Any] | None) -> Blocks | None:
    """The blocks of an operand that is broadcast to a result with these blocks."""
    if old is None:
        return None
    kept = without_leading(blocks, len(new) - len(old))
    for dim, (size, wide) in enumerate(zip(old, new[len(new) - len(old) :], strict=True)):
        if not kept.is_free(dim) and str(size) != str(wide):
            kept = kept.free(dim)
    return kept


def widened(blocks: Blocks, old: Sequence[Any] | None, new: Sequence[Any]) -> Blocks | None:
    """The blocks of a result that an operand with these blocks is broadcast to."""
    return None if old is None else with_leading(blocks, len(new) - len(old))


def without_leading(blocks: Blocks, count: int) -> Blocks:
    """The blocks without their first dims, each of which every index had the same of."""
    for dim in range(count):
        blocks = blocks.free(dim)
    return Blocks(blocks.labels.reshape(blocks.labels.shape[count:]))


def with_leading(blocks: Blocks, count: int) -> Blocks:
    """The same blocks under further dims."""
    return Blocks(blocks.labels.reshape([*[1] * count, *blocks.labels.shape]))
