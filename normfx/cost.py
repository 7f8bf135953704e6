"""Cost: what a part of a graph costs in each call, and whether an exact rewrite of it pays.

A model of what Inductor makes of ATen operators, from shapes alone:

- Views cost nothing. Products, convolutions and attention are kernels of their own.
- Pointwise operators and reductions over one iteration space are one kernel, which reads from
  memory what is made outside of it and writes what is read outside of it.
- An operator that reads its input more than once (a pool) computes on the fly what stands before
  it, if that reads one tensor; else that is written to memory first (`realize_hint` in
  torch/_inductor/ir.py). So a ReLU goes into a max-pool, a BatchNorm does not.

Parallel branches are not fused with each other, and Inductor's epilogues under freezing are not
modelled: costs compare two forms of one computation and predict no time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.ops import norm
from normfx.torch_internals import size_hint

aten = torch.ops.aten

# What starting a kernel costs beside moving a byte. Calls of Inductor's C++ kernels on a few
# numbers take 1 to 2 us; a core moves 5 to 10 GB/s. GPUs move more in the time of a launch, which
# would only make kernels count for more.
KERNEL_BYTES = 1 << 14
# A copy of a weight has to be repaid, in bytes that calls save, within so many calls.
CALLS = 4096

_MATMULS = frozenset({aten.linear, aten.mm, aten.addmm, aten.bmm, aten.matmul, aten.baddbmm})
_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
_TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})
_EXTERN = _MATMULS | _CONVOLUTIONS | _TRANSPOSED | {aten.scaled_dot_product_attention}
# They read each number of their input for several results.
_POOLS = frozenset(
    getattr(aten, f"{kind}_pool{rank}d")
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
    for rank in (1, 2, 3)
)
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
        return Cost(
            self.bytes + other.bytes, self.kernels + other.kernels, self.flops + other.flops
        )

    @property
    def traffic(self) -> int:
        """Bytes, with each launch as the bytes that are moved in its time.

        Flops are left out: beside a row that is in registers they are free, and a rewrite that
        leaves the products alone does not change any others (docs/performance.md).
        """
        return self.bytes + KERNEL_BYTES * self.kernels


def saves(before: Cost, after: Cost, extra_weight_bytes: int = 0) -> bool:
    """Whether an exact rewrite pays: it moves less, and repays its copies of weights.

    Args:
        before: what the part of the graph costs that is replaced.
        after: what replaces it.
        extra_weight_bytes: of weights that are made and held beside the originals.
    """
    gain = before.traffic - after.traffic
    return gain > 0 and extra_weight_bytes <= CALLS * gain


def cost_of(nodes: Iterable[fx.Node]) -> Cost:
    """The cost of these operators in one call, fused with each other and with no others.

    Args:
        nodes: of one graph, in its order; canonical norms among them. What only parameters go into
            is computed once, and does not belong here. A symbolic size counts as its hint, and as
            one where it has none: too little is the cautious side, as a gain then seems smaller.
    """
    inside = dict.fromkeys(n for n in nodes if n.op == "call_function" and not is_free(n))
    level: dict[fx.Node, int] = {}
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
    """Whether a node only looks at memory that an operand has, or holds no tensor."""
    held = _tensors(node)
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if not held or source is None or g.packet(node) is None and not g.is_call(node, norm):
        return True  # getitem, arithmetic of sizes
    storages = {t.untyped_storage()._cdata for t in _tensors(source)}
    return all(t.untyped_storage()._cdata in storages for t in held)


def _maker(node: fx.Node) -> fx.Node:
    """The node that computes what this one looks at."""
    while node.op == "call_function" and is_free(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _fuses(maker: fx.Node, node: fx.Node, space: dict[fx.Node, int]) -> bool:
    """Whether one kernel can compute both."""
    if {g.packet(maker), g.packet(node)} & _EXTERN:
        return False
    if g.packet(node) in _POOLS:  # computes what it reads again for each result
        operands = [n for n in maker.all_input_nodes if _count(n) > 1]
        return not _reduces(maker) and g.packet(maker) not in _POOLS and len(operands) == 1
    same = space[maker] == space[node]
    return same or (not _reduces(maker) and _count(maker) <= space[node])


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
    """One kernel: what it reads once, what others read of it, and what it computes."""
    reads: dict[Any, int] = {}
    writes = flops = 0
    for node in members:
        flops += _flops(node)
        for operand in node.all_input_nodes:
            if _maker(operand) not in members:
                for held in _tensors(operand):
                    size = _bytes(held)
                    if g.packet(node) in _GATHERS and operand is node.args[0]:
                        size = sum(map(_bytes, _tensors(node)))
                    key = (_maker(operand), str(held.storage_offset()), str(held.shape))
                    reads[key] = max(size, reads.get(key, 0))
        if not _readers(node) or any(user not in members for user in _readers(node)):
            writes += sum(map(_bytes, _tensors(node)))
    return Cost(sum(reads.values()) + writes, 1, flops)


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads the memory of a node, through views."""
    found = []
    for user in node.users:
        is_view = user.op == "call_function" and is_free(user)
        found += _readers(user) if is_view else [user]
    return found


def _flops(node: fx.Node) -> int:
    packet, count, args = g.packet(node), _count(node), node.args
    if packet in _MATMULS:
        first = args[1] if packet in (aten.addmm, aten.baddbmm) else args[0]
        return 2 * count * _sizes(first)[-1]
    if packet in _CONVOLUTIONS | _TRANSPOSED:
        moved = count if packet in _CONVOLUTIONS else _count(args[0])
        return 2 * moved * math.prod(_sizes(args[1])[1:])
    if packet in _EXTERN:
        return 4 * _count(args[0]) * _sizes(args[1])[-2]
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
    return sum(map(_numel, _tensors(node)))


def _numel(held: torch.Tensor) -> int:
    return math.prod(map(size_hint, held.shape))


def _sizes(node: Any) -> list[int]:
    return [size_hint(size) for size in g.shape(node) or ()]


def _bytes(held: torch.Tensor) -> int:
    """Of memory: what a stride of zero repeats lies there once."""
    return held.element_size() * math.prod(
        size_hint(size)
        for size, stride in zip(held.shape, held.stride(), strict=True)
        if size_hint(stride) != 0
    )
