"""Matching: by provenance and structure, never by name or number."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import normfx
from normfx.graphdiff.alignment import increasing
from normfx.graphdiff.matching import match
from normfx.graphdiff.snapshot import Ref, Snapshot
from tests.models import Block, head, roughened


def snapshots_of(model, *args):
    with torch.no_grad():
        return normfx.diff(model.eval(), options={"strict": True})(*args).graphs[0].snapshots


def renumbered(snapshot, numbers):
    """The same graph with other numbers: nothing but structure and provenance is left."""

    def mapped(argument):
        if isinstance(argument, Ref):
            return Ref(numbers[argument.uid])
        return tuple(map(mapped, argument)) if isinstance(argument, tuple) else argument

    return Snapshot(
        snapshot.stage,
        tuple(
            replace(
                node,
                uid=numbers[node.uid],
                arguments=tuple((name, mapped(a)) for name, a in node.arguments),
            )
            for node in snapshot.nodes
        ),
    )


def test_numbers_do_not_matter():
    found = snapshots_of(nn.Sequential(*[roughened(Block()) for _ in range(3)]), torch.ones(2, 8))
    capture = found["capture"]
    numbers = {node.uid: 1000 - node.uid for node in capture.nodes}
    assert match(capture, renumbered(capture, numbers)) == {b: a for a, b in numbers.items()}


def test_the_norm_takes_the_place_of_what_spelled_it():
    class Spelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 4)

        def forward(self, x):
            centred = x - x.mean(-1, keepdim=True)
            return self.out(centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())

    found = snapshots_of(Spelled(), torch.ones(2, 8))
    partners = match(found["capture"], found["recognise"])
    before, after = found["capture"].by_uid(), found["recognise"].by_uid()
    pairs = {after[new].operator: before[old].operator for new, old in partners.items()}
    assert pairs["norm"] == "div"
    assert pairs["linear"] == "linear"


def test_no_node_is_matched_twice():
    found = snapshots_of(head(), torch.ones(2, 8))
    for before in found.values():
        for after in found.values():
            partners = match(before, after)
            assert len(set(partners.values())) == len(partners)
            assert partners.keys() <= after.by_uid().keys()
            assert set(partners.values()) <= before.by_uid().keys()


@given(st.permutations(range(12)))
def test_the_longest_increasing_part(order):
    pairs = [(first, second) for second, first in enumerate(order)]
    found = increasing(pairs)
    assert found == sorted(found)
    assert set(found) <= set(pairs)
    best = [1] * len(order)
    for j in range(len(order)):
        best[j] += max([best[i] for i in range(j) if order[i] < order[j]], default=0)
    assert len(found) == max(best)
