"""Recognise: find every normalization, prove what it is, and put one canonical node in its place.

ATen's own normalizations are read off their arguments (`composites.py`), spelled-out ones are
proved (`spelled.py`), those whose statistics are parameters are read from there (`static.py`); then
what follows is taken in as the affine part (`affine.py`). What looked like a norm and is none is
recorded as a near miss with the first law that failed.

The graph runs after this stage; inner values that are read from outside stay where they are.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import fx

from normfx import graph as g
from normfx.laws import ARRANGEMENTS, VIEWS
from normfx.naming import name_of
from normfx.ops import NormSpec, norm, short
from normfx.options import Options
from normfx.passes.affine import extend
from normfx.passes.composites import Core, composite
from normfx.passes.facts import Facts
from normfx.passes.shared import share
from normfx.passes.spelled import REDUCTIONS, spelled
from normfx.passes.static import static_norms
from normfx.record import Journal, NearMiss, Record, Refusal, Site

aten = torch.ops.aten


def recognise(
    gm: fx.GraphModule, journal: Journal, *, grad: bool, options: Options | None = None
) -> None:
    """Replaces every normalization of the graph by a canonical node, and records each.

    Args:
        gm: a captured graph; changed in place.
        journal: gets a `Site` for each norm, in the order of the graph, and a `NearMiss` for what
            is none.
        grad: whether gradients flow through the graph (then `detach` is no identity).
        options: says which norms to leave as they are; None: none.

    Refuses:
        see `record.REFUSALS`, section recognition.
    """
    facts = Facts(gm, grad=grad)
    sites: list[tuple[int, Site]] = []
    misses: list[tuple[fx.Node | None, NearMiss]] = []
    placed: set[fx.Node] = set()  # nodes that are part of a norm
    missed: set[fx.Node] = set()  # nodes that a near miss stands for
    numbers = Counter[str]()  # how many norms there are of a name

    def place(cores: list[tuple[fx.Node, Core]], region: list[fx.Node]) -> None:
        placed.update(region)
        for index, (node, core) in enumerate(cores):
            name = _name(node)
            number, rule = numbers[name], _rule(core.spec)
            if options is not None and options.skips(rule, f"{name}#{number}" if number else name):
                numbers[name] += 1
                continue
            made = _place(facts, node, core, region)
            if isinstance(made, NearMiss):
                misses.append((None, made))
            elif made is not None:
                site = made.node.meta["normfx_site"]
                site.number = number
                numbers[name] += 1
                sites.append((facts.order[made.node], site))
                read = {n for _, later in cores[index + 1 :] for n in later.inputs}
                g.erase_dead({*region, *made.taken, node} - read, facts.order)
                share(facts, made.node, made.core)

    def miss(at: fx.Node, code: Refusal, guilty: fx.Node) -> None:
        misses.append((at, NearMiss(_name(at), code, g.location(guilty), guilty.name)))

    for node in list(gm.graph.nodes):
        core = composite(node) if node.op == "call_function" else None
        if core is not None:
            place([(node, core)], [node])
        elif g.packet(node) in REDUCTIONS and node not in placed and node.users:
            found = spelled(facts, node)
            if found.cores:
                place(found.cores, found.region)
            if found.miss is not None and node not in missed:
                missed.update(found.region)
                miss(found.miss.at, found.miss.code, found.miss.guilty)
    for node, core, region in static_norms(facts):  # the x of one may be the result of another
        place([(node, core)], region)
    for node in gm.graph.nodes:
        if _divides(node) and node not in placed | missed | facts.constant:
            miss(node, Refusal.UNKNOWN_STATISTIC, node)
    # what was no norm of one tensor may be part of a norm of another
    journal.near_misses += [found for at, found in misses if at not in placed]
    journal.sites += [site for _, site in sorted(sites, key=lambda pair: pair[0])]


def _divides(node: fx.Node) -> bool:
    """Whether a node is a root, of more than one number, that something is divided by."""
    held = g.tensor(node)
    if held is None or not held.dim():
        return False
    if g.packet(node) is aten.rsqrt or (g.packet(node) is aten.pow and node.args[1] == -0.5):
        return True
    if g.packet(node) is not aten.sqrt and (g.packet(node) is not aten.pow or node.args[1] != 0.5):
        return False
    pending = [node]
    for current in pending:  # through what spreads it over the elements, or bounds it
        for user in current.users:
            if g.packet(user) is aten.div and user.args[1] is current:
                return True
            if g.packet(user) is aten.reciprocal:
                return True
            if g.packet(user) in _SPREADS and user.args[0] is current and len(pending) < 8:
                pending.append(user)
    return False


_SPREADS = frozenset(
    {
        *VIEWS,
        *ARRANGEMENTS,
        aten.expand,
        aten.expand_as,
        aten.repeat,
        aten.index,
        aten.index_select,
        aten.gather,
        aten.add,
        aten.clamp,
        aten.clamp_min,
        aten.to,
    }
)


class Placed(NamedTuple):
    """A canonical node, what it was made from, and the operators of the affine part."""

    node: fx.Node
    core: Core
    taken: list[fx.Node]


def _place(
    facts: Facts, node: fx.Node, core: Core, region: list[fx.Node]
) -> Placed | NearMiss | None:
    """Puts a canonical node in place of a region and the affine part after it, if safe."""
    needed = _needed(node, region)
    refused = facts.unsafe(node, core.inputs, needed)
    if refused is not None:
        code, guilty = refused
        detail = f"{_kind(facts, core)} not replaced"
        return NearMiss(_name(node), code, g.location(guilty), guilty.name, detail)
    last, extended, taken = extend(facts, node, core)
    if taken and facts.unsafe(last, extended.inputs, [*needed, *taken]) is not None:
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
    g.inherit_provenance(made, node)
    facts.order[made] = facts.order[last]
    site = _site(node, made, spec, rank)
    site.on_weight = x in facts.constant
    made.meta["normfx_site"] = site
    made.meta["normfx_region"] = last.name
    last.replace_all_uses_with(made, propagate_meta=False)
    site.records.append(Record("recognise", _rule(spec), True, None, made.name, site.location))
    return Placed(made, extended, taken)


def _rule(spec: NormSpec) -> str:
    """The name under which recognition reports a norm."""
    return f"recognise-{spec.origin.replace('_', '-')}"


def _needed(node: fx.Node, region: list[fx.Node]) -> list[fx.Node]:
    """The part of a region that a value is made from: others may be made from its statistics."""
    inside, found = set(region), [node]
    for current in found:
        found += [i for i in current.all_input_nodes if i in inside and i not in found]
    return found


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
        groups=spec.groups,
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
