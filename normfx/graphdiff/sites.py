"""Sites: which norm a node is a part of, at every stage, and what was decided for it."""

from __future__ import annotations

from collections.abc import Mapping

from normfx.graphdiff.matching import match
from normfx.graphdiff.snapshot import Snapshot
from normfx.record import Site


def sites_of(snapshots: Mapping[str, Snapshot]) -> dict[int, Site]:
    """The norms that nodes are parts of, by the numbers of the nodes.

    After recognition a node says so itself. Before it, a node is part of the norm that took the
    place of what was made from it, if it went away with that.
    """
    found = {n.uid: n.site for s in snapshots.values() for n in s.nodes if n.site is not None}
    if not {"capture", "recognise"} <= snapshots.keys():
        return found
    before, after = snapshots["capture"], snapshots["recognise"]
    spelled, kept = before.by_uid(), after.by_uid()
    partners = match(before, after)
    for node in after.nodes:
        last = partners.get(node.uid)
        if node.site is None or last is None or last in kept:
            continue
        pending = [last]
        while pending:
            uid = pending.pop()
            found[uid] = node.site
            pending += [
                operand
                for operand in spelled[uid].operands()
                if operand not in kept and operand not in found and operand in spelled
            ]
    return found


def sentence(site: Site) -> str:
    """What was decided: `fold-affine-into-linear; refused telescope (not-worth-it)`."""
    refused = [f"{r.rule} ({r.code.value})" for r in site.records if r.code is not None]
    parts = list(dict.fromkeys(site.actions)) or ["kept"]
    text = ", ".join(parts)
    return f"{text}; refused {', '.join(dict.fromkeys(refused))}" if refused else text
