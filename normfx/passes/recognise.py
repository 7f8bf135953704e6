"""Recognise: find every normalization, prove what it is, and put one canonical node in its place.

ATen's own normalizations are read off their arguments (`composites.py`), spelled-out ones are
proved (`spelled.py`), those whose statistics are parameters are read from there (`static.py`); then
what follows is taken in as the affine part (`affine.py`). What looked like a norm and is none is
recorded as a near miss with the first law that failed.

The graph runs after this stage; inner values that are read from outside stay where they are.
"""

from __future__ import annotations

import torch
from torch import fx

from normfx import graph as g
from normfx.naming import name_of
from normfx.ops import NormSpec, norm, short
from normfx.passes.affine import extend
from normfx.passes.composites import Core, composite
from normfx.passes.facts import Facts
from normfx.passes.spelled import REDUCTIONS, spelled
from normfx.passes.static import static_norms
from normfx.record import Journal, NearMiss, Record, Refusal, Site

aten = torch.ops.aten


def recognise(gm: fx.GraphModule, journal: Journal, *, grad: bool) -> None:
    """Replaces every normalization of the graph by a canonical node, and records each.

    Args:
        gm: a captured graph; changed in place.
        journal: gets a `Site` for each norm, in the order of the graph, and a `NearMiss` for what
            is none.
        grad: whether gradients flow through the graph (then `detach` is no identity).

    Refuses:
        see `record.REFUSALS`, section recognition.
    """
    facts = Facts(gm, grad=grad)
    sites: list[tuple[int, Site]] = []
    read: set[fx.Node] = set()  # nodes that are explained, as part of a norm or of a near miss

    def place(node: fx.Node, core: Core, region: list[fx.Node]) -> None:
        read.update(region)
        placed = _place(facts, node, core, region)
        if isinstance(placed, NearMiss):
            journal.near_misses.append(placed)
        elif placed is not None:
            sites.append(placed)

    for node in list(gm.graph.nodes):
        core = composite(node) if node.op == "call_function" else None
        if core is not None:
            place(node, core, [node])
        elif g.packet(node) in REDUCTIONS and node not in read and node.users:
            found = spelled(facts, node)
            for value, spelled_core in found.cores:
                place(value, spelled_core, found.region)
            if found.miss is not None:
                miss = found.miss
                read.update(found.region)
                location = g.location(miss.guilty)
                journal.near_misses.append(
                    NearMiss(_name(miss.at), miss.code, location, miss.guilty.name)
                )
    for node, core, region in list(static_norms(facts)):
        place(node, core, region)
    for node in gm.graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        held = g.tensor(node)
        if node not in read and node not in facts.constant and held is not None and held.dim():
            journal.near_misses.append(
                NearMiss(_name(node), Refusal.UNKNOWN_STATISTIC, g.location(node), node.name)
            )
    journal.sites += [site for _, site in sorted(sites, key=lambda pair: pair[0])]


def _place(
    facts: Facts, node: fx.Node, core: Core, region: list[fx.Node]
) -> tuple[int, Site] | NearMiss | None:
    """Puts a canonical node in place of a region and the affine part after it, if safe."""
    refused = facts.unsafe(node, core.inputs, region)
    if refused is not None:
        code, guilty = refused
        detail = f"{_kind(facts, core)} not replaced"
        return NearMiss(_name(node), code, g.location(guilty), guilty.name, detail)
    last, extended, taken = extend(facts, node, core)
    if taken and facts.unsafe(last, extended.inputs, [*region, *taken]) is not None:
        last, extended, taken = node, core, []
    if core.spec.statistic == "tanh" and extended.weight not in facts.constant:
        return None  # an activation
    x, rank = extended.x, len(g.shape(extended.x) or ())
    spec = extended.spec._replace(
        kind=_kind(facts, extended), contiguous=_becomes_contiguous(x, last)
    )
    with facts.graph.inserting_after(last):
        operands = (x, *extended.operands)
        made = facts.graph.call_function(norm, operands, {"spec": spec, "rank": rank})
    g.inherit_meta(made, last)
    facts.order[made] = facts.order[last]
    site = _site(node, made, spec, rank)
    site.on_weight = x in facts.constant
    made.meta["normfx_site"] = site
    made.meta["normfx_region"] = last.name
    last.replace_all_uses_with(made, propagate_meta=False)
    g.erase_dead({*region, *taken, node}, facts.graph)
    rule = f"recognise-{spec.origin.replace('_', '-')}"
    site.records.append(Record("recognise", rule, True, None, made.name, site.location))
    return facts.order[last], site


def _kind(facts: Facts, core: Core) -> str:
    return name_of(
        core.spec,
        g.shape(core.x) or (),
        g.shape(core.weight),
        g.shape(core.gate),
        on_weight=core.x in facts.constant,
    )


def _site(node: fx.Node, made: fx.Node, spec: NormSpec, rank: int) -> Site:
    dims = spec.dims
    if spec.groups:  # as dims of x itself: the cut dim counts as one
        dims = tuple(sorted({d - (d > spec.group_dim) for d in dims}))
    if dims and dims == tuple(range(rank - len(dims), rank)) and not (spec.groups and dims[1:]):
        dims = tuple(d - rank for d in dims)
    return Site(
        name=_name(node),
        kind=spec.kind,
        dims=dims,
        eps=short(spec.eps),
        dtype=str(g.dtype(made.args[0])).removeprefix("torch."),
        location=g.location(node),
        weight=made.args[1] is not None,
        bias=made.args[2] is not None,
        origin=spec.origin,
    )


def _becomes_contiguous(x: fx.Node, result: fx.Node) -> bool:
    """Whether the result is laid out contiguously although x is not: later views may rely on it."""
    given, made = g.tensor(x), g.tensor(result)
    if given is None or made is None or str(given.stride()) == str(made.stride()):
        return False
    return made.is_contiguous()


def _name(node: fx.Node) -> str:
    return g.module_path(node) or node.name
