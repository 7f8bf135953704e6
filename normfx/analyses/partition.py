"""Partition: which numbers of a tensor belong together, and how that was before they were moved.

A partition stands for the functions that are constant on each block (one factor for each, say) and
neutral on the numbers that belong to none. The functions that two partitions both allow are those
of their join, the finest partition that is coarser than both. A coarser partition allows less: it
may always take the place of a finer one, where sizes are symbolic or labels would be too many.

Most partitions are products: along each dim of the tensor a block goes on (shared), or each index
has blocks of its own (free). Labels are for what is no product: groups, parts, neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from normfx.layout import Axes, is_one

Shape: TypeAlias = "Sequence[Any]"

# The label of a number in no block.
NONE = -1
# More labels than this cost more time than a finer answer is worth.
MAX_LABELS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """A partition: two numbers are in one block if their labels and their free indices agree.

    Attributes:
        labels: as many dims as the tensor, of size one where the label does not change.
        free: dims along which each index has blocks of its own; there, labels are of size one.
    """

    labels: torch.Tensor
    free: frozenset[int] = frozenset()

    @classmethod
    def none(cls, rank: int) -> Partition:
        """No number is in a block."""
        return cls(torch.full([1] * rank, NONE, device="cpu"), frozenset(range(rank)))

    @classmethod
    def sharing(cls, rank: int, dims: Iterable[int]) -> Partition:
        """Partition that go on along some dims, for each index of the others."""
        labels = torch.zeros([1] * rank, dtype=torch.int64, device="cpu")
        return cls(labels, frozenset(range(rank)) - frozenset(dims))

    @classmethod
    def each(cls, rank: int) -> Partition:
        """Every number is a block."""
        return cls.sharing(rank, ())

    @property
    def rank(self) -> int:
        """The number of dims of the tensor."""
        return self.labels.dim()

    def is_none(self) -> bool:
        """Whether no number is in a block."""
        return bool((self.labels == NONE).all())

    def is_complete(self) -> bool:
        """Whether every number is in a block."""
        return not bool((self.labels == NONE).any())

    def is_each(self, shape: Shape) -> bool:
        """Whether every number of a tensor of this shape is a block."""
        if not self.is_complete() or any(self._goes_on(d, size) for d, size in enumerate(shape)):
            return False
        return self.labels.unique().numel() == self.labels.numel()

    def refines(self, other: Partition, shape: Sequence[int]) -> bool:
        """Whether every function that another partition allows on this shape is allowed here."""
        joined, given = self.join(other).labelled(shape), other.labelled(shape)
        same_none = torch.equal(*torch.broadcast_tensors(joined == NONE, given == NONE))
        return same_none and int(joined.max()) == int(given.max())

    def _goes_on(self, dim: int, size: Any) -> bool:
        return dim not in self.free and self.labels.shape[dim] == 1 and not is_one(size)

    def join(self, other: Partition) -> Partition:
        """The finest partition that is coarser than both."""
        free = self.free & other.free
        mine = self._labelled({d: other.labels.shape[d] for d in self.free - free})
        theirs = other._labelled({d: self.labels.shape[d] for d in other.free - free})
        sizes = torch.broadcast_shapes(mine.labels.shape, theirs.labels.shape)
        if _product(sizes) > MAX_LABELS:
            return self._whole() if other.is_complete() else Partition.none(self.rank)
        labels = _tight(_joined(mine.labels.expand(sizes), theirs.labels.expand(sizes)))
        return (
            Partition.none(self.rank) if bool((labels == NONE).all()) else Partition(labels, free)
        )

    def shared(self, dims: Iterable[int]) -> Partition:
        """Partition that go on along some dims."""
        return self.join(Partition.sharing(self.rank, [d % self.rank for d in dims]))

    def _whole(self) -> Partition:
        return self.shared(range(self.rank))

    def without(self, labels: torch.Tensor) -> Partition:
        """Without the blocks that have these labels."""
        kept = torch.where(torch.isin(self.labels, labels), NONE, self.labels)
        return Partition(_tight(kept), self.free)

    def _labelled(self, sizes: Mapping[int, int]) -> Partition:
        """The same with labels in place of some free dims."""
        labels = self.labels
        for dim, size in sizes.items():
            index = torch.arange(size, device="cpu").reshape(
                [-1 if d == dim else 1 for d in range(self.rank)]
            )
            labels = torch.where(labels == NONE, NONE, labels * size + index)
        return Partition(labels, self.free - sizes.keys())

    def labelled(self, shape: Sequence[int]) -> torch.Tensor:
        """Labels from zero on for a tensor of this shape, of size one where they do not change."""
        labels = _tight(self._labelled({d: shape[d] for d in self.free}).labels)
        kept = labels != NONE
        numbered = torch.full_like(labels, NONE)
        numbered[kept] = labels[kept].unique(return_inverse=True)[1]
        return numbered

    # ------------------------------------------------------------ before an operator moved them

    def arranged(self, order: Sequence[int]) -> Partition:
        """Before dims were put in this order."""
        labels = self.labels.permute([order.index(d) for d in range(self.rank)])
        return Partition(labels, frozenset(order[d] for d in self.free))

    def placed(self, rank: int, dims: Mapping[int, int]) -> Partition:
        """Of another tensor, which has some dims of this one elsewhere and shares all others."""
        labels = self.shared(set(range(self.rank)) - dims.keys()).labels
        labels = labels.permute([*dims, *(d for d in range(self.rank) if d not in dims)])
        labels = labels.reshape([*labels.shape[: len(dims)], *[1] * (rank - len(dims))])
        places = [*dims.values(), *(d for d in range(rank) if d not in dims.values())]
        labels = labels.permute([places.index(d) for d in range(rank)])
        return Partition(labels, frozenset(new for old, new in dims.items() if old in self.free))

    def broadcast(self, before: Shape) -> Partition:
        """Before a tensor of another shape was broadcast to that of this one."""
        missing = self.rank - len(before)
        spread = [missing + d for d, size in enumerate(before) if is_one(size)]
        shared = self.shared([*range(missing), *spread])
        labels = shared.labels.reshape(shared.labels.shape[missing:])
        return Partition(labels, frozenset(d - missing for d in shared.free if d >= missing))

    def viewed(self, shape: Shape, other: Shape) -> Partition:
        """Of the same numbers, viewed as another shape."""
        axes = Axes(shape)
        layout = axes.view(axes.whole, other, split=True)
        if layout is None:  # it cuts dims in a way that sizes do not tell
            whole = Partition.sharing(len(other), range(len(other)))
            return whole if self.is_complete() else Partition.none(len(other))
        free = {axis for d, dim in enumerate(axes.whole) for axis in dim if d in self.free}
        varying = {
            axis for d, dim in enumerate(axes.whole) for axis in dim if self.labels.shape[d] != 1
        }
        # in one dim with others, a free axis needs labels
        mixed = {axis for dim in layout if not free.issuperset(dim) for axis in dim} & free
        order = [axis for dim in axes.whole for axis in dim]
        sizes = [axes.size([axis]) if axis in varying | mixed else 1 for axis in order]
        spelled = [axes.size([a]) for dim in layout if {*dim} & (varying | mixed) for a in dim]
        if not all(isinstance(size, int) for size in spelled) or _product(spelled) > MAX_LABELS:
            whole = Partition.sharing(len(other), range(len(other)))
            return whole if self.is_complete() else Partition.none(len(other))
        given = [axes.size([axis]) if axis in varying else 1 for axis in order]
        labels = Partition(self.labels.reshape(given), frozenset(range(len(order))))
        labels = labels._labelled({i: sizes[i] for i, axis in enumerate(order) if axis in mixed})
        spread: list[int] = []
        after: list[int] = []
        for dim in layout:
            is_labelled = bool({*dim} & (varying | mixed))
            spread += [axes.size([axis]) if is_labelled else 1 for axis in dim]
            after.append(axes.size(dim) if is_labelled else 1)
        wide = labels.labels.expand(spread).reshape(after)
        return Partition(
            _tight(wide), frozenset(d for d, dim in enumerate(layout) if dim and free >= {*dim})
        )

    def picked(self, dim: int, positions: Sequence[int], size: Any) -> Partition:
        """Before these positions of a dim of some size were picked; nobody reads the others."""
        if isinstance(size, int) and list(positions) == list(range(size)):
            return self
        if not positions:
            return Partition.each(self.rank)
        if dim in self.free and self.is_complete():
            return self
        rest = self.labels.shape[:dim] + self.labels.shape[dim + 1 :]
        if not isinstance(size, int) or size * _product(rest) > MAX_LABELS:
            return self.shared([dim])
        read = self._labelled({dim: len(positions)} if dim in self.free else {})
        shape = [size if d == dim else n for d, n in enumerate(read.labels.shape)]
        first = int(read.labels.max()) + 1
        labels = torch.arange(first, first + _product(shape), device="cpu").reshape(shape)
        given = [len(positions) if d == dim else n for d, n in enumerate(read.labels.shape)]
        index = torch.tensor(list(positions), dtype=torch.int64, device="cpu")
        return Partition(
            _tight(labels.index_copy(dim, index, read.labels.expand(given))), read.free
        )

    def part(self, dim: int, start: int, size: int, total: int) -> Partition:
        """Of what lies along a dim from `start` on. A block that goes beyond it is none of it."""
        if dim in self.free or size == total:
            return self
        if self.labels.shape[dim] == 1:
            return Partition.none(self.rank)
        inside = self.labels.narrow(dim, start, size)
        before = self.labels.narrow(dim, 0, start)
        after = self.labels.narrow(dim, start + size, total - start - size)
        found = Partition(_tight(inside), self.free)
        return found.without(torch.cat([before.flatten(), after.flatten()]))

    def unsqueezed(self, dim: int) -> Partition:
        """Of the tensor with one more dim, which blocks share."""
        return Partition(self.labels.unsqueeze(dim), frozenset(d + (d >= dim) for d in self.free))

    def squeezed(self, dim: int) -> Partition:
        """Of the tensor without a dim of size one."""
        return Partition(
            self.labels.narrow(dim, 0, 1).squeeze(dim),
            frozenset(d - (d > dim) for d in self.free if d != dim),
        )


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The labels of the join: what hangs together by blocks of one or of the other."""
    if a.numel() == 1:
        return torch.where((a == NONE) | (b == NONE), NONE, torch.zeros_like(a))
    mine = a.flatten().unique(return_inverse=True)[1]
    theirs = b.flatten().unique(return_inverse=True)[1]
    found = torch.where((a == NONE) | (b == NONE), -1, mine.reshape(a.shape)).flatten()
    while True:
        before = found
        for ids in (mine, theirs):
            least = torch.full([found.numel()], found.numel(), dtype=torch.int64, device="cpu")
            found = least.scatter_reduce(0, ids, found, "amin")[ids]
        if torch.equal(before, found):
            return found.reshape(a.shape)


def _tight(labels: torch.Tensor) -> torch.Tensor:
    """Labels of size one along dims that they do not change along."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
            labels = labels.narrow(dim, 0, 1)
    return labels


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
