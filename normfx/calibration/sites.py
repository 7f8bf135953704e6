"""Sites: the names that statistics are kept under, and what a site must be to have some.

A name is the module path, as in a report; a norm outside of any module is named by its kind, since
the names of nodes change with the shapes. A second norm of the same name in one graph is `name#1`.
It depends on nothing but the graph, so calibration and compilation agree on it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import fx, nn

from normfx import graph as g
from normfx.layout import plain
from normfx.ops import norm
from normfx.passes.verdict import Refused
from normfx.record import Refusal
from normfx.torch_internals import is_module_state, source_name

_STATISTICS = frozenset({"variance", "mean-square", "sum-square", "compressed", "batch"})


class Form(NamedTuple):
    """What is calibrated: it has to be the same where the statistics are used.

    Attributes:
        kind: "LayerNorm", ...
        statistic: as in a spec.
        channel: the dim that the channels are counted along, from the end.
        over_batch: whether the norm's own statistics are for each channel over everything else.
        channels: how many.
        eps: the number, or None where it is a tensor.
        eps_place: as in a spec.
        scale: as in a spec.
    """

    kind: str
    statistic: str
    channel: int
    over_batch: bool
    channels: int
    eps: float | None
    eps_place: str
    scale: float

    def __str__(self) -> str:
        return f"a {self.kind} over {self.channels} channels, eps {self.eps}"


def named_norms(graph: fx.Graph, constant: set[fx.Node]) -> list[tuple[str, fx.Node]]:
    """Every norm of an activation with a statistic to replace, and its name, in order."""
    found, seen = [], Counter[str]()
    for node in graph.nodes:
        if not g.is_call(node, norm) or node.args[0] in constant:
            continue
        spec: Any = node.kwargs["spec"]
        if spec.statistic in ("static", "running"):
            continue
        name = g.module_path(node) or spec.kind
        found.append((f"{name}#{seen[name]}" if seen[name] else name, node))
        seen[name] += 1
    return found


def form_of(node: fx.Node, constant: set[fx.Node]) -> Form | Refused:
    """What a norm is, if an affine map for each channel can stand in its place.

    Refuses:
        not-per-channel, affine-not-constant.
    """
    spec: Any = node.kwargs["spec"]
    rank: Any = node.kwargs["rank"]
    args: Any = node.args
    channel = None
    if spec.statistic in _STATISTICS and not spec.groups and not spec.prefix and args[6] is None:
        channel = _channel(spec.dims, rank)
    shape = g.shape(args[0])
    size = plain(shape[channel]) if shape is not None and channel is not None else None
    if channel is None or not isinstance(size, int):
        return Refused(Refusal.NOT_PER_CHANNEL, node)
    for operand in args[1:3]:
        if operand is not None and operand not in constant:
            return Refused(Refusal.NOT_CONSTANT, operand)
    eps = None if args[3] is not None or spec.eps is None else float(spec.eps)
    return Form(
        spec.kind,
        spec.statistic,
        channel - rank,
        0 in spec.dims,
        size,
        eps,
        spec.eps_place,
        float(spec.scale),
    )


def _channel(dims: tuple[int, ...], rank: int) -> int | None:
    """The dim of the channels: all others with a BatchNorm, the only one with a LayerNorm."""
    others = [d for d in range(rank) if d not in dims]
    if 0 in dims:
        return others[0] if len(others) == 1 else None
    return dims[0] if len(dims) == 1 else None


def state_of(graph: fx.Graph) -> dict[str, tuple[int, str]]:
    """The parameters that a graph reads: name to (position among the inputs, what it is)."""
    found = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        held = g.tensor(node)
        name = g.clean_path(source_name(node)) if is_module_state(node) else ""
        if isinstance(held, nn.Parameter) and name:
            shape = "x".join(str(size) for size in held.shape)
            found[name] = position, f"{str(held.dtype).removeprefix('torch.')}[{shape}]"
    return found
