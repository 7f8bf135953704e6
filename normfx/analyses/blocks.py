"""Blocks: which numbers of a tensor are taken together when a mean over them is taken.

A label for each number, and -1 for a number of no block. Along a free dim (batch, tokens) every
index has blocks of its own, all alike, so the labels have size one there and nothing needs to be
known of its size. A stream of d channels is one block; its heads, where a norm runs over each, are
several; the queries in a fused projection are some of its outputs.

Two facts are said with them. A value is *blind* in a block if no result changes when one number is
added to all of the block. A value is *zero* in a block if the block's mean is zero. Both are kept
by a coarser partition: what holds for blocks holds for their unions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from normfx.layout import Axes, is_one, plain

# Labels beyond this many would cost more time than a norm is worth.
MAX_LABELS = 1 << 20


class Run(NamedTuple):
    """A stretch of a dim: one block, or numbers of no block."""

    start: int
    size: int
    is_block: bool


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The blocks of a tensor.

    Attributes:
        labels: as many dims as the tensor; size one along free dims. The label of a block is the
            index of its first number, so that equal partitions have equal labels.
    """

    labels: torch.Tensor

    @classmethod
    def whole(cls, shape: Sequence[Any], dim: int) -> Blocks | None:
        """Every row along a dim is one block; None if the size of the dim is symbolic or one."""
        size = plain(shape[dim])
        if not isinstance(size, int) or not 1 < size <= MAX_LABELS:
            return None
        sizes = [1] * len(shape)
        sizes[dim] = size
        return cls(torch.zeros(sizes, dtype=torch.int64, device="cpu"))

    @classmethod
    def each(cls, rank: int, dim: int, size: int) -> Blocks:
        """Every index of a dim is a block."""
        sizes = [1] * rank
        sizes[dim] = size
        return cls(torch.arange(size, device="cpu").reshape(sizes))

    @classmethod
    def singles(cls, rank: int) -> Blocks:
        """Every number is a block of its own."""
        return cls(torch.zeros([1] * rank, dtype=torch.int64, device="cpu"))

    @classmethod
    def none(cls, rank: int) -> Blocks:
        """No blocks at all."""
        return cls(torch.full([1] * rank, -1, dtype=torch.int64, device="cpu"))

    def is_none(self) -> bool:
        """Whether no number is in a block."""
        return bool((self.labels < 0).all())

    def is_partial(self) -> bool:
        """Whether some number is in no block."""
        return bool((self.labels < 0).any())

    def is_free(self, dim: int) -> bool:
        """Whether every index along a dim has blocks of its own."""
        return self.labels.shape[dim] == 1

    def labelled(self) -> list[int]:
        """The dims that blocks run along."""
        return [d for d, size in enumerate(self.labels.shape) if size != 1]

    def row(self) -> int | None:
        """The dim that every block is a whole row along, if there is one."""
        dims = self.labelled()
        return dims[0] if len(dims) == 1 and not bool(self.labels.any()) else None

    def is_same(self, other: Blocks) -> bool:
        """Whether two partitions are equal."""
        return torch.equal(self.labels, other.labels)

    def spread(self, dim: int, size: Any) -> Blocks | None:
        """The same blocks with a label for each index of a free dim."""
        size = plain(size)
        if not self.is_free(dim) or is_one(size):
            return self
        if not isinstance(size, int) or size * self.labels.numel() > MAX_LABELS:
            return None
        step = torch.arange(size, device="cpu").reshape([-1] + [1] * (self.labels.dim() - dim - 1))
        labels = self.labels + step * self.labels.numel()
        labels = torch.where(self.labels < 0, -1, labels)
        return Blocks(labels) if self.is_none() else _canonical(labels)

    def free(self, dim: int) -> Blocks:
        """The finest unions of these blocks by which every index of a dim has the same ones.

        A block that runs over several indices is none.
        """
        if self.is_free(dim):
            return self
        moved = self.within(dim).labels.movedim(dim, 0)
        rows = _canonical(moved).labels.expand(moved.shape).reshape(moved.shape[0], -1)
        first = torch.arange(rows.shape[0], device="cpu").unsqueeze(1) * rows.shape[1]
        kinds = torch.unique(torch.where(rows < 0, -1, rows - first), dim=0)
        joined = kinds.amin(0)
        while len(kinds) > 1:
            spread = joined
            for kind in kinds:
                spread = _least(spread, _own(kind))
            if torch.equal(spread, joined):
                break
            joined = spread
        return _canonical(joined.reshape([1, *moved.shape[1:]]).movedim(0, dim))

    def only(self, *dims: int) -> Blocks:
        """The finest unions of these blocks with all but these dims free."""
        found = self
        for dim in range(self.labels.dim()):
            if dim not in dims:
                found = found.free(dim)
        return found

    def join(self, other: Blocks, shape: Sequence[Any]) -> Blocks | None:
        """The finest blocks that are unions of both: what both facts say together.

        A union that has a number of no block in it is none.
        """
        a: Blocks | None = self
        b: Blocks | None = other
        for dim in range(len(shape)):
            if a is not None and b is not None and a.is_free(dim) != b.is_free(dim):
                a, b = a.spread(dim, shape[dim]), b.spread(dim, shape[dim])
        if a is None or b is None or a.is_same(b):
            return a if b is not None else None
        first, second = _own(a.labels), _own(b.labels)
        joined = torch.minimum(a.labels.flatten(), b.labels.flatten())
        while True:
            spread = _least(_least(joined, first), second)
            if torch.equal(spread, joined):
                return _canonical(joined.reshape(a.labels.shape))
            joined = spread

    def covers(self, whole: Blocks, shape: Sequence[Any]) -> bool:
        """Whether every block of `whole` is a union of these blocks."""
        joined = self.join(whole, shape)
        if joined is None:
            return False
        expected: Blocks | None = whole
        for dim in range(len(shape)):
            if expected is not None and not joined.is_free(dim):
                expected = expected.spread(dim, shape[dim])
        return expected is not None and joined.is_same(expected)

    # ------------------------------------------------------------------ through operators

    def viewed(self, old: Sequence[Any], new: Sequence[Any]) -> Blocks | None:
        """The blocks after a view from one shape to another."""
        axes = Axes(old)
        layout = axes.view(axes.whole, new, split=True)
        if layout is None:
            return None
        sizes = [
            axes.size([axis]) if self.labels.shape[dim] != 1 else 1
            for dim, of_dim in enumerate(axes.whole)
            for axis in of_dim
        ]
        free = [
            self.labels.shape[dim] == 1 for dim, of_dim in enumerate(axes.whole) for _ in of_dim
        ]
        if not all(isinstance(size, int) for size in sizes):
            return None
        found: Blocks | None = Blocks(self.labels.reshape(sizes))
        position = 0
        merged = []
        for dim in layout:
            inside = range(position, position + len(dim))
            if not all(free[i] for i in inside):
                for i, axis in zip(inside, dim, strict=True):
                    if found is not None and free[i]:
                        found = found.spread(i, axes.size([axis]))
            if found is None:
                return None
            merged.append(_product(found.labels.shape[i] for i in inside))
            position += len(dim)
        assert found is not None
        return _canonical(found.labels.reshape(merged))

    def permuted(self, order: Sequence[int]) -> Blocks:
        """The blocks after the dims were put in another order."""
        return _canonical(self.labels.permute(list(order)))

    def inverse_permuted(self, order: Sequence[int]) -> Blocks:
        """The blocks before the dims were put in another order."""
        return self.permuted([list(order).index(d) for d in range(len(order))])

    def taken(self, dim: int, indices: range) -> Blocks:
        """The blocks of a slice: those that are whole in it."""
        if self.is_free(dim):
            return self
        kept = self.labels.narrow(dim, indices.start, len(indices))
        named = kept.clamp_min(0)
        before, after = _sizes(self.labels), _sizes(kept, self.labels.numel())
        return _canonical(torch.where((kept >= 0) & (before[named] == after[named]), kept, -1))

    def placed(self, dim: int, indices: range, size: int) -> Blocks | None:
        """The blocks before a slice. What is not in it is read by nobody: each number is a block.

        Args:
            dim: the dim that was sliced.
            indices: of the slice.
            size: of the dim before.
        """
        inner = self.spread(dim, len(indices))
        if inner is None or size * inner.labels.numel() > MAX_LABELS * len(indices):
            return None
        shape = list(inner.labels.shape)
        shape[dim] = size
        labels = torch.arange(_product(shape), device="cpu").reshape(shape)
        inside = labels.narrow(dim, indices.start, len(indices))
        named = inside.flatten()[inner.labels.clamp_min(0)]
        inside.copy_(torch.where(inner.labels < 0, -1, named))
        return _canonical(labels)

    def within(self, dim: int) -> Blocks:
        """The blocks that lie in one index of a dim; the others are none."""
        if self.is_free(dim):
            return self
        step = _product(self.labels.shape[dim + 1 :])
        here = torch.arange(self.labels.shape[dim], device="cpu")
        here = here.reshape([-1] + [1] * (self.labels.dim() - dim - 1))
        crossing = (self.labels >= 0) & ((self.labels // step) % self.labels.shape[dim] != here)
        broken = torch.zeros(self.labels.numel(), dtype=torch.bool, device="cpu")
        broken[self.labels[crossing]] = True
        return _canonical(torch.where(broken[self.labels.clamp_min(0)], -1, self.labels))

    def unsqueezed(self, dim: int) -> Blocks:
        """The blocks with one more dim, of size one."""
        return Blocks(self.labels.unsqueeze(dim))

    def squeezed(self, dim: int) -> Blocks:
        """The blocks without a free dim."""
        return Blocks(self.labels.squeeze(dim))

    def centrable(self) -> Blocks:
        """Of these blocks those that a tensor can be centred in: stretches along one dim.

        A block of one number is left out: nobody reads that number.
        """
        found = self
        if len(self.labelled()) > 1:
            found = self.only(self.labelled()[-1])
        kept = [run for run in found.runs() if run.is_block and run.size > 1]
        if not kept:
            return Blocks.none(self.labels.dim())
        labels = torch.full_like(found.labels, -1)
        flat = labels.view(-1)
        for run in kept:
            flat[run.start : run.start + run.size] = run.start
        return Blocks(labels)

    def runs(self) -> list[Run]:
        """The stretches along the only labelled dim: blocks, and what is between them."""
        labels = self.labels.flatten().tolist()
        pieces: dict[int, int] = {}
        runs: list[Run] = []
        position = 0
        while position < len(labels):
            end, label = position + 1, labels[position]
            while end < len(labels) and labels[end] == label:
                end += 1
            pieces[label] = pieces.get(label, 0) + 1
            runs.append(Run(position, end - position, label >= 0))
            position = end
        # a block in several pieces is no stretch
        return [
            run._replace(is_block=run.is_block and pieces[labels[run.start]] == 1) for run in runs
        ]


def concatenated(
    parts: Sequence[Blocks | None], dim: int, shapes: Sequence[Sequence[Any]]
) -> Blocks | None:
    """The blocks of a concatenation along a dim that blocks run along; None: a part of no block."""
    spread: list[Blocks | None] = []
    rank = len(shapes[0])
    given = [Blocks.none(rank) if part is None else part for part in parts]
    labelled = {d for part in given for d in part.labelled()} | {dim}
    for part, shape in zip(given, shapes, strict=True):
        whole: Blocks | None = part
        for d in labelled:
            whole = None if whole is None else whole.spread(d, shape[d])
        spread.append(whole)
    labels, offset = [], 0
    for part in spread:
        if part is None:
            return None
        labels.append(torch.where(part.labels < 0, -1, part.labels + offset))
        offset += part.labels.numel()
    return _canonical(torch.cat(labels, dim))


def _product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _own(labels: torch.Tensor) -> torch.Tensor:
    """Labels by which no two numbers of no block share one."""
    flat = labels.flatten()
    return torch.where(flat < 0, torch.arange(flat.numel(), device="cpu"), flat)


def _least(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """For each number the least value in its group."""
    least = torch.full_like(values, values.numel())
    return least.scatter_reduce_(0, groups, values, "amin")[groups]


def _sizes(labels: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """How many numbers each label has."""
    return torch.bincount(
        labels[labels >= 0].flatten(), minlength=labels.numel() if count is None else count
    )


def _canonical(labels: torch.Tensor) -> Blocks:
    """Blocks of any labels: each is renamed to the index of its first number."""
    flat = labels.flatten()
    if bool((flat < 0).all()):
        return Blocks.none(labels.dim())
    most = int(flat.max()) + 1
    if most > 4 * MAX_LABELS:
        flat = torch.unique(flat, return_inverse=True)[1] - bool((flat < 0).any())
        most = flat.numel()
    index = torch.arange(flat.numel(), device="cpu")
    first = torch.full((most,), flat.numel(), dtype=torch.int64, device="cpu")
    first.scatter_reduce_(0, flat.clamp_min(0), torch.where(flat < 0, flat.numel(), index), "amin")
    named = torch.where(flat < 0, -1, first[flat.clamp_min(0)])
    return Blocks(named.reshape(labels.shape))
