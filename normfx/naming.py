"""Names: what the field calls a norm, from what it computes and along which dims.

A name decides nothing. It is for reports, and where one function has two names (an InstanceNorm
without weight is a LayerNorm over the image), the usual one of the two is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from normfx.families import FAMILIES
from normfx.layout import is_one
from normfx.ops import NormSpec

Shape: TypeAlias = "Sequence[Any]"

_ON_WEIGHT = {
    "LayerNorm": "WeightStandardization",
    "BatchNorm": "WeightStandardization",
    "InstanceNorm": "WeightStandardization",
    "L2Norm": "WeightNorm",
    "SpectralNorm": "SpectralNorm",
}


def name_of(
    spec: NormSpec, shape: Shape, weight: Shape | None, gate: Shape | None, *, on_weight: bool
) -> str:
    """The usual name of a norm.

    Args:
        spec: what it computes.
        shape: of x.
        weight: the shape of the weight, if there is one.
        gate: the shape of the gate, if there is one.
        on_weight: whether it normalizes a parameter.
    """
    if spec.kind:
        kind = spec.kind
    elif spec.statistic in FAMILIES:
        kind = FAMILIES[spec.statistic].kind
    elif gate is not None:
        kind = _gated(spec, gate)
    elif spec.statistic == "variance":
        kind = _of_variance(spec, shape, weight)
    else:
        kind = _of_square(spec, shape, weight)
    return _ON_WEIGHT.get(kind, f"Weight{kind}") if on_weight else kind


def _gated(spec: NormSpec, gate: Shape) -> str:
    """X * sigmoid(v*x) / root; silu(x) / root where v is the number one."""
    if any(not is_one(size) for size in gate):
        return "EvoNormS0"
    return "EvoNormS1" if spec.statistic == "variance" else "EvoNormS2"


def _of_variance(spec: NormSpec, shape: Shape, weight: Shape | None) -> str:
    rank, dims = len(shape), set(spec.dims)
    along = set() if weight is None else _varies(weight, rank)
    if not spec.centre:
        return "SimpleNorm"
    if spec.groups:
        of_channels = spec.group_dim == 1 and (rank == 2 or len(dims) > 1)
        return "GroupNorm" if of_channels else "LayerNorm"
    if _is_over_batch(spec, shape):
        return "BatchNorm"
    if along and along <= dims:
        return "LayerNorm"
    per_channel = along == {1} and 1 not in dims and 0 not in dims
    return "InstanceNorm" if per_channel or _is_over_image(spec, rank) else "LayerNorm"


def _of_square(spec: NormSpec, shape: Shape, weight: Shape | None) -> str:
    rank = len(shape)
    if spec.statistic == "compressed":
        return "CRMSNorm"
    if spec.centre:
        return "CentredNorm"
    if spec.statistic == "sum-square" and spec.scale == 1.0:
        one = weight is not None and all(map(is_one, weight))
        return "ScaleNorm" if one else "L2Norm"
    if _is_over_batch(spec, shape):
        return "PowerNorm"
    return "FilterResponseNorm" if _is_over_image(spec, rank) else "RMSNorm"


def _is_over_batch(spec: NormSpec, shape: Shape) -> bool:
    """Over all dims but one, the batch among them."""
    others = [d for d, size in enumerate(shape) if d not in spec.dims and not is_one(size)]
    return not spec.groups and 0 in spec.dims and len(others) == 1


def _is_over_image(spec: NormSpec, rank: int) -> bool:
    """Over height and width, channels first or last."""
    inner = tuple(range(2, rank)), tuple(range(1, rank - 1))
    return not spec.groups and rank >= 4 and spec.dims in inner


def _varies(operand: Shape, rank: int) -> set[int]:
    """The dims of x that an operand varies along."""
    return {rank - len(operand) + i for i, size in enumerate(operand) if not is_one(size)}
