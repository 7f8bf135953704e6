"""The neighbourhood of a norm as a drawing: its nodes, what they read, and what reads them.

networkx lays it out in layers, what is read above what reads; the page draws it. Few nodes are
drawn: a picture of more says less than the text beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from normfx.graphdiff.snapshot import Snapshot
from normfx.record import Site

# Of one drawing; a LayerNorm that is spelled out, with its operands and readers, has about this.
_NODES = 28


def drawings(snapshot: Snapshot, sites: Mapping[int, Site]) -> dict[int, dict[str, Any]]:
    """The drawings of the norms that have nodes after a stage, by the `id` of their sites.

    Each has `nodes`, which are (place in the snapshot, across, down, whether it is part of the
    norm) in units of one node, and `edges` between indices of `nodes`.
    """
    at = {node.uid: i for i, node in enumerate(snapshot.nodes)}
    edges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    parts: dict[int, set[int]] = defaultdict(set)
    for node in snapshot.nodes:
        own = sites.get(node.uid)
        if own is not None:
            parts[id(own)].add(at[node.uid])
        for operand in node.operands():
            source = sites.get(operand)
            for site in {id(s) for s in (own, source) if s is not None}:
                edges[site].append((at[operand], at[node.uid]))
    return {site: _laid_out(edges[site], parts[site]) for site in edges}


def _laid_out(edges: Iterable[tuple[int, int]], parts: set[int]) -> dict[str, Any]:
    import networkx as nx

    graph: Any = nx.DiGraph()
    for edge in edges:
        if len(graph) < _NODES or parts.issuperset(edge):
            graph.add_edge(*edge)
    layer: dict[int, int] = {}
    for depth, members in enumerate(nx.topological_generations(graph)):
        layer.update(dict.fromkeys(members, depth))
    for member in list(graph):  # what only a late node reads stands right above it
        if not graph.in_degree(member):
            layer[member] = min(layer[reader] for reader in graph.successors(member)) - 1
    columns: dict[int, list[int]] = defaultdict(list)
    for member in sorted(graph, key=lambda m: (layer[m], m)):
        columns[layer[member]].append(member)
    rank: dict[int, float] = {}
    for depth in sorted(columns):  # below the middle of what it reads, so that few lines cross

        def middle(member: int) -> float:
            above = [rank[source] for source in graph.predecessors(member)]
            return sum(above) / len(above) if above else len(rank)

        columns[depth].sort(key=middle)
        rank.update((m, i - len(columns[depth]) / 2) for i, m in enumerate(columns[depth]))
    ordered = {depth: columns[depth] for depth in sorted(columns)}
    places = nx.multipartite_layout(graph, subset_key=ordered, align="horizontal")
    downs = [float(place[1]) for place in places.values()]
    top, unit = min(downs), (max(downs) - min(downs)) / (len(ordered) - 1)
    index = {member: i for i, member in enumerate(graph)}
    return {
        "nodes": [
            [
                m,
                round(float(places[m][0]) / unit, 2),
                round((places[m][1] - top) / unit),
                m in parts,
            ]
            for m in graph
        ],
        "edges": [[index[a], index[b]] for a, b in graph.edges],
    }
