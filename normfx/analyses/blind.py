"""Blind: what the results of a graph do not see of a value, and the uses of a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.analyses.partition import Partition
from normfx.ops import norm

_OPERANDS = ("x", "weight", "bias", "eps", "mean", "square", "gate")


@dataclass(frozen=True, slots=True, eq=False)
class Blind:
    """What no result sees of a value.

    Attributes:
        scale: the blocks that may be multiplied by a positive factor each.
        shift: the blocks that a constant may be added to each.
        norms: the canonical norms that make it so.
    """

    scale: Partition
    shift: Partition
    norms: frozenset[fx.Node] = frozenset()

    @classmethod
    def nothing(cls, rank: int) -> Blind:
        """Every change is seen."""
        return cls(Partition.none(rank), Partition.none(rank))

    @classmethod
    def unread(cls, rank: int) -> Blind:
        """No change is seen."""
        return cls(Partition.each(rank), Partition.each(rank))

    def join(self, other: Blind) -> Blind:
        """What neither of two readers sees."""
        return Blind(
            self.scale.join(other.scale), self.shift.join(other.shift), self.norms | other.norms
        )

    def is_dead(self, shape: Sequence[Any]) -> bool:
        """Whether no change of a value of this shape is seen."""
        return self.shift.is_each(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One occurrence of a value in the arguments of an operator.

    Attributes:
        source: the value.
        user: the operator.
        name: the argument.
        index: the position in it, where it is a list.
        found: what no result sees of the values after it.
    """

    source: fx.Node
    user: fx.Node
    name: str
    index: int
    found: dict[fx.Node, Blind]

    @property
    def out(self) -> Blind:
        """What no result sees of the operator's."""
        return self.found[self.user]

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the value."""
        return g.shape(self.source) or ()

    @property
    def made(self) -> tuple[Any, ...]:
        """The shape of the operator's result."""
        return g.shape(self.user) or ()

    @property
    def named(self) -> dict[str, Any]:
        """The operator's arguments by name."""
        return arguments(self.user)

    def scale(self, blocks: Partition) -> Blind:
        """Blind to factors of these blocks, as far as the operator's readers are."""
        return Blind(blocks, Partition.none(blocks.rank), self.out.norms)

    def moved(self, move: Callable[[Partition], Partition]) -> Blind:
        """The numbers are those of the operator's result, elsewhere."""
        return Blind(move(self.out.scale), move(self.out.shift), self.out.norms)

    def nothing(self) -> Blind:
        """Every change is seen."""
        return Blind.nothing(len(self.shape))

    def unread(self) -> Blind:
        """No change is seen."""
        return Blind.unread(len(self.shape))


def arguments(user: fx.Node) -> dict[str, Any]:
    """The arguments of a canonical norm or of an ATen operator by name."""
    if user.target is norm:
        return {**dict.fromkeys(_OPERANDS), **dict(zip(_OPERANDS, user.args, strict=False))}
    return g.arguments(user) if isinstance(user.target, torch._ops.OpOverload) else {}


def uses(node: fx.Node, found: dict[fx.Node, Blind]) -> Iterator[Use]:
    """Every occurrence of a value in the arguments of other nodes."""
    for user in node.users:
        known = 0
        for name, argument in arguments(user).items():
            several = argument if isinstance(argument, (list, tuple)) else [argument]
            for index, part in enumerate(several):
                if part is node:
                    known += 1
                    yield Use(node, user, name, index, found)
        if not known:
            yield Use(node, user, "", 0, found)
