"""Mutations: what may be broken in a norm, one thing at a time, and what the draw has to be like for it.

The value of a mutation fixes fields of the norm that it is drawn for; see `norms`. With "as it is" the statistics
are taken of x as it is given (groups in a dim of their own), with "permuted" of x with its dims in another order;
"divided" says where x is divided: in the layout of the statistics ("there") or in its own ("home").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spellings.norms import (
    FAMILIES,
    GROUPED,
    IMAGES,
    LAST,
    MORE,
    PLAIN,
    SEVERAL,
    SQUARE,
    SQUARE_LAST,
    Norm,
    at,
    grouped,
)

_EPS = {"eps": 0.1, "eps_form": "float"}
_SAME = {"dynamic": False}  # sizes that coincide
_VARIANCE = {"statistic": "variance", "centre": True}
_RMS = {"family": "rms", "statistic": "mean-square", "correction": 0}
_SQUARE_GROUPS = [grouped((2, 4, 4, 2), 2, (2, 3, 4)), grouped((3, 9, 3), 3, (2, 3))]
_MANY = [p for p in PLAIN + MORE + GROUPED if sum(size > 1 for size in p["shape"]) > 1]
_PERMUTED = [
    *GROUPED[:6],
    at((2, 6, 3, 5), (1,)),
    at((3, 3, 3, 3), (1,)),
    at((2, 3, 4, 5), (2, 3), (1,)),
    at((3, 2, 2, 3), (0, 2, 3), (1,)),
]

MUTATIONS: dict[str, dict[str, Any]] = {
    # another tensor
    "mean-of-another": {"centre": True},
    "variance-of-another": {},
    "numerator-of-another": {},
    "statistic-of-relu": {},
    "statistic-of-weighted": {"weight": "w", "layout": "as it is"},
    "statistic-of-shifted": {"bias": True, "layout": "as it is"},
    "statistic-of-masked": {},
    "statistic-of-half": {"places": LAST, "layout": "as it is"},
    "statistic-of-rounded": {},
    "statistic-of-flipped": {"places": SQUARE, "layout": "as it is", **_SAME},
    "masked-numerator": {},
    "silu-numerator": {"gate": "none"},
    "x-written-between": {},
    "temporary-written": {"centre": True},
    "einsum-with-another": {"places": LAST, "layout": "as it is", **_RMS},
    "matrix-of-products": {"places": SQUARE_LAST, "layout": "as it is", **_SAME, **_RMS},
    # another dim
    "mean-over-another-dim": {"centre": True, "places": SQUARE, "layout": "as it is", **_SAME},
    "statistic-over-another-dim": {"places": LAST, "layout": "as it is", **_SAME},
    "statistic-over-all": {"places": LAST, "layout": "as it is", **_SAME},
    "wrong-axis-mean": {"centre": True, "places": SQUARE, "layout": "as it is", **_SAME},
    "wrong-axis-root": {"places": SQUARE, "layout": "as it is", **_SAME},
    "wrong-axis-w": {
        "places": SQUARE + _SQUARE_GROUPS,
        "weight": "w",
        "layout": "as it is",
        **_SAME,
    },
    "wrong-axis-b": {
        "places": SQUARE + _SQUARE_GROUPS,
        "bias": True,
        "layout": "as it is",
        **_SAME,
    },
    "no-keepdim": {"places": SQUARE_LAST, "layout": "as it is", **_SAME},
    "mean-elsewhere": {"centre": True, "places": _MANY, "divided": "home", **_SAME},
    "root-elsewhere": {"places": _MANY, "divided": "home", **_SAME},
    "both-elsewhere": {"centre": True, "places": _MANY, "divided": "home", **_SAME},
    "tiled-statistic": {"places": GROUPED, "layout": "as it is", "divided": "home"},
    "permuted-not-back-statistic": {"places": _PERMUTED, "layout": "permuted", "divided": "home"},
    "permuted-not-back-result": {"places": _PERMUTED, "layout": "permuted", "divided": "there"},
    "window-mean": {"places": LAST, "layout": "as it is"},
    "cumulative-mean": {"places": LAST, "layout": "as it is"},
    # another part
    "prefix-shifted": {"family": "prefix", **_EPS},
    "prefix-of-another": {"family": "prefix"},
    "prefix-longer": {"family": "prefix", "centre": True, "statistic": "variance"},
    "prefix-as-well": {"places": FAMILIES["prefix"]},
    # another power
    "cubed": {},
    "fourth": {},
    "first-absolute": {},
    "no-root": {},
    "fourth-root": {},
    "root-of-root": {},
    "l1-norm": {"centre": False},
    # another order of operations
    "mean-of-roots": {
        "places": SEVERAL,
        "layout": "as it is",
        **_RMS,
        **_EPS,
        "eps_place": "inside",
    },
    "mean-of-variances": {"places": SEVERAL, "layout": "as it is", **_VARIANCE},
    "sum-of-means": {"places": SEVERAL, "layout": "as it is"},
    # another coefficient
    "mean-added": {"centre": True},
    "mean-twice": {"centre": True},
    "variance-plus-mean-squared": {**_VARIANCE},
    "variance-half-mean-squared": {**_VARIANCE},
    "variance-minus-mean": {**_VARIANCE},
    "variance-around-bias": {**_VARIANCE, "bias": True, "layout": "as it is"},
    "other-correction": {**_VARIANCE, **_SAME},
    "two-corrections": {**_VARIANCE, **_SAME},
    "wrong-n": {**_SAME},
    "n-of-another-dim": {"places": LAST, "layout": "as it is"},
    "n-rounded-to-float32": {**_SAME},
    "compressed-wrong-n": {"family": "compressed", **_SAME},
    "addcmul-value": {"bias": True},
    "addcdiv-value": {"bias": True},
    "lerp-off": {"centre": True},
    "floor-division": {},
    # eps
    "eps-moved": {**_EPS},
    "eps-doubled": {**_EPS},
    "eps-subtracted": {**_EPS, "eps_place": "inside", "eps": 0.01},
    "eps-multiplied": {**_EPS},
    "eps-in-numerator": {**_EPS},
    "eps-in-both-places": {**_EPS, "eps_place": "inside"},
    "eps-ceiling": {**_EPS, "eps_place": "floor-inside"},
    "eps-per-row": {"places": SQUARE, "layout": "as it is"},
    "two-eps": {"centre": True, **_EPS},
    # affine
    "mean-not-weighted": {"centre": True, "weight": "w", "layout": "as it is"},
    "two-roots": {"centre": True},
    "bias-scaled": {"bias": True},
    "weight-inside-root": {"weight": "w", "layout": "as it is"},
    # families
    "response-over-other-dims": {"family": "response"},
    "response-squared": {"family": "response"},
    "response-eps-inside": {"family": "response", **_EPS},
    "response-of-another": {"family": "response"},
    "response-not-averaged": {"family": "response"},
    "gate-of-another": {"family": "evonorm"},
    "gate-shifted": {"family": "evonorm", "gate": "swish", "bias": True, "weight": "w"},
    "gate-tanh": {"family": "evonorm"},
    "gate-twice": {"family": "evonorm"},
    "gate-on-statistic": {"family": "evonorm"},
    "gate-centred": {"places": IMAGES, **_VARIANCE, "gate": "none"},
    # gradients
    "detached-mean": {"centre": True},
    "detached-root": {},
    "detached-statistic": {},
    "no-grad-root": {},
}
# Where something is written to, autograd itself refuses some of the functions.
NO_GRADIENTS = ("x-written-between", "temporary-written")
GRADIENTS = ("detached-mean", "detached-root", "detached-statistic", "no-grad-root")
WITH_ANOTHER = (
    "mean-of-another",
    "variance-of-another",
    "numerator-of-another",
    "prefix-of-another",
    "einsum-with-another",
    "response-of-another",
    "gate-of-another",
    "statistic-of-masked",
)


def elsewhere(norm: Norm) -> list[Norm]:
    """The same with its statistics taken over something else."""
    found = []
    sizes = norm.sizes
    if norm.groups:
        size, d = norm.shape[norm.group_dim], norm.group_dim
        found += [replace(norm, groups=g) for g in range(2, size) if size % g == 0]
        swapped = {d: d + 1, d + 1: d}
        found.append(replace(norm, dims=tuple(sorted(swapped.get(a, a) for a in norm.dims))))
    for axis, s in enumerate(sizes):
        dims = tuple(sorted(set(norm.dims) ^ {axis}))
        if s > 1 and dims:
            found.append(replace(norm, dims=dims))
        if len(norm.dims) == 1 and s > 1:
            found.append(replace(norm, dims=(axis,)))
    return [other for other in found if other != norm and other.n > 1]
