"""Cost: what a part of a graph costs in each call, and whether an exact rewrite of it pays.

A model of what Inductor makes of ATen operators, from shapes alone:

- Views cost nothing. Products, convolutions and attention are kernels of their own.
- Pointwise operators and reductions over one iteration space are one kernel, which reads from
  memory what is made outside of it and writes what is read outside of it.
- A pool computes what stands before it on the fly if that reads one tensor, as a ReLU does; else
  that is written to memory first, as a BatchNorm is (`realize_hint` in torch/_inductor/ir.py).
- What is added to the product of two matrices, without a bias, is added in its kernel (`addmm`).

Parallel branches are not fused, and epilogues of products under freezing are not modelled, but for
a bias that is made (`of_made_bias`): costs compare two forms of one computation, and predict no
time. Every rule that can make a call dearer, or holds copies of weights, asks here (`saves`); what
it would do to a graph it tries on a `Sketch` first (`normfx/passes/sketch.py`).
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
from normfx.ops import norm, row_scale
from normfx.torch_internals import size_hint

aten = torch.ops.aten

# Starting a kernel, in bytes moved in that time: 2 us at 8 GB/s on a CPU. More on a GPU, where
# kernels only count for more.
KERNEL_BYTES = 1 << 14
# Flops in the time of a byte: a LayerNorm has 2 a number more than an RMSNorm, which take 0.12 to
# 0.8 ns (docs/performance.md), and a byte takes 0.12.
FLOPS_A_BYTE = 2
# A copy of a weight has to be repaid, in bytes that calls save, within so many calls.
CALLS = 2048
# A mean is summed and subtracted.
_MEAN_FLOPS = 2
# What the kernel before has left in a cache is not read from memory: 1 MiB, the second level of
# most CPUs.
CACHE_BYTES = 1 << 20

_MATMULS = frozenset({aten.linear, aten.mm, aten.addmm, aten.bmm, aten.matmul, aten.baddbmm})
_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
_TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})
_EXTERN = _MATMULS | _CONVOLUTIONS | _TRANSPOSED | {aten.scaled_dot_product_attention}
# They compute nothing: a conversion is part of what reads or writes the number.
_COPIES = frozenset({aten.to, aten._to_copy, aten.clone, aten.contiguous})
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

    def __str__(self) -> str:
        return f"{self.bytes} bytes, {self.kernels} kernels, {self.flops} flops"

    @property
    def traffic(self) -> int:
        """All of it as bytes."""
        return self.bytes + KERNEL_BYTES * self.kernels + self.flops // FLOPS_A_BYTE


def saves(before: Cost, after: Cost, extra_weight_bytes: int = 0) -> bool:
    """Whether an exact rewrite pays: it moves less, and repays its copies of weights.

    It never adds a kernel, whatever else it saves.
    """
    gain = before.traffic - after.traffic
    fewer = after.kernels <= before.kernels
    return fewer and gain > 0 and extra_weight_bytes <= CALLS * gain


def adds_nothing(before: Cost, after: Cost) -> bool:
    """Whether an exact rewrite does no harm, though it may not pay."""
    return after.kernels <= before.kernels and after.traffic <= before.traffic


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
        makers = [m for m in dict.fromkeys(map(maker_of, node.all_input_nodes)) if m in inside]
        space[node] = _space(node, makers, space)
        joined = _joined(makers, node, group, space)
        # what is behind another kernel cannot run in the same one as what is before it
        level[node] = max((level[m] + (m not in joined) for m in makers), default=0)
        own = {node}
        for maker in joined:
            if level[maker] == level[node]:
                own |= group[maker]
        for member in own:
            group[member] = own
    for node in inside:
        _delay(node, level, group, space)
    kernels = {id(members): members for members in group.values()}.values()
    return sum(map(_kernel, kernels), Cost())


def of_affine(node: fx.Node) -> Cost:
    """What the operands of a norm cost beside reading x and writing the result: vectors, flops.

    Of a norm whose statistics are given, this is all that it computes.
    """
    operands = [n for n in dict.fromkeys(node.args[1:]) if isinstance(n, fx.Node)]
    affine = sum(operand is not None for operand in node.args[1:3])
    own = 0 if _reduces(node) else 2
    return Cost(sum(map(byte_count, operands)), 0, (own + affine) * number_count(node))


def of_mean(node: fx.Node) -> Cost:
    """What a LayerNorm computes more than an RMSNorm, to have a mean."""
    return Cost(flops=_MEAN_FLOPS * number_count(node))


def of_made_bias(node: fx.Node, outputs: Any) -> Cost:
    """What it costs, at worst, that an operator gets a bias which it had not.

    A convolution reads it. A product may not take it (MKL, under Inductor's freezing): it is then
    added in a pass over the result, which the operator has left in a cache if that is small. For
    the head of GPT-2 at 64 tokens these were 24.5 MiB more (docs/performance.md).

    Args:
        node: the operator.
        outputs: how many it has.
    """
    (made,) = _tensors(node)
    vector = Cost(size_hint(outputs) * made.element_size())
    if g.packet(node) in _MATMULS and (moved := _bytes(made)) > CACHE_BYTES:
        return vector + Cost(2 * moved, 1, number_count(node))
    return vector


def byte_count(node: fx.Node) -> int:
    """The memory of what a node holds."""
    return sum(map(_bytes, _tensors(node)))


def is_free(node: fx.Node) -> bool:
    """Whether a call only looks at memory that an operand has, or holds no tensor."""
    held = _tensors(node)
    if node.op != "call_function" or g.mutated_arguments(node):
        return False
    if not held or (g.packet(node) is None and not g.is_call(node, norm, row_scale)):
        return True  # sizes, and parts of what another node makes
    storages = {g.memory(t) for source in node.all_input_nodes[:1] for t in _tensors(source)}
    return None not in storages and storages.issuperset(map(g.memory, held))


def maker_of(node: fx.Node) -> fx.Node:
    """The node that computes what this one looks at."""
    return maker_of(node.all_input_nodes[0]) if is_free(node) and node.all_input_nodes else node


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads the memory of a node, through views."""
    return [r for user in node.users for r in (_readers(user) if is_free(user) else [user])]


def _joined(
    makers: list[fx.Node],
    node: fx.Node,
    group: dict[fx.Node, set[fx.Node]],
    space: dict[fx.Node, int],
) -> list[fx.Node]:
    """Those of a node's makers in whose kernel it can be computed."""
    added = [m for m in makers if _is_added(m, node)]
    fused = [m for m in makers if not _is_extern(group[m]) and _fuses(m, node, space)]
    return added[:1] or fused


def _is_extern(members: set[fx.Node]) -> bool:
    """Whether a kernel is one of a library, which computes nothing else."""
    return any(g.packet(member) in _EXTERN for member in members)


def _delay(
    node: fx.Node,
    level: dict[fx.Node, int],
    group: dict[fx.Node, set[fx.Node]],
    space: dict[fx.Node, int],
) -> None:
    """Computes what a node reads in its own kernel, if all others can wait for that."""
    for maker in dict.fromkeys(map(maker_of, node.all_input_nodes)):
        if maker not in level or level[maker] >= level[node]:
            continue
        if _is_extern(group[maker] | group[node]) or not _fuses(maker, node, space):
            continue
        both = group[maker] | group[node]
        readers = [r for member in group[maker] for r in _readers(member) if r not in both]
        if all(level.get(reader, level[node]) >= level[node] for reader in readers):
            for member in both:
                group[member], level[member] = both, level[node]


def _fuses(maker: fx.Node, node: fx.Node, space: dict[fx.Node, int]) -> bool:
    """Whether one kernel can compute both."""
    if {g.packet(maker), g.packet(node)} & _EXTERN:
        return False
    if g.packet(node) in _POOLS:  # computes what it reads again for each result
        operands = [n for n in maker.all_input_nodes if number_count(n) > 1]
        return not _reduces(maker) and g.packet(maker) not in _POOLS and len(operands) == 1
    looks = [number_count(n) for n in node.all_input_nodes if maker_of(n) is maker]
    inlined = not _reduces(maker) and max(looks) <= space[node]
    return inlined or space[maker] == space[node]


def _is_added(product: fx.Node, node: fx.Node) -> bool:
    """Whether a product adds what another node adds to it."""
    if g.packet(product) not in _MATMULS or g.packet(node) is not aten.add:
        return False
    has_none = not any(isinstance(bias, fx.Node) for bias in product.args[2:])
    return has_none and len(g.shape(product) or ()) == 2 and list(product.users) == [node]


def _reduces(node: fx.Node) -> bool:
    if g.is_call(node, row_scale):
        return True
    if g.is_call(node, norm):
        spec: Any = node.kwargs["spec"]
        return spec.statistic not in ("running", "static")
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _space(node: fx.Node, makers: list[fx.Node], space: dict[fx.Node, int]) -> int:
    """How many numbers the loops of a node run over: a statistic belongs to the loop over x."""
    if _reduces(node):
        return max(map(number_count, node.all_input_nodes), default=0)
    return max([number_count(node), *(space[m] for m in makers if number_count(m) < space[m])])


def _kernel(members: set[fx.Node]) -> Cost:
    """One kernel: what it reads, once; what others read of it; what it computes."""
    reads: dict[Any, int] = {}
    writes = 0
    for node in members:
        made = sum(map(_bytes, _tensors(node)))
        for operand in node.all_input_nodes:
            maker = maker_of(operand)
            gathered = g.packet(node) in _GATHERS and operand is node.args[0]
            for held in _tensors(operand) if maker not in members else []:
                key = (maker, str(held.storage_offset()), str(held.shape))
                reads[key] = max(made if gathered else _bytes(held), reads.get(key, 0))
        if not members.issuperset(readers := _readers(node)) or not readers:
            writes += made
    return Cost(sum(reads.values()) + writes, 1, sum(map(_flops, members)))


def _flops(node: fx.Node) -> int:
    packet, count, args = g.packet(node), number_count(node), node.args
    if packet in _MATMULS:
        first = args[1] if packet in (aten.addmm, aten.baddbmm) else args[0]
        return 2 * count * size_hint(_tensors(first)[0].shape[-1])
    if packet in _CONVOLUTIONS | _TRANSPOSED:
        moved = count if packet in _CONVOLUTIONS else number_count(args[0])
        return 2 * moved * (number_count(args[1]) // size_hint(_tensors(args[1])[0].shape[0]))
    if packet in _EXTERN:
        return 4 * number_count(args[0]) * size_hint(_tensors(args[1])[0].shape[-2])
    if packet in _COPIES:
        return 0
    if g.is_call(node, row_scale):
        return 2 * number_count(args[0])
    if not g.is_call(node, norm):
        return max(count, *map(number_count, node.all_input_nodes)) if _reduces(node) else count
    spec: Any = node.kwargs["spec"]
    affine = sum(operand is not None for operand in args[1:3])
    # (x - mean) * factor; before that square and sum, and the mean; "compressed" has two sums
    own = 2 if not _reduces(node) else 3 + _MEAN_FLOPS * spec.centre
    return (own + (spec.statistic == "compressed") + affine) * count


def _tensors(node: Any) -> list[torch.Tensor]:
    held = g.value(node)
    several = held if isinstance(held, (list, tuple)) else [held]
    return [t for t in several if isinstance(t, torch.Tensor)]


def number_count(node: Any) -> int:
    """How many numbers a node holds."""
    return sum(math.prod(map(size_hint, t.shape)) for t in _tensors(node))


def _bytes(held: torch.Tensor) -> int:
    """Of memory: what a stride of zero repeats lies there once."""
    dims = zip(held.shape, held.stride(), strict=True)
    return held.element_size() * math.prod(size_hint(n) for n, by in dims if size_hint(by) != 0)
