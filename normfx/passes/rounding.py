"""Rounding: which values carry an error of the size of their own last digits.

    V (s * (x - m)) + c  =  (V s) x + (c - V s m)

is the same number, but the right side rounds at the size of s * m and the left at that of its
result. Where x was rounded when it was made, an error of that size is in it in any case. Where it
is what the model was given (a year, a temperature in kelvin), nothing but the left side is exact.
"""

from __future__ import annotations

import torch
from torch import fx

from normfx import graph as g
from normfx.ops import norm
from normfx.passes.channels import MOVES

aten = torch.ops.aten

# Sums of products, and functions that no result of is a short number.
_ROUNDS = frozenset(
    {
        *(aten.linear, aten.addmm, aten.mm, aten.matmul, aten.bmm, aten.baddbmm, aten.einsum),
        *(aten.conv1d, aten.conv2d, aten.conv3d),
        *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
        *(aten.scaled_dot_product_attention, aten.softmax, aten.log_softmax),
        *(aten.sigmoid, aten.tanh, aten.gelu, aten.silu, aten.mish, aten.exp, aten.log),
    }
)
# What leaves the last digits of some numbers as they are.
_KEEPS = MOVES | {aten.add, aten.sub, aten.clamp, aten.hardtanh, aten.elu, aten.hardswish}


def rounded(graph: fx.Graph, constant: set[fx.Node]) -> set[fx.Node]:
    """The activations that were rounded when they were made.

    Args:
        graph: the graph.
        constant: the nodes whose value depends on parameters alone.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        packet = g.packet(node)
        if packet in _ROUNDS or g.is_call(node, norm):
            found.add(node)
        elif packet in _KEEPS or _is_part(node):
            read = [i for i in node.all_input_nodes if i not in constant and _is_real(i)]
            # of a sum, one will do: it is not made more exact by another
            enough = any if packet in (aten.add, aten.sub) else all
            if read and enough(i in found for i in read):
                found.add(node)
    return found


def _is_part(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _is_real(node: fx.Node) -> bool:
    """Whether a node holds no index, mask or number."""
    held = g.tensor(node)
    return held is None or held.is_floating_point()
