"""Partition: joins and moves against partitions that are spelled out number by number."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfx.analyses.partition import MAX_LABELS, NONE, Partition

SHAPE = (2, 3, 4)


@st.composite
def partitions(draw, shape=SHAPE):
    """Labels along some dims, with numbers in no block among them; some dims free, some shared."""
    ways = [draw(st.sampled_from(["free", "shared", "labelled"])) for _ in shape]
    sizes = [n if way == "labelled" else 1 for way, n in zip(ways, shape, strict=True)]
    labels = draw(st.lists(st.integers(NONE, 3), min_size=prod(sizes), max_size=prod(sizes)))
    free = frozenset(d for d, way in enumerate(ways) if way == "free")
    return Partition(torch.tensor(labels).reshape(sizes), free)


def spelled(blocks, shape):
    """The blocks as sets of indices."""
    labels = blocks.labels.expand(shape)
    found = {}
    for index in itertools.product(*map(range, shape)):
        label = int(labels[index])
        if label != NONE:
            found.setdefault((label, *(index[d] for d in sorted(blocks.free))), set()).add(index)
    return {frozenset(block) for block in found.values()}


def components(shape, sets):
    """What hangs together by these sets of indices."""
    blocks = {frozenset([i]) for i in itertools.product(*map(range, shape))}
    for block in sets:
        touched = {b for b in blocks if b & block}
        blocks = blocks - touched | {frozenset().union(*touched)}
    return blocks


def joined(shape, *several):
    """The join, by merging what hangs together."""
    inside = set.intersection(*(set().union(*partition) for partition in several))
    merged = components(shape, [block for partition in several for block in partition])
    return {block for block in merged if block <= inside}


@settings(max_examples=200, deadline=None)
@given(partitions(), partitions())
def test_join(a, b):
    assert spelled(a.join(b), SHAPE) == joined(SHAPE, spelled(a, SHAPE), spelled(b, SHAPE))


@settings(max_examples=100, deadline=None)
@given(partitions())
def test_labelled_numbers_the_blocks(a):
    labels = a.labelled(SHAPE)
    assert spelled(Partition(labels), SHAPE) == spelled(a, SHAPE)
    assert int(labels.max()) + 1 == len(spelled(a, SHAPE))


@settings(max_examples=100, deadline=None)
@given(partitions(), partitions())
def test_refines(a, b):
    coarser = joined(SHAPE, spelled(a, SHAPE), spelled(b, SHAPE))
    assert a.refines(b, SHAPE) == (coarser == spelled(b, SHAPE))


@settings(max_examples=100, deadline=None)
@given(partitions())
def test_each_and_none(a):
    assert a.is_each(SHAPE) == (len(spelled(a, SHAPE)) == prod(SHAPE))
    assert a.is_none() == (not spelled(a, SHAPE))
    assert spelled(a.join(Partition.each(3)), SHAPE) == spelled(a, SHAPE)
    assert a.join(Partition.none(3)).is_none()


# The operator, the shape before it, and the blocks before it. Of each, the exact answer.
MOVES = {
    "permute": (
        lambda x: x.permute(2, 0, 1),
        (3, 4, 2),
        lambda b: b.arranged([2, 0, 1]),
    ),
    "merge": (lambda x: x.view(2, 3, 4), (6, 4), lambda b: b.viewed(SHAPE, (6, 4))),
    "cut": (lambda x: x.view(2, 3, 4), (2, 3, 2, 2), lambda b: b.viewed(SHAPE, (2, 3, 2, 2))),
    "merge-all": (lambda x: x.view(2, 3, 4), (24,), lambda b: b.viewed(SHAPE, (24,))),
    "one-more": (lambda x: x.view(2, 3, 4), (2, 1, 3, 4), lambda b: b.viewed(SHAPE, (2, 1, 3, 4))),
    "broadcast": (lambda x: x.expand(2, 3, 4), (3, 1), lambda b: b.broadcast((3, 1))),
    "same": (lambda x: x, SHAPE, lambda b: b.broadcast(SHAPE)),
    "flipped": (lambda x: x.flip(2), SHAPE, lambda b: b.picked(2, [3, 2, 1, 0], 4)),
}


@pytest.mark.parametrize("case", MOVES)
@settings(max_examples=60, deadline=None)
@given(a=partitions())
def test_moves(case, a):
    operator, before, move = MOVES[case]
    assert spelled(move(a), before) == pulled(operator, before, a)


# Where the exact answer would be no product, a coarser one may be given: it allows less.
COARSE = {
    "slice": (lambda x: x[:, :, 1:5], (2, 3, 6), lambda b: b.picked(2, range(1, 5), 6)),
    "steps": (lambda x: x[:, ::2], (2, 6, 4), lambda b: b.picked(1, range(0, 6, 2), 6)),
    "unknown-size": (lambda x: x[:, :, 1:5], (2, 3, 6), lambda b: b.shared([2])),
}


@pytest.mark.parametrize("case", COARSE)
@settings(max_examples=60, deadline=None)
@given(a=partitions())
def test_coarse_moves(case, a):
    operator, before, move = COARSE[case]
    exact, got = pulled(operator, before, a), spelled(move(a), before)
    assert joined(before, exact, got) == got


def pulled(operator, before, blocks):
    """The blocks of x that an operator, which moves its numbers, makes these of."""
    place = operator(torch.arange(prod(before)).reshape(before))
    index = list(itertools.product(*map(range, before)))
    source = {i: index[int(place[i])] for i in itertools.product(*map(range, place.shape))}
    after = spelled(blocks, place.shape)
    seen = {source[i] for i in source.keys() - set().union(*after)}
    merged = components(before, [frozenset(source[i] for i in block) for block in after])
    return {block for block in merged if not block & seen}


def test_part_of_a_cat():
    blocks = Partition(torch.tensor([0, 0, 1, 1, 2, 2]))
    assert spelled(blocks.part(0, 1, 3, 6), (3,)) == {frozenset([(1,), (2,)])}
    assert Partition.sharing(1, [0]).part(0, 0, 3, 6).is_none()
    assert spelled(Partition.each(1).part(0, 0, 3, 6), (3,)) == {
        frozenset([(i,)]) for i in range(3)
    }
    assert spelled(Partition.sharing(1, [0]).part(0, 0, 6, 6), (6,)) == spelled(
        Partition.sharing(1, [0]), (6,)
    )


def test_placed_elsewhere():
    """Of a weight (out, in), from the blocks of what it makes (batch, out)."""
    assert spelled(Partition.each(2).placed(2, {1: 0}), (3, 2)) == {
        frozenset([(i, 0), (i, 1)]) for i in range(3)
    }
    assert spelled(Partition.sharing(2, [1]).placed(2, {1: 0}), (3, 2)) == {
        frozenset(itertools.product(range(3), range(2)))
    }


def test_too_many_labels_give_a_coarser_partition():
    size = 2 * MAX_LABELS
    assert Partition.each(2).viewed((2, size), (2 * size,)).is_each((2 * size,))
    labelled = Partition(torch.arange(2)[:, None])
    whole = labelled.viewed((2, size), (2 * size,))
    assert whole.labels.shape == (1,)
    assert not whole.free
    assert not whole.is_none()
    joined_labels = Partition(torch.arange(2048)[:, None]).join(Partition(torch.arange(1024)[None]))
    assert joined_labels.labels.numel() == 1
