"""The canonical operation: one node for every member of the family, defined by its body.

A node is a call of `norm` with tensors as arguments and one `NormSpec`; stages after recognise see
no spelling, only the spec. The body is plain torch, so a graph with canonical nodes runs,
differentiates and traces as it is, on tensors as well as on `torch.fx` proxies (which is how
`lower` turns a node into ATen).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from normfx.families import FAMILIES


class NormSpec(NamedTuple):
    """What a normalization computes, apart from its operands.

        y = scale * (x - centre*mean) / root * weight + bias

    or the body of a family (`families.py`) times weight plus bias. With a gate, x * sigmoid(gate*x)
    stands for the x that is divided.

    | eps_place | root |
    | --- | --- |
    | inside | sqrt(S + eps) |
    | outside | sqrt(S) + eps |
    | floor | max(sqrt(S), eps) |
    | floor-inside | sqrt(max(S, eps)) |

    A named tuple rather than a dataclass, because `torch.fx` prints and runs named tuples in a
    node's arguments.

    Attributes:
        kind: the usual name, for reports ("LayerNorm", "RMSNorm", "L2Norm", "GroupNorm", ...).
        dims: the dims of x (non-negative) that the statistics are taken over; with groups, those of
            x with that dim viewed as (groups, size // groups).
        statistic: S: "variance", "mean-square", "sum-square", "compressed" (of n + 1 numbers whose
            sum is zero and of which x has n: (sum of x^2 + (sum of x)^2) / (n + 1)), or "running"
            (given mean and variance), or "batch" (BatchNorm in training: variance, and the running
            statistics are updated), or "static" (the statistics are in the weight already:
            y = (x - running_mean) * weight + bias), or the name of a family.
        centre: whether the mean is subtracted.
        correction: what is taken from the number of elements in a variance (1: unbiased).
        eps: the number, or None: an operand holds it.
        eps_place: where eps stands.
        scale: a number in front.
        groups: how many groups a dim is split into; 0: no groups.
        group_dim: that dim.
        prefix: how many elements of the last of the dims the statistics are taken over; 0: all.
        beyond: further dims, of families that take two statistics.
        window: the number of neighbours, of families that have a window.
        alpha: what multiplies the statistic, of families that have it.
        power: of the root, of families that have one.
        stats_dtype: the dtype that statistics are computed in; for float16 and bfloat16 at least
            float32.
        norm_dtype: what (x - mean) / root is rounded to before weight and bias are applied.
        out_dtype: the dtype of the result.
        momentum: of running statistics, in training.
        affine_dim: the dim of x that a 1-d weight and bias belong to, or None: they broadcast as
            they are.
        contiguous: whether the result is laid out contiguously where x is not, as some of ATen's
            operators do.
        origin: the ATen operator this was, or "algebra".
    """

    kind: str
    dims: tuple[int, ...]
    statistic: str = "variance"
    centre: bool = True
    correction: int = 0
    eps: float | None = 1e-5
    eps_place: str = "inside"
    scale: float = 1.0
    groups: int = 0
    group_dim: int = 1
    prefix: int = 0
    beyond: tuple[int, ...] = ()
    window: int = 0
    alpha: float = 1.0
    power: float = 1.0
    stats_dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32
    momentum: float = 0.0
    affine_dim: int | None = None
    contiguous: bool = False
    origin: str = "algebra"


def norm(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: Any = None,
    mean: Any = None,
    square: Any = None,
    gate: Any = None,
    *,
    spec: NormSpec,
    rank: int,
) -> Any:
    """Scale * (x - mean) / root * weight + bias, as `spec` says.

    Shapes:
        x: any of this rank. weight, bias: broadcast against x, or (channels,) with
            `spec.affine_dim`.
        mean, square: (channels,) for "running" and "batch"; else they broadcast against x.

    Dtypes:
        statistics in `spec.stats_dtype`, the affine part by torch's promotion from
        `spec.norm_dtype` on, the result in `spec.out_dtype`.

    Args:
        x: the tensor to normalize.
        weight: factor, or None.
        bias: summand, or None.
        eps: a tensor in place of `spec.eps`, or None.
        mean: the mean, where it is given: the running one, or one that others read too.
        square: S (sqrt(S) where eps stands outside of the root), where it is given; of a family,
            the operand that its body calls `given`.
        gate: of norms that have one.
        spec: what to compute.
        rank: the number of dims of x (a proxy cannot be asked).
    """
    if spec.statistic == "batch":
        return torch.batch_norm(
            x, weight, bias, mean, square, True, spec.momentum, _eps(spec, eps), False
        )
    given = [mean, square, gate]
    h = x.to(spec.stats_dtype)
    mean, square, gate = (None if g is None else g.to(spec.stats_dtype) for g in given)
    top = h if gate is None else h * torch.sigmoid(gate * h)
    if spec.groups:
        h = h.unflatten(spec.group_dim, (spec.groups, -1))
        top = top.unflatten(spec.group_dim, (spec.groups, -1))
    family = FAMILIES.get(spec.statistic)
    if family is not None:
        h = family.body(h, spec, eps=_eps(spec, eps), gate=gate, given=square)
    elif spec.statistic == "static":
        h = h if mean is None else h - mean
    elif spec.statistic == "running":
        shape = [1] * rank
        shape[1 if rank > 1 else 0] = -1
        h = (h - mean.reshape(shape)) * _inverse_root(square.reshape(shape), spec, eps)
    else:
        part = h.narrow(spec.dims[-1], 0, spec.prefix) if spec.prefix else h
        divisor, inverse = _divisor(part, spec, eps, mean, square)
        if spec.centre and mean is None:
            mean = part.mean(spec.dims, keepdim=True)
        h = top - mean if spec.centre else top
        h = h * divisor if inverse else h / divisor
    if spec.scale != 1.0:
        h = h * spec.scale
    if spec.groups:
        h = h.flatten(spec.group_dim, spec.group_dim + 1)
    h = h.to(spec.norm_dtype)
    if weight is not None:
        h = h * _aligned(weight, spec, rank)
    if bias is not None:
        h = h + _aligned(bias, spec, rank)
    h = h.to(spec.out_dtype)
    return h.contiguous() if spec.contiguous else h


def row_scale(x: Any, eps: Any = None, square: Any = None, *, spec: NormSpec) -> Any:
    """Scale / root: what a norm that is not centred multiplies x by, one number for each statistic.

    Shapes:
        x: any. The result has size one along `spec.dims`.

    Dtypes:
        `spec.stats_dtype`.

    Args:
        x: the tensor that the statistic is taken of.
        eps: a tensor in place of `spec.eps`, or None.
        square: S, where it is given, as for `norm`.
        spec: of the norm; without groups and without a prefix.
    """
    h = x.to(spec.stats_dtype)
    square = None if square is None else square.to(spec.stats_dtype)
    divisor, inverse = _divisor(h, spec, eps, None, square)
    factor = divisor if inverse else 1.0 / divisor
    return factor if spec.scale == 1.0 else factor * spec.scale


def _eps(spec: NormSpec, eps: Any) -> Any:
    return spec.eps if eps is None else eps


def _divisor(h: Any, spec: NormSpec, eps: Any, mean: Any, square: Any) -> tuple[Any, bool]:
    """(1/root, True) where eps stands under the square root, else (root, False).

    A root without eps under it has an infinite slope at zero; the norm and the deviation of torch
    give a zero row a zero gradient there, as `F.normalize` has it.
    """
    if spec.eps_place in ("outside", "floor"):
        e = _eps(spec, eps)
        root = _root(h, spec, mean) if square is None else square
        if spec.eps_place == "floor":
            return _at_least(root, e), False
        return (root + e if eps is not None or e else root), False
    if square is None:
        square = _square(h, spec, mean)
    return _inverse_root(square, spec, eps), True


def _root(h: Any, spec: NormSpec, mean: Any) -> Any:
    """sqrt(S)."""
    if spec.statistic == "variance" and mean is None:
        return torch.std(h, spec.dims, correction=spec.correction, keepdim=True)
    if spec.statistic == "sum-square":
        return torch.linalg.vector_norm(h, 2, spec.dims, keepdim=True)
    return torch.sqrt(_square(h, spec, mean))


def _square(h: Any, spec: NormSpec, mean: Any) -> Any:
    """S."""
    n = math.prod(h.shape[d] for d in spec.dims)
    if spec.statistic == "variance" and mean is None:
        return torch.var(h, spec.dims, correction=spec.correction, keepdim=True)
    if spec.statistic == "variance":
        square = (h - mean).square()
        return square.sum(spec.dims, keepdim=True) / (n - spec.correction)
    if spec.statistic == "compressed":
        left_out = h.sum(spec.dims, keepdim=True)  # without its sign
        return ((h * h).sum(spec.dims, keepdim=True) + left_out * left_out) / (n + 1)
    if spec.statistic == "sum-square":
        return (h * h).sum(spec.dims, keepdim=True)
    return (h * h).mean(spec.dims, keepdim=True)


def _inverse_root(square: Any, spec: NormSpec, eps: Any) -> Any:
    e = _eps(spec, eps)
    if spec.eps_place == "floor-inside":
        return torch.rsqrt(_at_least(square, e))
    return torch.rsqrt(square + e) if eps is not None or e else torch.rsqrt(square)


def _at_least(value: Any, low: Any) -> Any:
    return (
        torch.clamp_min(value, low) if isinstance(low, (int, float)) else torch.maximum(value, low)
    )


def _aligned(operand: Any, spec: NormSpec, rank: int) -> Any:
    if spec.affine_dim is None or spec.affine_dim == rank - 1:
        return operand
    return operand.reshape([-1] + [1] * (rank - 1 - spec.affine_dim))


def short(number: float | None) -> float | None:
    """A number as a person would write it: 1e-6 for the float32 nearest to it."""
    if number is None or number == 0 or not math.isfinite(number):
        return number
    rounded = float(f"{number:.6g}")
    return rounded if abs(rounded - number) <= 6e-8 * abs(number) else number
