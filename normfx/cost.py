"""Cost: what a part of a graph costs in each call, and whether an exact rewrite of it pays.

A model of what Inductor makes of ATen operators, from shapes alone:

- Views cost nothing. Products, convolutions and attention are kernels of their own.
- Pointwise operators and reductions over one iteration space are one kernel, which reads from
  memory what is made outside of it and writes what is read outside of it.
- A pool computes what stands before it on the fly if that reads one tensor, as a ReLU does; else
  that is written to memory first, as a BatchNorm is (`realize_hint` in torch/_inductor/ir.py).

Parallel branches are not fused, and epilogues of products under freezing are not modelled: costs
compare two forms of one computation, and predict no time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.ops import norm
from normfx.torch_internals import size_hint

aten = torch.ops.aten

# Starting a kernel, in bytes moved in that time: 2 us at 8 GB/s on a CPU. More on a GPU, where
# kernels only count for more.
KERNEL_BYTES = 1 << 14
# Flops in the time of a byte: a LayerNorm has 3 a number more than an RMSNorm, which take 0.12 to
# 0.8 ns (docs/performance.md), and a byte takes 0.12.
FLOPS_A_BYTE = 4
# A copy of a weight has to be repaid, in bytes that calls save, within so many calls.
CALLS = 4096

_MATMULS = frozenset({aten.linear, aten.mm, aten.addmm, aten.bmm, aten.matmul, aten.baddbmm})
_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
_TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})
_EXTERN = _MATMULS | _CONVOLUTIONS | _TRANSPOSED | {aten.scaled_dot_product_attention}
# They read each number of their input for several results.
_KINDS = ("max", "avg", "adaptive_max", "adaptive_avg")
_POOLS = frozenset(getattr(aten, f"{kind}_pool{rank}d") for kind in _KINDS for rank in (1, 2, 3))
# Of the first operand these read no more than they write.
_GATHERS = frozenset({aten.embedding, aten.index, aten.index_select, aten.gather})


@dataclass(frozen=True, slots=True)
class Cost:
    """What a computation costs in each call; costs of computations apart from each other add up.

    Attributes:
        bytes: read from memory and written to it.
        kernels: launched.
        flops: additions and multiplications, and one for any other function of a number.
    """

    bytes: int = 0
    kernels: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(operator.add, astuple(self), astuple(other)))

    @property
    def traffic(self) -> int:
        """All of it as bytes."""
        return self.bytes + KERNEL_BYTES * self.kernels + self.flops // FLOPS_A_BYTE


def saves(before: Cost, after: Cost, extra_weight_bytes: int = 0) -> bool:
    """Whether an exact rewrite pays: it moves less, and repays its copies of weights."""
    gain = before.traffic - after.traffic
    return gain > 0 and extra_weight_bytes <= CALLS * gain


def cost_of(nodes: Iterable[fx.Node]) -> Cost:
    """The cost of these operators in one call, fused with each other and with no others.

    They are of one graph, in its order, canonical norms among them, without what is computed from
    parameters alone. A symbolic size counts as its hint, and as one where it has none.
    """
    inside = dict.fromkeys(n for n in nodes if n.op == "call_function" and not is_free(n))
    level: dict[fx.Node, int] = {}  # how many kernels run before
    space: dict[fx.Node, int] = {}
    group: dict[fx.Node, set[fx.Node]] = {}
    for node in inside:
        makers = [m for m in dict.fromkeys(map(_maker, node.all_input_nodes)) if m in inside]
        space[node] = _space(node, makers, space)
        joined = [m for m in makers if _fuses(m, node, space)]
        # what is behind another kernel cannot run in the same one as what is before it
        level[node] = max((level[m] + (m not in joined) for m in makers), default=0)
        own = {node}
        for maker in joined:
            if level[maker] == level[node]:
                own |= group[maker]
        for member in own:
            group[member] = own
    kernels = {id(members): members for members in group.values()}.values()
    return sum(map(_kernel, kernels), Cost())


def is_free(node: fx.Node) -> bool:
    """Whether a call only looks at memory that an operand has, or holds no tensor."""
    held = _tensors(node)
    if node.op != "call_function" or g.mutated_arguments(node):
        return False
    if not held or (g.packet(node) is None and not g.is_call(node, norm)):
        return True  # sizes, and parts of what another node makes
    storages = {g.memory(t) for source in node.all_input_nodes[:1] for t in _tensors(source)}
    return None not in storages and storages.issuperset(map(g.memory, held))


def _maker(node: fx.Node) -> fx.Node:
    """The node that computes what this one looks at."""
    return _maker(node.all_input_nodes[0]) if is_free(node) and node.all_input_nodes else node


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads the memory of a node, through views."""
    return [r for user in node.users for r in (_readers(user) if is_free(user) else [user])]


