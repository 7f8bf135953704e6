"""Matching: which node of a later stage is which of an earlier one. Names play no part.

Evidence, from the strongest to the weakest:

1. the same node, left in place: one number, operator and provenance;
2. structure: the same operator, literals and provenance, on operands that are matched;
3. readers: two nodes of one provenance, dtype and shape, that a matched pair reads at the same
   place. One took the place of the other (a norm that of the operators which spelled it);
4. what is left: operator, provenance, dtype and shape, in order.

Provenance is the user's stack trace and the module path.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from normfx.graphdiff.snapshot import Node, Ref, Snapshot


def match(before: Snapshot, after: Snapshot) -> dict[int, int]:
    """The numbers of nodes in `after` with those that they were in `before`; each at most once."""
    return _Matching(before, after).run()


class _Matching:
    def __init__(self, before: Snapshot, after: Snapshot) -> None:
        self.before, self.after = before, after
        self.old, self.new = before.by_uid(), after.by_uid()
        self.found: dict[int, int] = {}  # after -> before
        self.taken: set[int] = set()

    def run(self) -> dict[int, int]:
        for node in self.after.nodes:
            kept = self.old.get(node.uid)
            if kept is not None and _is_same(kept, node):
                self.pair(node.uid, kept.uid)
        self.by_structure()
        self.by_readers()
        self.in_order(lambda n: (n.op, n.operator, n.module, n.trace, n.value))
        self.by_readers()
        return self.found

    def pair(self, new: int, old: int) -> None:
        self.found[new] = old
        self.taken.add(old)

    def by_structure(self) -> None:
        waiting: dict[Hashable, deque[int]] = defaultdict(deque)
        for node in self.before.nodes:
            if node.uid not in self.taken:
                waiting[self.structure(node, lambda uid: uid)].append(node.uid)
        for node in self.after.nodes:
            if node.uid in self.found:
                continue
            candidates = waiting.get(self.structure(node, self.found.get))
            if candidates:
                self.pair(node.uid, candidates.popleft())

    def structure(self, node: Node, operand: Callable[[int], int | None]) -> Hashable:
        def mapped(argument: Any) -> Any:
            if isinstance(argument, Ref):
                return Ref(operand(argument.uid))  # pyright: ignore[reportArgumentType]
            return tuple(map(mapped, argument)) if isinstance(argument, tuple) else argument

        arguments = tuple((name, mapped(a)) for name, a in node.arguments)
        # inputs are told apart by where they come from, which is their name
        return node.op, node.operator, node.module, node.trace, arguments

    def by_readers(self) -> None:
        for reader in reversed(self.after.nodes):
            partner = self.old.get(self.found.get(reader.uid, -1))
            if partner is None or partner.operator != reader.operator:
                continue
            for new, old in _places(reader, partner):
                if new in self.found or old in self.taken:
                    continue
                if _took_its_place(self.new[new], self.old[old]):
                    self.pair(new, old)

    def in_order(self, key: Callable[[Node], Hashable]) -> None:
        waiting: dict[Hashable, deque[int]] = defaultdict(deque)
        for node in self.before.nodes:
            if node.uid not in self.taken and node.op == "call":
                waiting[key(node)].append(node.uid)
        for node in self.after.nodes:
            if node.uid not in self.found and waiting.get(key(node)):
                self.pair(node.uid, waiting[key(node)].popleft())


def _is_same(old: Node, new: Node) -> bool:
    return (old.op, old.operator, old.module, old.trace) == (
        new.op,
        new.operator,
        new.module,
        new.trace,
    )


def _took_its_place(new: Node, old: Node) -> bool:
    if new.op != "call" or old.op != "call" or new.value != old.value:
        return False
    return bool(new.trace and new.trace == old.trace) or bool(
        new.module and new.module == old.module
    )


def _places(new: Node, old: Node) -> Iterator[tuple[int, int]]:
    """Operands of two nodes at the same place."""
    pending: list[tuple[Any, Any]] = [
        (a, b)
        for (name, a), (other, b) in zip(new.arguments, old.arguments, strict=False)
        if name == other
    ]
    for a, b in pending:
        if isinstance(a, Ref) and isinstance(b, Ref):
            yield a.uid, b.uid
        elif type(a) is type(b) is tuple:
            pending += zip(a, b, strict=False)
