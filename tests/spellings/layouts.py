"""Layouts: x viewed and permuted for the statistics, and statistics and weights brought back to it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from spellings.norms import Norm, affine_shape
from spellings.text import DTYPES, Text


class Frame(NamedTuple):
    """One way to lay out x: which axes each dim has, outermost first.

    Attributes:
        dims: the axes.
        sizes: of all axes.
        over: the axes that the statistics are taken over.
    """

    dims: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    over: frozenset[int]

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[axis] for axis in dim) for dim in self.dims)

    @property
    def reduced(self) -> tuple[int, ...]:
        """The dims that the statistics are taken over."""
        return tuple(d for d, axes in enumerate(self.dims) if set(axes) <= self.over)

    @property
    def clean(self) -> bool:
        """Whether no dim has both an axis that is reduced and one that is not."""
        return all(len({axis in self.over for axis in dim}) == 1 for dim in self.dims)

    @property
    def kept(self) -> Frame:
        """The same for a statistic whose reduced dims are kept as ones."""
        sizes = tuple(1 if axis in self.over else s for axis, s in enumerate(self.sizes))
        return self._replace(sizes=sizes)


def home(norm: Norm) -> Frame:
    """X as it is given."""
    dims: list[tuple[int, ...]] = []
    for d in range(len(norm.shape)):
        shift = 1 if norm.groups and d > norm.group_dim else 0
        cut = norm.groups and d == norm.group_dim
        dims.append((d, d + 1) if cut else (d + shift,))
    return Frame(tuple(dims), norm.sizes, frozenset(norm.dims))


def plain(norm: Norm) -> Frame:
    """X as it is given, with the groups in a dim of their own."""
    whole = home(norm)
    return whole if whole.clean else whole._replace(dims=tuple((axis,) for axis in whole.order))


def frames(norm: Norm) -> list[Frame]:
    """Layouts in which the statistics can be taken, other than x itself."""
    whole = home(norm)
    order = whole.order
    rank = len(order)
    kept, over = ([a for a in order if (a in whole.over) == o] for o in (False, True))
    orders = [order, order, (*kept, *over), (*over, *kept)]
    if len(whole.dims) > 2:
        orders.append((*whole.dims[0], *(a for d in whole.dims[2:] for a in d), *whole.dims[1]))
        orders.append((*whole.dims[-1], *(a for d in whole.dims[:-1] for a in d)))
    if rank > 1:
        orders.append((*order[:-2], order[-1], order[-2]))
    alone = {norm.dims[-1]} if norm.prefix else set()
    found = []
    for axes in orders:
        whole_runs, tail = _merged(axes, whole.over, alone), _merged(axes[1:], whole.over, alone)
        found += [tuple((a,) for a in axes), whole_runs, (axes[:1], *tail)]
    return [whole._replace(dims=dims) for dims in dict.fromkeys(found) if dims != whole.dims]


def _merged(
    axes: tuple[int, ...], over: frozenset[int], alone: set[int]
) -> tuple[tuple[int, ...], ...]:
    """Axes in as few dims as can be, but for some that stay alone."""
    dims: list[tuple[int, ...]] = []
    for axis in axes:
        last = dims[-1][-1] if dims else None
        joins = last is not None and (last in over) == (axis in over)
        if joins and not {axis, last} & alone:
            dims[-1] = (*dims[-1], axis)
        else:
            dims.append((axis,))
    return tuple(dims)


class InFrames(Text):
    """Brings tensors from one layout into another.

    Attributes:
        home: the layout of x.
        frame: the one that statistics are taken in.
    """

    def __init__(self, draw: Any, norm: Norm, mutation: str) -> None:
        super().__init__(draw, norm, mutation)
        self.home = home(norm)
        self.frame = plain(norm)
        self.strided = False  # whether something was permuted: then a view may not exist

    # sizes

    def size(self, frame: Frame, d: int, source: str = "x") -> str:
        """The size of a dim, as text: that of the batch is read from x where it is symbolic."""
        if not self.is_symbolic(frame, d):
            return str(frame.shape[d])
        rest = math.prod(frame.sizes[axis] for axis in frame.dims[d] if axis)
        batch = self.pick(f"{source}.shape[0]", f"{source}.size(0)")
        return batch if rest == 1 else self.pick(f"{batch} * {rest}", f"{rest} * {batch}")

    def is_symbolic(self, frame: Frame, d: int) -> bool:
        return self.norm.dynamic and 0 in frame.dims[d] and frame.sizes[0] != 1

    def sizes(self, frame: Frame, *, inferred: bool = True) -> str:
        """The sizes of all dims as a list, one of them perhaps as -1."""
        sizes = [self.size(frame, d) for d in range(len(frame.dims))]
        symbolic = [d for d in range(len(sizes)) if self.is_symbolic(frame, d)]
        if inferred and sizes and self.pick(True, False, False):
            sizes[self.pick(*(symbolic or range(len(sizes))))] = "-1"
        return f"[{', '.join(sizes)}]"

    # moves

    def move(self, v: str, a: Frame, b: Frame, *, viewable: bool = True) -> str:
        """A tensor laid out in one way, in another."""
        if a.order != b.order:
            runs = self.pick(_runs(a.order, b.order), tuple((axis,) for axis in a.order))
            runs = self.pick(runs, a.dims) if _is_regrouping(a.dims, b.order) else runs
            middle = a._replace(dims=runs)
            v = self.regroup(v, a, middle, viewable=viewable)
            order = tuple(sorted(runs, key=lambda dim: b.order.index(dim[0])))
            v = self.permute(v, [runs.index(dim) for dim in order])
            self.strided = True
            return self.regroup(v, middle._replace(dims=order), b)
        return self.regroup(v, a, b, viewable=viewable)

    def permute(self, v: str, order: list[int]) -> str:
        forms = [f"{v}.permute({order})", f"{v}.permute(*{order})", f"torch.permute({v}, {order})"]
        moved = [d for d, o in enumerate(order) if d != o]
        if len(moved) == 2:
            i, j = self.pick(moved, moved[::-1])
            forms = [
                f"{v}.transpose({i}, {j})",
                f"{v}.swapaxes({i}, {j})",
                f"torch.transpose({v}, {i}, {j - len(order)})",
            ]
            if moved == [len(order) - 2, len(order) - 1]:
                forms.append(f"{v}.mT")
        for i in range(len(order)):
            for j in range(len(order)):
                rest = [d for d in range(len(order)) if d != i]
                if order == [*rest[:j], i, *rest[j:]] and len(moved) > 2:
                    forms += [f"{v}.movedim({i}, {j})", f"torch.moveaxis({v}, {i}, {j})"]
        return self.let(self.pick(*forms))

    def regroup(self, v: str, a: Frame, b: Frame, *, viewable: bool = True) -> str:
        """The same axes in the same order in other dims."""
        if a.dims == b.dims:
            return v
        sizes = self.sizes(b)
        forms = [f"{v}.reshape({sizes})", f"torch.reshape({v}, {sizes})"]
        if viewable and not self.strided:
            forms += [f"{v}.view({sizes})"] * 2
        elif self.rarely():
            forms.append(f"{v}.contiguous().view({sizes})")
        if b == self.home:
            forms += [f"{v}.reshape(x.shape)", f"{v}.reshape_as(x)"]
        new = [d for d, dim in enumerate(b.dims) if dim not in a.dims]
        old = [d for d, dim in enumerate(a.dims) if dim not in b.dims]
        if len(new) == 1 and old:
            forms += [f"{v}.flatten({old[0]}, {old[-1]})"] * 2
        if len(old) == 1 and new:
            parts = [self.size(b, d) for d in new]
            if not any(self.is_symbolic(b, d) for d in new):
                parts[self.pick(*range(len(parts)))] = "-1"
            else:
                parts = [
                    p if self.is_symbolic(b, d) else "-1" for p, d in zip(parts, new, strict=True)
                ]
                parts = parts if parts.count("-1") == 1 else [self.size(b, d) for d in new]
            forms += [f"{v}.unflatten({old[0]}, ({', '.join(parts)},))"] * 2
        return self.let(self.pick(*forms))

    def spread(self, v: str, target: Frame) -> str:
        """A statistic with its dims kept, so that it broadcasts in another layout."""
        frame = self.frame
        if frame == target:
            return v
        if self.is_mutation("permuted-not-back-statistic"):
            v = self.let(f"{v}.expand({self.sizes(frame, inferred=False)})")
            return self.let(f"{v}.reshape({self.sizes(target)})")
        if self.is_mutation("tiled-statistic"):
            return self._tiled(v)
        if target.clean and self.pick(True, True, False):
            return self.move(v, frame.kept, target.kept)
        form = self.pick("expand", "expand", "repeat", "interleave")
        d = self.norm.group_dim
        in_groups = self.norm.groups and frame == plain(self.norm) and d + 1 in self.norm.dims
        if form == "interleave" and in_groups:
            return self._interleaved(v)
        if form == "repeat" and not any(self.is_symbolic(frame, d) for d in frame.reduced):
            times = [s if d in frame.reduced else 1 for d, s in enumerate(frame.shape)]
            v = self.let(self.pick(f"{v}.repeat({times})", f"torch.tile({v}, {times})"))
            return self.move(v, frame, target)
        v = self.let(f"{v}.expand({self.sizes(frame, inferred=False)})")
        return self.move(v, frame, target, viewable=False)

    def is_ambiguous(self, frame: Frame) -> bool:
        """Whether sizes do not tell in which order the axes are."""
        return frame.order != self.home.order and len(set(frame.sizes)) < len(frame.sizes)

    def _interleaved(self, v: str) -> str:
        """The statistic of each group once for each of its channels."""
        d, times = self.norm.group_dim, self.norm.sizes[self.norm.group_dim + 1]
        kept = self.frame.kept
        v = self.regroup(v, kept, kept._replace(dims=self.home.dims))
        if all(size == 1 for size in kept.shape[d + 1 :]) and self.pick(True, False):
            rest = ", None" * (len(self.home.dims) - d - 1)
            v = self.let(f"{v}.flatten({d})" if rest else v)
            index = ", ".join(":" for _ in range(d + 1)) + rest
            return self.let(f"{v}.repeat_interleave({times}, {d})[{index}]")
        return self.let(
            f"{v}.repeat_interleave({times}, dim={self.pick(d, d - len(self.home.dims))})"
        )

    def _tiled(self, v: str) -> str:
        """The statistic of each group repeated as a whole, and not each of its elements in place."""
        axis = self.norm.group_dim
        order = list(range(len(self.frame.dims)))
        order[axis], order[axis + 1] = axis + 1, axis
        v = self.let(f"{v}.expand({self.sizes(self.frame, inferred=False)})")
        return self.let(f"{v}.permute({order}).reshape({self.sizes(self.home)})")

    # weights

    def holds_operands(self, frame: Frame) -> bool:
        """Whether weight and bias can be viewed so that they broadcast in a layout."""
        mine = [axis for d in self.norm.affine for axis in self.home.dims[d]]
        pure = all(len({axis in mine for axis in dim}) == 1 for dim in frame.dims)
        return pure and [axis for axis in frame.order if axis in mine] == mine

    def operand(self, name: str, frame: Frame) -> str:
        """A weight or bias, brought into a shape that broadcasts."""
        norm = self.norm
        shape = affine_shape(norm)
        self.input(name, shape, DTYPES[norm.dtype])
        mine = {axis for d in norm.affine for axis in self.home.dims[d]}
        lies = [set(dim) <= mine for dim in frame.dims]
        view = [s if lie else 1 for s, lie in zip(frame.shape, lies, strict=True)]
        if self.is_mutation(f"wrong-axis-{name}"):
            view = self._elsewhere(view)
            return self.let(f"{name}.{self.pick('view', 'reshape')}({view})")
        first = lies.index(True)
        short = view[first:]
        forms = [f"{name}.view({short})", f"{name}.view({view})", f"{name}.reshape({short})"]
        if sum(lies) == 1:
            inferred = [-1 if lie else 1 for lie in lies]
            forms += [f"{name}.reshape({inferred})", f"{name}.view({inferred[first:]})"]
        if tuple(short) == shape and not self.rarely():
            made = name
        else:
            if [frame.dims[d] for d in range(len(lies)) if lies[d]] == [
                self.home.dims[d] for d in norm.affine
            ]:
                index = [":" if lie else "None" for lie in lies]
                forms += [f"{name}[{', '.join(index)}]", f"{name}[{', '.join(index[first:])}]"]
            made = self.let(self.pick(*forms))
        if norm.dtype == "bfloat16" and self.pick(True, False):
            made = self.let(f"{made}.float()")
        return made

    def _elsewhere(self, view: list[int]) -> list[int]:
        """A shape with the same sizes at other dims of a square."""
        sizes = [s for s in view if s != 1]
        rank, shape = len(view), self.frame.shape
        others = []
        for start in range(rank - len(sizes) + 1):
            moved = [1] * start + sizes + [1] * (rank - start - len(sizes))
            if moved != view and all(m in (1, s) for m, s in zip(moved, shape, strict=True)):
                others.append(moved)
        return self.pick(*others) if others else view


def _runs(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The longest runs of axes that stand together in two orders."""
    runs: list[tuple[int, ...]] = []
    for axis in a:
        if runs and b.index(axis) == b.index(runs[-1][-1]) + 1:
            runs[-1] = (*runs[-1], axis)
        else:
            runs.append((axis,))
    return tuple(runs)


def _is_regrouping(dims: tuple[tuple[int, ...], ...], order: tuple[int, ...]) -> bool:
    """Whether dims may be permuted as they are to come into an order."""
    return all(order[order.index(dim[0]) : order.index(dim[0]) + len(dim)] == dim for dim in dims)
