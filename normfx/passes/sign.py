"""Sign: which values cannot be negative, whatever the parameters are.

By the operators that make them alone. Weights may change after a graph is compiled, so that their
values say nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.laws import ARRANGEMENTS, VIEWS

aten = torch.ops.aten

_NEVER_NEGATIVE = frozenset(
    {aten.abs, aten.exp, aten.square, aten.sqrt, aten.rsqrt, aten.sigmoid, aten.softplus, aten.relu}
)
_COPIES = frozenset(
    {aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.expand}
)
_KEEPS_SIGN = VIEWS | ARRANGEMENTS | _COPIES
_OF_TWO = frozenset({aten.mul, aten.div, aten.add})


def is_nonnegative(value: Any) -> bool:
    """Whether a node or number is at least zero for all parameters; NaN aside."""
    if isinstance(value, (int, float)):
        return value >= 0
    if not isinstance(value, fx.Node):
        return False
    packet = g.packet(value)
    if packet in _NEVER_NEGATIVE:
        return True
    if packet in _KEEPS_SIGN:
        return is_nonnegative(value.args[0])
    if packet in _OF_TWO:
        named = g.arguments(value)
        exact = named.get("rounding_mode") is None and is_nonnegative(named.get("alpha", 1))
        return exact and all(is_nonnegative(operand) for operand in value.args[:2])
    if packet is aten.pow:
        exponent = value.args[1]
        return is_nonnegative(value.args[0]) or (isinstance(exponent, int) and exponent % 2 == 0)
    if packet is aten.full:
        return is_nonnegative(value.args[1])
    return packet in (aten.ones, aten.zeros, aten.ones_like, aten.zeros_like)
