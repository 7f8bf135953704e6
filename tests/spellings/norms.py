"""What is computed: the description of a norm, its formula in float64, and a strategy that draws one."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st


@dataclass(frozen=True)
class Norm:
    """scale * (x - centre*mean) / root * weight + bias: see `reference`.

    The dims are those of x with `group_dim` cut in (groups, size // groups), if there are groups. They are the
    axes of the norm; `affine` are dims of x itself.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    centre: bool
    statistic: str  # "variance", "mean-square", "sum-square", "compressed", "global-response"
    correction: int
    eps: float
    eps_place: str  # "inside", "outside", "floor", "floor-inside"
    eps_form: str = "float"
    weight: str = "none"  # "w", "1+w", "scalar", "lerp"
    bias: bool = False
    scale: float = 1.0
    gate: str = "none"  # "before", "after", "swish" (x*sigmoid(v*x) for x), "silu"
    dtype: str = "float32"
    groups: int = 0
    group_dim: int = 1
    prefix: int = 0  # statistics over so many elements of the last of the dims
    affine: tuple[int, ...] = ()  # the dims of x that weight and bias vary along
    beyond: tuple[int, ...] = ()  # of a response: the dims of its mean
    dynamic: bool = False  # the size of dim 0 is symbolic

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        if not self.groups:
            return self.shape
        d = self.group_dim
        cut = (self.groups, self.shape[d] // self.groups)
        return (*self.shape[:d], *cut, *self.shape[d + 1 :])

    @property
    def n(self) -> int:
        total = math.prod(self.sizes[d] for d in self.dims)
        return total * self.prefix // self.sizes[self.dims[-1]] if self.prefix else total

    @property
    def multiple(self) -> float:
        """The statistic as a multiple of the biased variance, or of the mean square."""
        if self.statistic == "variance":
            return self.n / (self.n - self.correction)
        return float(self.n) if self.statistic == "sum-square" else 1.0

    @property
    def eps_value(self) -> float:
        rounded = self.eps_form in ("float32", "tensor32")
        return struct.unpack("f", struct.pack("f", self.eps))[0] if rounded else self.eps

    @property
    def kind(self) -> str | None:
        """The name that a report has to show; None where it depends on how x is laid out."""
        if self.gate == "swish":
            return "EvoNormS0"
        if self.gate == "silu":
            return "EvoNormS1" if self.statistic == "variance" else "EvoNormS2"
        return {"compressed": "CRMSNorm", "global-response": "GlobalResponseNorm"}.get(
            self.statistic
        )


def canonical(
    *, statistic: str, multiple: float, eps: float | None, place: str
) -> tuple[str, float | None, str]:
    """(statistic, eps, place) with S a biased variance or a mean square: equal for equal functions.

    sqrt(k*S + e) = sqrt(k) * sqrt(S + e/k); sqrt(k*S) + e = sqrt(k) * (sqrt(S) + e/sqrt(k));
    sqrt(max(S, e)) = max(sqrt(S), sqrt(e)); without an eps its place means nothing.
    """
    statistic = "mean-square" if statistic == "sum-square" else statistic
    if eps is None:
        return statistic, None, place
    if place in ("inside", "floor-inside"):
        eps = eps / multiple
    else:
        eps = eps / math.sqrt(multiple)
    if place == "floor-inside":
        eps, place = math.sqrt(eps), "floor"
    return statistic, eps, "inside" if eps == 0 else place


def reference(norm: Norm, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula in float64."""
    t = {name: value.double() for name, value in inputs.items()}
    x = source_of(norm, t)
    y = _cut(norm, x)
    if norm.gate in ("swish", "silu"):
        slope = t["v"].reshape(weight_view(norm)) if norm.gate == "swish" else 1.0
        y = _cut(norm, x * torch.sigmoid(slope * x))
    if norm.centre:
        y = y - _part(norm, _cut(norm, x)).mean(norm.dims, keepdim=True)
    y = (y / denominator(norm, x) * norm.scale).reshape(x.shape)
    weight, bias = (
        t[k].reshape(weight_view(norm) if t[k].numel() > 1 else ()) if k in t else torch.empty(())
        for k in ("w", "b")
    )
    if norm.weight == "lerp":
        weight, bias = 1 - weight, weight * bias
    if norm.weight != "none":
        y = y * (1 + weight if norm.weight == "1+w" else weight)
    if norm.bias:
        y = y + bias
    return y * F.silu(t["z"]) if norm.gate == "after" else y


def source_of(norm: Norm, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that is normalized."""
    return inputs["x"] * F.silu(inputs["z"]) if norm.gate == "before" else inputs["x"]


def denominator(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """What a norm divides by, with one dim for each axis."""
    h = _part(norm, _cut(norm, x))
    e = norm.eps_value
    if norm.statistic == "global-response":
        response = h.norm(2, norm.dims, keepdim=True)
        return (response.mean(norm.beyond, keepdim=True) + e) / response
    centred = h - h.mean(norm.dims, keepdim=True) if norm.statistic == "variance" else h
    s = (centred * centred).mean(norm.dims, keepdim=True) * norm.multiple
    if norm.statistic == "compressed":
        s = (s * norm.n + h.sum(norm.dims, keepdim=True) ** 2) / (norm.n + 1)
    if norm.eps_place == "inside":
        return (s + e).sqrt()
    if norm.eps_place == "outside":
        return s.sqrt() + e
    return s.sqrt().clamp_min(e) if norm.eps_place == "floor" else s.clamp_min(e).sqrt()


def _cut(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(norm.group_dim, (norm.groups, -1)) if norm.groups else x


def _part(norm: Norm, h: torch.Tensor) -> torch.Tensor:
    return h.narrow(norm.dims[-1], 0, norm.prefix) if norm.prefix else h


def condition(norm: Norm, inputs: dict[str, torch.Tensor]) -> float:
    """E[x^2] / root^2, at least one: by how much a spelling may lose precision, whichever it is.

    A variance written as E[x^2] - E[x]^2 has an absolute error of at most 2 (n + 2) u E[x^2] (n additions, a
    product and a difference; u = 2^-53), so the root has a relative one of half of that over root^2, and
    x * r - m * r one of 2 u |x| r <= 2 u E[x^2]/root^2 + 2 u. With n <= 36 these are below 2e-14 times this number
    together, once for the original and once for the rewritten graph: 1e-12 leaves a factor of twenty-five. A
    gradient divides by the root once more and multiplies by another deviation: the same number, squared.
    """
    if norm.statistic == "global-response":
        return 1.0  # sums of squares and quotients, no differences
    x = source_of(norm, inputs)
    square = _part(norm, _cut(norm, x * x)).mean(norm.dims, keepdim=True)
    return max(1.0, (square / denominator(norm, x) ** 2).max().item())


def members(
    positions: torch.Tensor, dims: tuple[int, ...], groups: int, group_dim: int, prefix: int
) -> set[tuple[frozenset[int], frozenset[int]]]:
    """For each statistic the elements that it is taken of, and those that it is for.

    So two descriptions of dims can be compared that are of one tensor in different layouts.
    """
    t = positions.unflatten(group_dim, (groups, -1)) if groups else positions

    def rows(t: torch.Tensor) -> list[frozenset[int]]:
        last = tuple(range(-len(dims), 0))
        flat = t.movedim(dims, last).flatten(-len(dims))
        return [frozenset(map(round, row)) for row in flat.reshape(-1, flat.shape[-1]).tolist()]

    whole = rows(t)
    part = rows(t.narrow(dims[-1], 0, prefix)) if prefix else whole
    return set(zip(part, whole, strict=True))


def affine_shape(norm: Norm) -> tuple[int, ...]:
    """Shape of weight and bias as a module holds them."""
    return tuple(norm.shape[d] for d in norm.affine)


def weight_view(norm: Norm) -> tuple[int, ...]:
    """That shape with ones, as it broadcasts against x."""
    return tuple(s if d in norm.affine else 1 for d, s in enumerate(norm.shape))[norm.affine[0] :]


# -- drawing one ---------------------------------------------------------------------------------


def at(
    shape: tuple[int, ...], dims: tuple[int, ...], affine: tuple[int, ...] = (), **more: Any
) -> dict[str, Any]:
    """A place: fields of a norm. Weight and bias lie along the dims if nothing else is said."""
    return {"shape": shape, "dims": dims, "affine": affine or dims, **more}


def grouped(
    shape: tuple[int, ...], groups: int, dims: tuple[int, ...], group_dim: int = 1
) -> dict[str, Any]:
    """A place with groups of the channels."""
    return at(shape, dims, (group_dim,), groups=groups, group_dim=group_dim)


# Square ones hide a wrong broadcast from shapes. Counts that are no power of two make 1/n inexact.
PLAIN = [
    at((4, 6), (1,)),
    at((5, 5), (1,)),
    at((2, 3, 7), (2,)),
    at((4, 4, 4), (2,)),
    at((2, 3, 5), (1, 2)),
    at((3, 3, 3), (1, 2)),
    at((2, 6, 3, 5), (1,)),
    at((3, 3, 3, 3), (1,)),
    at((2, 3, 4, 5), (2, 3), (1,)),
    at((2, 4, 6), (1,)),
    at((9,), (0,)),
    at((2, 3, 1, 6), (3,)),
    at((1, 1, 6), (2,)),
]
MORE = [
    at((3, 4, 6), (2,), (1,)),  # InstanceNorm of sequences
    at((3, 3, 3, 3), (2, 3), (1,)),
    at((2, 3, 4, 3), (1, 2, 3), (1,)),
    at((3, 2, 2, 3), (0, 2, 3), (1,)),  # BatchNorm
    at((3, 3, 3, 3), (0, 2, 3), (1,)),
    at((3, 4, 5), (0, 1), (2,)),  # of tokens
    at((6, 4), (0,), (1,)),
]
GROUPED = [
    grouped((2, 6, 2, 3), 2, (2, 3, 4)),
    grouped((2, 6, 2, 3), 3, (2, 3, 4)),
    grouped((2, 4, 4, 2), 2, (2, 3, 4)),
    grouped((3, 9, 3), 3, (2, 3)),
    grouped((2, 6, 5), 3, (2, 3)),
    grouped((4, 6), 2, (2,)),
    grouped((2, 2, 2, 6), 2, (1, 2, 4), 3),  # channels last
    # of the last dim, as in Mamba-2; two elements less their mean would have no gradient to compare
    grouped((2, 3, 12), 4, (3,), 2),
    grouped((2, 3, 9), 3, (3,), 2),
    grouped((2, 6, 3), 2, (1, 3)),  # over the outer factor
]
LAST = [at((4, 6), (1,)), at((5, 5), (1,)), at((2, 3, 7), (2,)), at((4, 4, 4), (2,))]
SQUARE = [at((5, 5), (1,)), at((4, 4, 4), (2,)), at((3, 3, 3, 3), (1,))]
SQUARE_LAST = SQUARE[:2]
IMAGES = [
    *GROUPED[:3],
    at((2, 3, 4, 5), (2, 3), (1,)),
    at((3, 3, 3, 3), (2, 3), (1,)),
]
RESPONSES = [
    at((2, 3, 4, 6), (1, 2), (3,), beyond=(3,)),
    at((2, 5, 3, 4), (2, 3), (1,), beyond=(1,)),
    at((3, 3, 3, 3), (1, 2), (3,), beyond=(3,)),
    at((2, 5, 4), (1,), (2,), beyond=(2,)),
]
SEVERAL = [at((2, 3, 5), (1, 2)), at((3, 3, 3), (1, 2)), at((2, 3, 4, 5), (2, 3), (1,))]
# Families that a mutation may ask for by name, and with it another list of places.
FAMILIES = {
    "prefix": [*LAST, at((2, 4, 6), (1,)), at((3, 4, 6), (2,), (1,))],
    "compressed": [*PLAIN, *GROUPED[:2]],
    "evonorm": IMAGES,
    "response": RESPONSES,
}


@st.composite
def norms(draw: Any, **fixed: Any) -> Norm:
    """A normalization; `fixed` sets some of its fields, its family or the places to draw from."""
    family = fixed.pop("family", None)
    if family is None and "centre" in fixed:
        family = "layer" if fixed["centre"] else draw(st.sampled_from(["rms", "l2", "simple"]))
    if family is None:
        usual = ["layer"] * 6 + ["rms"] * 4 + ["l2"] * 2 + ["simple"]
        usual = [f for f in usual if fixed.get("statistic", "variance") == "variance" or f == "rms"]
        others = [] if {"places", "statistic"} & fixed.keys() else list(FAMILIES)
        family = draw(st.sampled_from(usual + others))
    places = FAMILIES.get(family, PLAIN + MORE + GROUPED)
    where = draw(st.sampled_from(fixed.pop("places", places)))
    made = draw(_usual(family, where))
    if family == "prefix":
        size = where["shape"][where["dims"][-1]]
        made = replace(made, prefix=draw(st.integers(2, size - 1)), correction=0)
    made = replace(made, **fixed)
    # a symbolic count: no sums by hand, no unbiased variance
    counted = 0 in made.dims and (made.correction or "variance" != made.statistic != "mean-square")
    may_be_dynamic = len(made.shape) > 1 and made.shape[0] > 1 and not counted
    if may_be_dynamic and "dynamic" not in fixed and draw(st.integers(0, 7)) == 7:
        made = replace(made, dynamic=True)
    return made


@st.composite
def _usual(draw: Any, family: str, where: dict[str, Any]) -> Norm:
    """A norm of a family at a place."""
    centre = family == "layer" or (family == "prefix" and draw(st.integers(0, 3)) == 3)
    variance = family in ("layer", "simple") or centre
    gate = draw(st.sampled_from(["none", "none", "none", "none", "before", "after"]))
    if family == "evonorm":
        gate = draw(st.sampled_from(["swish", "silu"]))
        variance = gate == "swish" or draw(st.booleans())
    statistic = "variance" if variance else "mean-square"
    correction = 0
    if variance and family != "evonorm" and draw(st.integers(0, 4)) == 0:
        correction = 1
    place = "inside"
    if draw(st.integers(0, 2)) == 0:
        place = draw(st.sampled_from(["outside", "floor", "floor-inside"]))
    if family == "l2":
        statistic = "sum-square"
        place = draw(st.sampled_from(["inside", "outside", "floor", "floor-inside"]))
    forms = ["float", "float", "float32", "tensor32", "tensor64", "full", "buffer", "buffer1"]
    if family in ("compressed", "response"):
        statistic = "compressed"
        if family == "response":
            statistic, place = "global-response", "outside"
        forms = forms[:6]  # it is scaled, so it has to be a number
    none = 0.0 if place == "inside" else 1e-5
    eps = draw(st.sampled_from([1e-5, 1e-6, 1e-12, 1e-3, 0.1, none]))
    weight = draw(st.sampled_from(["none", "w", "w", "1+w", "scalar"]))
    bias = draw(st.booleans())
    if bias and weight == "w" and draw(st.integers(0, 7)) == 7:
        weight = "lerp"
    return Norm(
        centre=centre,
        statistic=statistic,
        correction=correction,
        eps=eps,
        eps_place=place,
        eps_form="float" if eps == 0 else draw(st.sampled_from(forms)),
        weight=weight,
        bias=bias,
        scale=draw(st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.3])),
        gate=gate,
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float64"])),
        **where,
    )
