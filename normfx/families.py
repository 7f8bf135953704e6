"""Families: norms of another form than `classify.py` knows. One row of `FAMILIES` is one family.

A family is an identity (which polynomial of a site it is) and a body (what its canonical node
computes). Both stand here, side by side, so that they can be read together.

| family | y, before weight and bias | source |
| --- | --- | --- |
| global-response | x * G / (mean(G) + eps), G the norm of x | ConvNeXt V2 (arXiv 2301.00808) |
| local-response | x / (eps + alpha * mean of x^2 over `window` channels)^power | AlexNet |
| evonorm-b0 | x / max(L, v*x + sqrt(variance + eps)) | EvoNorm (arXiv 2004.02967) |
| evonorm-b1 | x / max(L, (x + 1) * sqrt(mean square + eps)) | EvoNorm |
| evonorm-b2 | x / max(L, sqrt(mean square + eps) - x) | EvoNorm |
| tanh | tanh(alpha*x) | DyT (arXiv 2503.10622) |
| bilinear | x / (u^T x v) | spectral norm (arXiv 1802.05957) |

G is taken over `dims`, its mean over `beyond`. L of an EvoNorm is sqrt(variance over `beyond` +
eps) in training, and given in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from normfx.algebra import Atom, Monomial, Poly, Ring, close
from normfx.classify import Form, Root, constants, free_of_x, is_x, root_of


@dataclass(frozen=True, slots=True)
class Family:
    """A norm by its identity and its body.

    Attributes:
        kind: the usual name, for reports.
        match: the form of a polynomial that consists of a single term, or None. It is given the
            ring, the number in front, and the factors that x or its moments occur in.
        body: y of x in the dtype of the statistics, the spec and the operands by name.
    """

    kind: str
    match: Callable[[Ring, float, Monomial], Form | None]
    body: Callable[..., Any]


def match_family(ring: Ring, value: Poly) -> Form | None:
    """The form of a value that is a norm of one of the families."""
    if len(value.terms) != 1:
        return None
    ((monomial, coefficient),) = value.terms.items()
    front, factors = constants(ring, monomial)
    weight = tuple(pair for pair in factors if free_of_x(ring, (pair,)))
    factors = tuple(pair for pair in factors if pair not in weight)
    for family in FAMILIES.values():
        found = family.match(ring, front * float(coefficient), factors)
        if found is not None:
            return replace(found, weight=Poly({weight: Fraction(1)}))
    return None


def _beside_x(ring: Ring, factors: Monomial) -> Monomial | None:
    """The other factors of a term x * ..., or None."""
    rest = tuple((i, e) for i, e in factors if not (is_x(ring, i) and e == 1))
    return rest if len(rest) == len(factors) - 1 else None


def _only(p: Poly | None) -> tuple[Monomial, Fraction] | None:
    return next(iter(p.terms.items())) if p is not None and len(p.terms) == 1 else None


# -- global response -----------------------------------------------------------------------------


def _match_global_response(ring: Ring, front: float, factors: Monomial) -> Form | None:
    rest = _beside_x(ring, factors)
    if rest is None or len(rest) != 2:
        return None
    norm, divisor = sorted(rest, key=lambda pair: float(pair[1]), reverse=True)
    base = ring.atoms[divisor[0]].base
    if norm[1] != Fraction(1, 2) or divisor[1] != -1 or base is None:
        return None
    if ring.atoms[divisor[0]].kind != "compound" or ring.order_of(ring.atoms[norm[0]]) != 2:
        return None
    mean, eps = ring.split(base, ("moment",))
    only = _only(mean)
    if only is None or not all(free_of_x(ring, m) for m in eps.terms):
        return None
    lead, inner = constants(ring, only[0])
    if len(inner) != 1 or inner[0][1] != 1:
        return None
    response = ring.atoms[inner[0][0]]  # E[sqrt(m2)] over other axes
    if response.kind != "moment" or _only(response.base) != ((norm,), 1):
        return None
    lead *= float(only[1])
    return Form(
        "global-response",
        ring.atoms[norm[0]].key,
        beyond=response.key,
        eps=eps.scaled(1 / Fraction(lead)),
        place="outside",
        scale=front / lead,
    )


def _global_response(h: Any, spec: Any, *, eps: Any, **_: Any) -> Any:
    response = torch.linalg.vector_norm(h, 2, spec.dims, keepdim=True)
    return h * (response / (response.mean(spec.beyond, keepdim=True) + eps))


# -- local response ------------------------------------------------------------------------------


def _match_local_response(ring: Ring, front: float, factors: Monomial) -> Form | None:
    rest = _beside_x(ring, factors)
    if rest is None or len(rest) != 1 or rest[0][1] >= 0:
        return None
    base = ring.atoms[rest[0][0]].base
    if ring.atoms[rest[0][0]].kind != "compound" or base is None:
        return None
    mean, low = ring.split(base, ("function",))
    only = _only(mean)
    if only is None or only[1] != 1 or len(only[0]) != 1 or only[0][0][1] != 1:
        return None
    window: Atom = ring.atoms[only[0][0][0]]
    if not isinstance(window.key, tuple) or window.key[0] != "window":
        return None
    square = _only(window.base)
    if square is None or square[1] != 1 or len(square[0]) != 1 or square[0][0][1] != 2:
        return None
    if not is_x(ring, square[0][0][0]) or low.constant() is None:
        return None
    _, axis, size = window.key
    return Form(
        "local-response",
        frozenset({axis}),
        eps=low,
        window=size,
        power=-float(rest[0][1]),
        scale=front,
    )


def _local_response(h: Any, spec: Any, *, eps: Any, **_: Any) -> Any:
    (dim,) = spec.dims
    # As an average over a window of a dim of its own, with zeros around it.
    square = (h * h).movedim(dim, -1).unsqueeze(-2)
    shape = square.shape
    square = square.flatten(0, -3) if len(shape) > 3 else square
    around = (spec.window // 2, (spec.window - 1) // 2)
    padded = torch.nn.functional.pad(square, around)
    mean = torch.nn.functional.avg_pool1d(padded, spec.window, 1).reshape(shape)
    return h * (spec.alpha * mean.squeeze(-2).movedim(-1, dim) + eps) ** -spec.power


# -- EvoNorm, B series ---------------------------------------------------------------------------


def _evonorm_b(name: str, match_right: Callable[[Ring, Poly], tuple[Root, Poly] | None]) -> Any:
    def match(ring: Ring, front: float, factors: Monomial) -> Form | None:
        rest = _beside_x(ring, factors)
        if rest is None or len(rest) != 1 or rest[0][1] != -1:
            return None
        atom = ring.atoms[rest[0][0]]
        if atom.kind != "maximum" or not atom.has_x or atom.base is None or atom.other is None:
            return None
        right = match_right(ring, atom.base)
        if right is None or not close(right[0].factor, 1.0):
            return None
        form = Form(name, right[0].dims, eps=right[0].eps, scale=front, gate=right[1] or None)
        if all(free_of_x(ring, m) for m in atom.other.terms):
            return replace(form, given=atom.other)
        left = _square_root(ring, atom.other)
        if left is None or left.statistic != "variance" or not close(left.factor, 1.0):
            return None
        return replace(form, beyond=left.dims) if left.eps.is_close(right[0].eps) else None

    return match


def _square_root(ring: Ring, p: Poly) -> Root | None:
    """The root that a polynomial of one factor Q^(1/2) is."""
    only = _only(p)
    if only is None or only[1] != 1 or len(only[0]) != 1 or only[0][0][1] != Fraction(1, 2):
        return None
    return root_of(ring, Poly({((only[0][0][0], 1),): Fraction(1)}))


def _parts(ring: Ring, p: Poly) -> tuple[dict[Monomial, Fraction], Poly]:
    """(A, B) of a polynomial A*x + B, B free of x."""
    slope, rest = {}, {}
    for monomial, coefficient in p.terms.items():
        beside = _beside_x(ring, monomial)
        if beside is None:
            rest[monomial] = coefficient
        else:
            slope[beside] = coefficient
    return slope, Poly(rest)


def _match_b0(ring: Ring, p: Poly) -> tuple[Root, Poly] | None:
    slope, rest = _parts(ring, p)
    root = _square_root(ring, rest)
    if not slope or root is None or root.statistic != "variance":
        return None
    return (root, Poly(slope)) if all(free_of_x(ring, m) for m in slope) else None


def _match_b1(ring: Ring, p: Poly) -> tuple[Root, Poly] | None:
    slope, rest = _parts(ring, p)
    root = _square_root(ring, rest)
    if root is None or root.statistic != "mean-square" or not Poly(slope).is_close(rest):
        return None
    return root, Poly()


def _match_b2(ring: Ring, p: Poly) -> tuple[Root, Poly] | None:
    slope, rest = _parts(ring, p)
    root = _square_root(ring, rest)
    minus_one = (-Poly(slope)).constant() == 1
    if root is None or root.statistic != "mean-square" or not minus_one:
        return None
    return root, Poly()


def _evonorm_left(h: Any, spec: Any, eps: Any, given: Any) -> Any:
    if given is not None:
        return given
    return torch.sqrt(torch.var(h, spec.beyond, correction=0, keepdim=True) + eps)


def _evonorm_b0(h: Any, spec: Any, *, eps: Any, gate: Any, given: Any) -> Any:
    deviation = torch.sqrt(torch.var(h, spec.dims, correction=0, keepdim=True) + eps)
    return h / torch.maximum(_evonorm_left(h, spec, eps, given), gate * h + deviation)


def _evonorm_b1(h: Any, spec: Any, *, eps: Any, given: Any, **_: Any) -> Any:
    root = torch.sqrt((h * h).mean(spec.dims, keepdim=True) + eps)
    return h / torch.maximum(_evonorm_left(h, spec, eps, given), (h + 1) * root)


def _evonorm_b2(h: Any, spec: Any, *, eps: Any, given: Any, **_: Any) -> Any:
    root = torch.sqrt((h * h).mean(spec.dims, keepdim=True) + eps)
    return h / torch.maximum(_evonorm_left(h, spec, eps, given), root - h)


# -- tanh ----------------------------------------------------------------------------------------


def _match_tanh(ring: Ring, front: float, factors: Monomial) -> Form | None:
    if len(factors) != 1 or factors[0][1] != 1:
        return None
    atom = ring.atoms[factors[0][0]]
    if atom.kind != "function" or atom.key != "tanh" or atom.base is None:
        return None
    slope, rest = _parts(ring, atom.base)
    if not slope or rest or not all(free_of_x(ring, m) for m in slope):
        return None
    return Form("tanh", frozenset(), eps=None, gate=Poly(slope), scale=front)


def _tanh(h: Any, spec: Any, *, gate: Any, **_: Any) -> Any:
    return torch.tanh(gate * h)


# -- bilinear ------------------------------------------------------------------------------------


def _match_bilinear(ring: Ring, front: float, factors: Monomial) -> Form | None:
    rest = _beside_x(ring, factors)
    if rest is None or len(rest) != 1 or rest[0][1] != -1:
        return None
    atom = ring.atoms[rest[0][0]]
    only = _only(atom.base) if atom.kind == "moment" and atom.key == ring.axes else None
    beside = None if only is None else _beside_x(ring, only[0])
    if beside is None or len(beside) != 2:
        return None
    sides = [ring.atoms[i] for i, e in beside if e == 1 and ring.atoms[i].kind == "opaque"]
    if len(sides) != 2 or sides[0].varies | sides[1].varies != ring.axes:
        return None
    if sides[0].varies & sides[1].varies:
        return None
    u, v = (Poly({((i, 1),): Fraction(1)}) for i, _ in beside)
    return Form("bilinear", ring.axes, eps=None, gate=u, given=v, scale=front)


def _bilinear(h: Any, spec: Any, *, gate: Any, given: Any, **_: Any) -> Any:
    return h / (h * gate * given).sum()


FAMILIES: dict[str, Family] = {
    "global-response": Family("GlobalResponseNorm", _match_global_response, _global_response),
    "local-response": Family("LocalResponseNorm", _match_local_response, _local_response),
    "evonorm-b0": Family("EvoNormB0", _evonorm_b("evonorm-b0", _match_b0), _evonorm_b0),
    "evonorm-b1": Family("EvoNormB1", _evonorm_b("evonorm-b1", _match_b1), _evonorm_b1),
    "evonorm-b2": Family("EvoNormB2", _evonorm_b("evonorm-b2", _match_b2), _evonorm_b2),
    "tanh": Family("DyT", _match_tanh, _tanh),
    "bilinear": Family("SpectralNorm", _match_bilinear, _bilinear),
}