def _fuses(maker: fx.Node, node: fx.Node, space: dict[fx.Node, int]) -> bool:
    """Whether one kernel can compute both."""
    if {g.packet(maker), g.packet(node)} & _EXTERN:
        return False
    if g.packet(node) in _POOLS:  # computes what it reads again for each result
        operands = [n for n in maker.all_input_nodes if _count(n) > 1]
        return not _reduces(maker) and g.packet(maker) not in _POOLS and len(operands) == 1
    inlined = not _reduces(maker) and _count(maker) <= space[node]
    return inlined or space[maker] == space[node]


def _reduces(node: fx.Node) -> bool:
    if g.is_call(node, norm):
        spec: Any = node.kwargs["spec"]
        return spec.statistic not in ("running", "static")
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _space(node: fx.Node, makers: list[fx.Node], space: dict[fx.Node, int]) -> int:
    """How many numbers the loops of a node run over: a statistic belongs to the loop over x."""
    if _reduces(node):
        return max(map(_count, node.all_input_nodes), default=0)
    return max([_count(node), *(space[m] for m in makers if _count(m) < space[m])])


def _kernel(members: set[fx.Node]) -> Cost:
    """One kernel: what it reads, once; what others read of it; what it computes."""
    reads: dict[Any, int] = {}
    writes = 0
    for node in members:
        made = sum(map(_bytes, _tensors(node)))
        for operand in node.all_input_nodes:
            maker = _maker(operand)
            gathered = g.packet(node) in _GATHERS and operand is node.args[0]
            for held in _tensors(operand) if maker not in members else []:
                key = (maker, str(held.storage_offset()), str(held.shape))
                reads[key] = max(made if gathered else _bytes(held), reads.get(key, 0))
        if not members.issuperset(readers := _readers(node)) or not readers:
            writes += made
    return Cost(sum(reads.values()) + writes, 1, sum(map(_flops, members)))


def _flops(node: fx.Node) -> int:
    packet, count, args = g.packet(node), _count(node), node.args
    if packet in _MATMULS:
        first = args[1] if packet in (aten.addmm, aten.baddbmm) else args[0]
        return 2 * count * size_hint(_tensors(first)[0].shape[-1])
    if packet in _CONVOLUTIONS | _TRANSPOSED:
        moved = count if packet in _CONVOLUTIONS else _count(args[0])
        return 2 * moved * (_count(args[1]) // size_hint(_tensors(args[1])[0].shape[0]))
    if packet in _EXTERN:
        return 4 * _count(args[0]) * size_hint(_tensors(args[1])[0].shape[-2])
    if not g.is_call(node, norm):
        return max(count, *map(_count, node.all_input_nodes)) if _reduces(node) else count
    spec: Any = node.kwargs["spec"]
    affine = sum(operand is not None for operand in args[1:3])
    # (x - mean) * factor; before that mean, deviation, square, sum
    own = 2 if not _reduces(node) else 6 if spec.centre else 3
    return (own + affine) * count


def _tensors(node: Any) -> list[torch.Tensor]:
    held = g.value(node)
    several = held if isinstance(held, (list, tuple)) else [held]
    return [t for t in several if isinstance(t, torch.Tensor)]


def _count(node: Any) -> int:
    return sum(math.prod(map(size_hint, t.shape)) for t in _tensors(node))


def _bytes(held: torch.Tensor) -> int:
    """Of memory: what a stride of zero repeats lies there once."""
    dims = zip(held.shape, held.stride(), strict=True)
    return held.element_size() * math.prod(size_hint(n) for n, by in dims if size_hint(by) != 0)
