"""Random spellings of a normalization, as Python source, and mutations that break exactly one thing in them.

`spellings()` draws a `Norm` (what is computed) and then a `Program` (one way to write it): a straight-line function
over torch operators, in text, so that a failing example prints as a repro. It runs eagerly and can be traced.
`mutants()` draws the same with one thing broken. Nothing here is imported from normfx.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st


@dataclass(frozen=True)
class Norm:
    """scale * (x - centre*mean) / root * weight + bias: see `reference`."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    centre: bool
    statistic: str  # "variance", "mean-square", "sum-square"
    correction: int
    eps: float
    eps_place: str  # "inside", "outside", "floor", "floor-inside"
    eps_form: str = "float"
    weight: str = "none"  # "w", "1+w", "scalar"
    bias: bool = False
    scale: float = 1.0
    gate: str = "none"  # "before", "after"
    dtype: str = "float32"

    @property
    def n(self) -> int:
        return math.prod(self.shape[d] for d in self.dims)

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


def canonical(
    *, variance: bool, multiple: float, eps: float | None, place: str
) -> tuple[bool, float | None, str]:
    """(variance?, eps, place) with S a biased variance or a mean square: equal for equal functions.

    sqrt(k*S + e) = sqrt(k) * sqrt(S + e/k); sqrt(k*S) + e = sqrt(k) * (sqrt(S) + e/sqrt(k));
    sqrt(max(S, e)) = max(sqrt(S), sqrt(e)); without an eps its place means nothing.
    """
    if eps is None:
        return variance, None, place
    if place in ("inside", "floor-inside"):
        eps = eps / multiple
    else:
        eps = eps / math.sqrt(multiple)
    if place == "floor-inside":
        eps, place = math.sqrt(eps), "floor"
    return variance, eps, "inside" if eps == 0 else place


def reference(norm: Norm, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula in float64."""
    t = {name: value.double() for name, value in inputs.items()}
    x = t["x"] * F.silu(t["z"]) if norm.gate == "before" else t["x"]
    root = denominator(norm, x)
    y = x - x.mean(norm.dims, keepdim=True) if norm.centre else x
    y = y / root * norm.scale
    if norm.weight != "none":
        weight = t["w"].reshape(_weight_view(norm)) if norm.weight != "scalar" else t["w"]
        y = y * (1 + weight if norm.weight == "1+w" else weight)
    if norm.bias:
        y = y + t["b"].reshape(_weight_view(norm))
    return y * F.silu(t["z"]) if norm.gate == "after" else y


def denominator(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """The root that a norm divides by."""
    centred = x - x.mean(norm.dims, keepdim=True) if norm.statistic == "variance" else x
    s = (centred * centred).mean(norm.dims, keepdim=True) * norm.multiple
    e = norm.eps_value
    if norm.eps_place == "inside":
        return (s + e).sqrt()
    if norm.eps_place == "outside":
        return s.sqrt() + e
    return s.sqrt().clamp_min(e) if norm.eps_place == "floor" else s.clamp_min(e).sqrt()


def affine_shape(norm: Norm) -> tuple[int, ...]:
    """Shape of weight and bias as a module holds them."""
    rank = len(norm.shape)
    if norm.dims == tuple(range(rank - len(norm.dims), rank)) and norm.dims != (2, 3):
        return norm.shape[-len(norm.dims) :]
    return (norm.shape[1],)


def _weight_view(norm: Norm) -> tuple[int, ...]:
    shape = affine_shape(norm)
    rank = len(norm.shape)
    if norm.dims == tuple(range(rank - len(norm.dims), rank)) and norm.dims != (2, 3):
        return shape
    return (shape[0], *([1] * (rank - 2)))


@dataclass
class Program:
    """A function in source form, what it computes, and what it takes."""

    norm: Norm
    source: str
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    namespace: dict[str, Any]
    mutation: str = ""
    grad: bool = False
    _compiled: list[Callable[..., Any]] = field(default_factory=list)

    @property
    def function(self) -> Callable[..., Any]:
        if not self._compiled:
            scope = {"torch": torch, "F": F, "math": math, **self.namespace}
            exec(compile(self.source, "<spelling>", "exec"), scope)
            self._compiled.append(scope["f"])
        return self._compiled[0]

    def __repr__(self) -> str:
        shapes = {k: (list(s), str(d)) for k, (s, d) in self.inputs.items()}
        title = f"\n# {self.norm}\n# {shapes} {self.namespace} mutation={self.mutation!r}\n"
        return title + self.source

    def tensors(self, seed: int, kind: str) -> dict[str, torch.Tensor]:
        """Inputs in float64: "plain", "large-mean" (mean 1e3, deviation 1) or "tiny" (eps counts)."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, (shape, _) in self.inputs.items():
            if name == "e":
                made[name] = torch.full(shape, self.norm.eps, dtype=torch.float64)
                continue
            t = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name == "x":
                t = {"plain": t + 0.3, "large-mean": t + 1e3, "tiny": (t + 0.3) * 3e-3}[kind]
            made[name] = t
        return made


# -- what is computed ----------------------------------------------------------------------------

# Square ones hide a wrong broadcast from shapes. Counts that are no power of two make 1/n inexact.
_PLACES = [
    ((4, 6), (1,)),
    ((5, 5), (1,)),
    ((2, 3, 7), (2,)),
    ((4, 4, 4), (2,)),
    ((2, 3, 5), (1, 2)),
    ((3, 3, 3), (1, 2)),
    ((2, 6, 3, 5), (1,)),
    ((3, 3, 3, 3), (1,)),
    ((2, 3, 4, 5), (2, 3)),
    ((2, 4, 6), (1,)),
    ((9,), (0,)),
    ((2, 3, 1, 6), (3,)),
    ((1, 1, 6), (2,)),
]


@st.composite
def norms(draw: Any, **fixed: Any) -> Norm:
    """A normalization; `fixed` sets some of its fields."""
    shape, dims = draw(st.sampled_from(fixed.pop("places", _PLACES)))
    family = draw(st.sampled_from(["layer", "layer", "layer", "rms", "rms", "l2", "simple"]))
    if "centre" in fixed:
        family = "layer" if fixed["centre"] else draw(st.sampled_from(["rms", "l2", "simple"]))
    variance = family in ("layer", "simple")
    statistic = "variance" if variance else "mean-square"
    correction = 0
    if variance and draw(st.integers(0, 4)) == 0:
        correction = 1
    place = "inside"
    if draw(st.integers(0, 2)) == 0:
        place = draw(st.sampled_from(["outside", "floor", "floor-inside"]))
    if family == "l2":
        statistic = "sum-square"
        place = draw(st.sampled_from(["inside", "outside", "floor", "floor-inside"]))
    eps = draw(st.sampled_from([1e-5, 1e-6, 1e-12, 1e-3, 0.1, 0.0 if place == "inside" else 1e-5]))
    forms = ["float", "float", "float32", "tensor32", "tensor64", "full", "buffer", "buffer1"]
    made = Norm(
        shape=shape,
        dims=dims,
        centre=family == "layer",
        statistic=statistic,
        correction=correction,
        eps=eps,
        eps_place=place,
        eps_form="float" if eps == 0 else draw(st.sampled_from(forms)),
        weight=draw(st.sampled_from(["none", "w", "w", "1+w", "scalar"])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.3])),
        gate=draw(st.sampled_from(["none", "none", "none", "none", "before", "after"])),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float64"])),
    )
    return replace(made, **fixed)


# -- mutations -----------------------------------------------------------------------------------

_SQUARE = [((5, 5), (1,)), ((4, 4, 4), (2,)), ((3, 3, 3, 3), (1,))]
_LAST_OF_TWO = [((4, 6), (1,)), ((5, 5), (1,)), ((2, 3, 7), (2,)), ((4, 4, 4), (2,))]
_EPS = {"eps": 0.1, "eps_form": "float"}

MUTATIONS: dict[str, dict[str, Any]] = {
    # another tensor
    "mean-of-another": {"centre": True},
    "variance-of-another": {},
    "numerator-of-another": {},
    "statistic-of-relu": {},
    "statistic-of-weighted": {"weight": "w"},
    "statistic-of-shifted": {"bias": True},
    "statistic-of-masked": {},
    "statistic-of-half": {"places": _LAST_OF_TWO},
    "statistic-of-rounded": {},
    "statistic-of-flipped": {"places": _SQUARE},
    "masked-numerator": {},
    "x-written-between": {},
    # another dim
    "mean-over-another-dim": {"centre": True, "places": _SQUARE},
    "statistic-over-another-dim": {"places": _LAST_OF_TWO},
    "statistic-over-all": {"places": _LAST_OF_TWO},
    "wrong-axis-mean": {"centre": True, "places": _SQUARE},
    "wrong-axis-root": {"places": _SQUARE},
    "wrong-axis-weight": {"places": _SQUARE, "weight": "w"},
    # another power
    "cubed": {},
    "fourth": {},
    "first-absolute": {},
    "no-root": {},
    "fourth-root": {},
    "root-of-root": {},
    "l1-norm": {"centre": False},
    # another coefficient
    "mean-added": {"centre": True},
    "mean-twice": {"centre": True},
    "variance-plus-mean-squared": {"statistic": "variance"},
    "variance-half-mean-squared": {"statistic": "variance"},
    "variance-minus-mean": {"statistic": "variance"},
    "variance-around-bias": {"statistic": "variance", "bias": True},
    "other-correction": {"statistic": "variance"},
    "wrong-n": {},
    "n-rounded-to-float32": {},
    "addcmul-value": {"bias": True},
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
    "eps-per-row": {"places": _SQUARE},
    # affine
    "mean-not-weighted": {"centre": True, "weight": "w"},
    "two-roots": {"centre": True},
    "bias-scaled": {"bias": True},
    "weight-inside-root": {"weight": "w"},
    # gradients
    "detached-mean": {"centre": True},
    "detached-root": {},
    "no-grad-root": {},
}


# -- how it is written ---------------------------------------------------------------------------


class _Writer:
    """Writes one function. `pick` draws; `let` adds a line and returns the name of its value."""

    def __init__(self, draw: Any, norm: Norm, mutation: str, *, distributed: bool = False) -> None:
        self.distributed = distributed
        self.draw, self.norm, self.mutation = draw, norm, mutation
        self.lines: list[str] = []
        self.inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.namespace: dict[str, Any] = {}
        self.recompute = self.pick(False, False, True)
        self.cache: dict[tuple[str, str], str] = {}
        self.weight: str | None = None
        self.bias: str | None = None

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options)) if len(options) > 1 else options[0]

    def rarely(self) -> bool:
        return self.draw(st.integers(0, 7)) == 7

    def let(self, expression: str) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def is_mutation(self, *names: str) -> bool:
        return self.mutation in names

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        self.inputs[name] = (shape, dtype)
        return name

    # small pieces

    def touch(self, v: str) -> str:
        """The same numbers, sometimes through an operator that changes nothing."""
        if not self.rarely():
            return v
        return self.let(
            self.pick(
                f"{v}.clone()",
                f"{v}.contiguous()",
                f"F.dropout({v}, 0.1, False)",
                f"{v} * 1.0",
                f"{v} + 0.0",
                f"-(-{v})",
                f"{v} / 1.0",
                f"({v} * 2.0) * 0.5",
                f"{v}.type_as({v})",
                f"{v}.expand_as({v})",
            )
        )

    def mul(self, a: str, b: str) -> str:
        a, b = self.pick((a, b), (b, a))
        return self.let(
            self.pick(
                f"{a} * {b}", f"torch.mul({a}, {b})", f"{a} * {b}", f"torch.multiply({a}, {b})"
            )
        )

    def add(self, a: str, b: str) -> str:
        a, b = self.pick((a, b), (b, a))
        return self.let(
            self.pick(f"{a} + {b}", f"torch.add({a}, {b})", f"{a} - (-{b})", f"{a} + {b}")
        )

    def sub(self, a: str, b: str) -> str:
        return self.let(
            self.pick(
                f"{a} - {b}",
                f"torch.sub({a}, {b})",
                f"{a}.sub({b})",
                f"-({b} - {a})",
                f"{a} + (-{b})",
                f"torch.rsub({b}, {a})",
                f"torch.sub({a} * 2.0, {b}, alpha=2) * 0.5",
                f"torch.add({a}, {b}, alpha=-1)",
            ).replace(
                f"torch.sub({a} * 2.0, {b}, alpha=2) * 0.5",
                f"0.5 * torch.sub(2 * {a}, {b}, alpha=2)",
            )
        )

    def square(self, a: str) -> str:
        if self.is_mutation("cubed"):
            return self.let(self.pick(f"{a} ** 3", f"{a} * {a} * {a}", f"{a}.abs() ** 3"))
        if self.is_mutation("fourth"):
            return self.let(self.pick(f"{a} ** 4", f"({a} * {a}).square()"))
        if self.is_mutation("first-absolute"):
            return self.let(f"{a}.abs()")
        forms = [
            f"{a} * {a}",
            f"{a} ** 2",
            f"{a}.pow(2)",
            f"torch.square({a})",
            f"torch.pow({a}, 2.0)",
        ]
        if self.rarely():
            forms = [
                f"{a}.abs() ** 2",
                f"{a}.abs() * {a}.abs()",
                f"(-{a}) ** 2",
                f"(-{a}) * (-{a})",
                f"{a}.abs().square()",
            ]
        return self.let(self.pick(*forms))

    def dims(self) -> str:
        rank = len(self.norm.shape)
        dims = self.norm.dims
        if self.is_mutation("statistic-over-another-dim"):
            dims = (rank - 2,)
        if self.is_mutation("statistic-over-all"):
            dims = tuple(range(rank))
        given = [d - rank if self.pick(True, False) else d for d in dims]
        if len(given) == 1 and self.pick(True, False):
            return str(given[0])
        if len(given) > 1 and self.pick(True, False):
            given.reverse()
        return str(tuple(given)) if self.pick(True, False) else str(list(given))

    def keep(self, call: Callable[[str], str]) -> str:
        """A reduction with its dims kept, or dropped and put back."""
        norm = self.norm
        if (
            self.is_mutation("statistic-over-another-dim", "statistic-over-all")
            or self.pick(0, 0, 1) == 0
        ):
            return self.let(call("keepdim=True"))
        v = self.let(call("keepdim=False"))
        kept = [1 if i in norm.dims else s for i, s in enumerate(norm.shape)]
        index = ", ".join("None" if i in norm.dims else ":" for i in range(len(norm.shape)))
        options = [f"{v}.view({kept})", f"{v}.reshape({kept})", f"{v}[{index}]"]
        if len(norm.dims) == 1:
            (d,) = norm.dims
            options += [f"{v}.unsqueeze({d})", f"torch.unsqueeze({v}, {d - len(norm.shape)})"]
        if norm.dims == (len(norm.shape) - 1,):
            options += [f"{v}[..., None]"]
        return self.let(self.pick(*options))

    def number(self, value: float) -> str:
        return repr(value)

    def average(self, a: str) -> str:
        """E[a] over the dims."""
        n, dims = self.norm.n, self.dims()
        if self.is_mutation("wrong-n"):
            n = self.pick(n + 1, n - 1)
        if self.is_mutation("n-rounded-to-float32"):
            inverse = struct.unpack("f", struct.pack("f", 1 / n))[0]
            return self.mul(self.keep(lambda k: f"{a}.sum({dims}, {k})"), repr(inverse))
        forms = ["sum/n", "sum*1/n", "sum of a/n"]
        if not self.is_mutation("wrong-n"):
            forms += ["mean", "mean", "mean", "torch.mean", "-mean(-a)"]
            if self.norm.dims == (2, 3) and len(self.norm.shape) == 4:
                forms.append("pool")
        form = self.pick(*forms)
        if form == "mean":
            return self.keep(lambda k: f"{a}.mean({dims}, {k})")
        if form == "torch.mean":
            return self.keep(lambda k: f"torch.mean({a}, dim={dims}, {k})")
        if form == "-mean(-a)":
            return self.let("-" + self.keep(lambda k: f"(-{a}).mean({dims}, {k})"))
        if form == "pool":
            return self.let(f"F.adaptive_avg_pool2d({a}, 1)")
        if form == "sum of a/n":
            return self.keep(lambda k: f"({a} * {1 / n!r}).sum({dims}, {k})")
        total = self.keep(lambda k: f"{a}.sum({dims}, {k})")
        if form == "sum/n":
            return self.let(
                self.pick(
                    f"{total} / {n}",
                    f"torch.div({total}, {float(n)})",
                    f"torch.true_divide({total}, {n})",
                )
            )
        return self.mul(total, repr(1 / n))

    def mean(self, h: str) -> str:
        """E[h], once or each time anew."""
        if ("mean", h) in self.cache and not self.recompute:
            return self.cache["mean", h]
        dims = self.dims()
        if self.rarely() and not self.is_mutation("wrong-n", "n-rounded-to-float32"):
            form = self.pick("var_mean", "std_mean")
            t = self.let(f"torch.{form}({h}, {dims}, correction={self.pick(0, 1)}, keepdim=True)")
            made = self.let(f"{t}[1]")
        else:
            made = self.average(h)
        made = self.touch(made)
        if self.rarely() and not self.is_mutation("wrong-axis-mean", "statistic-of-half"):
            made = self.let(
                self.pick(f"{made}.expand_as({h})", f"{made}.expand({list(self.norm.shape)})")
            )
        self.cache["mean", h] = made
        return made

    def variance(self, h: str) -> str:
        """The variance with the norm's correction."""
        norm = self.norm
        n, c = norm.n, norm.correction
        if self.is_mutation("other-correction"):
            c = 1 - c
        odd = {
            "cubed": "centred",
            "fourth": "centred",
            "first-absolute": "centred",
            "wrong-n": "centred",
            "n-rounded-to-float32": "moments",
            "variance-plus-mean-squared": "moments",
            "variance-half-mean-squared": "moments",
            "variance-minus-mean": "moments",
            "variance-around-bias": "centred",
            "statistic-over-another-dim": "var",
            "statistic-over-all": "var",
        }
        forms = [
            "var",
            "torch.var",
            "std2",
            "var_mean",
            "std_mean",
            "centred",
            "centred",
            "moments",
            "moments",
            "half",
            "norm",
            "sums",
        ]
        form = odd.get(self.mutation) or self.pick(*forms)
        dims = self.dims()
        if form in ("var", "torch.var", "std2"):
            how = self.pick(f"correction={c}", f"unbiased={c == 1}")
            if c == 1 and self.pick(True, False):
                how = ""
            call = {
                "var": f"{h}.var({dims}, ",
                "torch.var": f"torch.var({h}, {dims}, ",
                "std2": f"{h}.std({dims}, ",
            }
            made = self.keep(lambda k: call[form] + (how + ", " if how else "") + k + ")")
            return self.square(made) if form == "std2" else made
        if form in ("var_mean", "std_mean"):
            t = self.let(f"torch.{form}({h}, {dims}, correction={c}, keepdim=True)")
            v = self.let(f"{t}[0]")
            return self.square(v) if form == "std_mean" else v
        m = self.mean(h)
        if form == "centred":
            if self.is_mutation("variance-around-bias"):
                m = self.bias or ""
            if self.mutation or self.pick(0, 0, 1) == 0:
                v = self.average(self.square(self.pick(self.sub(h, m), self.sub(m, h))))
            else:
                v = self.average(self.mul(self.sub(h, m), self.sub(h, m)))
        elif form == "half":  # E[(x - m) x]
            v = self.average(self.mul(self.sub(h, m), h))
        elif form == "norm":
            d = self.sub(h, m)
            root = self.vector_norm(d)
            if c and self.pick(True, False):
                return self.let(f"{self.square(root)} / {n - c}")
            v = self.let(
                self.pick(f"{self.square(root)} / {n}", f"({root} * {1 / math.sqrt(n)!r}) ** 2")
            )
        elif form == "sums":
            s1 = self.keep(lambda k: f"{h}.sum({dims}, {k})")
            square = self.square(h)
            s2 = self.keep(lambda k: f"{square}.sum({dims}, {k})")
            if c:
                return self.let(f"({s2} - {s1} * {s1} / {n}) / {n - c}")
            v = self.let(
                self.pick(f"({s2} - {s1} ** 2 / {n}) / {n}", f"{s2} / {n} - ({s1} / {n}) ** 2")
            )
        else:
            m2, ms = self.average(self.square(h)), self.square(m)
            if self.is_mutation("variance-plus-mean-squared"):
                v = self.add(m2, ms)
            elif self.is_mutation("variance-half-mean-squared"):
                v = self.let(f"{m2} - 0.5 * {ms}")
            elif self.is_mutation("variance-minus-mean"):
                v = self.let(f"({m2} - {m}).abs()")
            elif self.rarely():
                v = self.let(f"torch.addcmul({m2}, {m}, {m}, value=-1)")
            else:
                v = self.sub(m2, ms)
                if self.rarely():
                    v = self.let(
                        self.pick(
                            f"{v}.clamp_min(0)",
                            f"{v}.clamp(min=0.0)",
                            f"{v}.clip(0)",
                            f"{v}.abs()",
                        )
                    )
        return self.let(self.pick(f"{v} * {n / (n - c)!r}", f"{v} * {n} / {n - c}")) if c else v

    def vector_norm(self, a: str) -> str:
        dims = self.dims()
        if self.is_mutation("l1-norm"):
            return self.keep(lambda k: f"torch.linalg.vector_norm({a}, 1, {dims}, {k})")
        form = self.pick("linalg", "method", "torch")
        if form == "linalg":
            return self.keep(lambda k: f"torch.linalg.vector_norm({a}, 2, {dims}, {k})")
        if form == "method":
            return self.keep(lambda k: f"{a}.norm(2, {dims}, {k})")
        return self.keep(lambda k: f"torch.norm({a}, p=2, dim={dims}, {k})")

    def mean_square(self, h: str) -> str:
        if self.is_mutation("l1-norm"):
            return self.let(f"{self.vector_norm(h)} ** 2 / {self.norm.n}")
        odd = self.is_mutation(
            "cubed", "fourth", "first-absolute", "wrong-n", "n-rounded-to-float32"
        )
        form = "plain" if odd else self.pick("plain", "plain", "plain", "norm", "var+mean")
        if form == "norm":
            return self.let(f"{self.square(self.vector_norm(h))} / {self.norm.n}")
        if form == "var+mean":
            dims = self.dims()
            v = self.keep(lambda k: f"{h}.var({dims}, unbiased=False, {k})")
            return self.add(v, self.square(self.average(h)))
        return self.average(self.square(h))

    def statistic(self, h: str) -> str:
        norm = self.norm
        key = ("statistic", h)
        if key in self.cache and not self.recompute:
            return self.cache[key]
        if norm.statistic == "variance":
            made = self.variance(h)
        elif norm.statistic == "mean-square":
            made = self.mean_square(h)
        else:
            plain = self.pick("sum", "norm", "n*mean")
            if self.mutation:
                plain = "n*mean"
            if plain == "sum":
                square, dims = self.square(h), self.dims()
                made = self.keep(lambda k: f"{square}.sum({dims}, {k})")
            elif plain == "norm":
                made = self.square(self.vector_norm(h))
            else:
                made = self.let(f"{norm.n} * {self.mean_square(h)}")
        made = self.touch(made)
        self.cache[key] = made
        return made

    # eps

    def eps(self) -> str:
        """The eps as an expression."""
        norm = self.norm
        e = norm.eps
        form = norm.eps_form
        if form == "float":
            return repr(e)
        if form == "float32":
            return repr(norm.eps_value)
        if form in ("tensor32", "tensor64"):
            dtype = torch.float32 if form == "tensor32" else torch.float64
            self.namespace["EPS"] = torch.tensor(e, dtype=dtype)
            return "EPS"
        if form == "full":
            return self.pick(
                f"torch.full((), {e!r})",
                f"h.new_full((), {e!r})",
                f"torch.full([], {e!r}, dtype=torch.float64)",
            )
        self.input("e", () if form == "buffer" else (1,), torch.float32)
        return "e"

    def add_eps(self, s: str) -> str:
        if self.norm.eps == 0:
            return s
        e = self.eps()
        if self.is_mutation("eps-doubled"):
            e = f"(2 * {e})"
        if self.is_mutation("eps-subtracted"):
            return self.let(f"({s} - {e}).abs()")
        if self.is_mutation("eps-multiplied"):
            return self.let(self.pick(f"{s} * (1 + {e})", f"{s} * {e}", f"{s} + {s} * {e}"))
        if e[0].isdigit():
            return self.let(
                self.pick(
                    f"{s} + {e}",
                    f"{e} + {s}",
                    f"{s}.add({e})",
                    f"torch.add({s}, {e})",
                    f"{s} - (-{e})",
                )
            )
        forms = [f"{s} + {e}", f"{e} + {s}", f"torch.add({s}, {e})"]
        if self.norm.eps_form != "full":  # new_full reads x, and so its number does not stand alone
            forms.append(f"{s} - (-{e})")
        return self.let(self.pick(*forms))

    def floor(self, s: str) -> str:
        e = self.eps()
        if self.is_mutation("eps-doubled"):
            e = f"({e} * 2)"
        if self.is_mutation("eps-ceiling"):
            return self.let(f"{s}.clamp(max={e})")
        if self.is_mutation("eps-multiplied"):
            return self.let(f"{s} * {e}")
        if e[0].isdigit() or e[0] == "(":
            return self.let(
                self.pick(
                    f"{s}.clamp_min({e})",
                    f"{s}.clamp(min={e})",
                    f"{s}.clip({e})",
                    f"torch.clip({s}, min={e})",
                    f"torch.clamp({s}, {e})",
                )
            )
        t = self.let(f"{e}.to({s}.dtype)") if self.pick(True, False) else e
        return self.let(
            self.pick(
                f"torch.maximum({s}, {t})",
                f"torch.maximum({t}, {s})",
                f"torch.clamp_min({s}, {t})",
                f"{s}.clamp(min={t})",
                f"{s}.clip(min={t})",
            )
        )

    def root(self, h: str) -> tuple[str, str]:
        """The denominator, or its inverse: ("root" or "inverse", name)."""
        norm = self.norm
        place = norm.eps_place
        if self.is_mutation("eps-moved"):
            place = self.pick(*({"inside", "outside", "floor"} - {place}))
        if self.is_mutation("eps-in-both-places"):
            q = self.add_eps(self.statistic(h))
            return "root", self.let(f"{q}.sqrt() + {norm.eps!r}")
        if place in ("inside", "floor-inside"):
            s = self.statistic(h)
            if self.is_mutation("weight-inside-root"):
                s = self.let(f"{s} * {self.weight}.square()")
            q = self.add_eps(s) if place == "inside" else self.floor(s)
            q = self.touch(q)
            return self.inverse_root(q)
        direct = norm.statistic == "variance" and not norm.correction and not self.mutation
        if direct and self.pick(True, False):
            dims = self.dims()
            root = self.keep(lambda k: f"{h}.std({dims}, unbiased=False, {k})")
        elif norm.statistic == "sum-square" and not self.mutation and self.pick(True, True, False):
            root = self.vector_norm(h)
        else:
            root = self.square_root(self.statistic(h))
        root = self.add_eps(root) if place == "outside" else self.floor(root)
        if self.is_mutation("no-root"):
            root = self.let(f"{root} ** 2")
        if self.is_mutation("fourth-root", "root-of-root"):
            root = self.let(f"{root}.sqrt()")
        return self.pick(
            ("root", root),
            ("root", root),
            (
                "inverse",
                self.let(self.pick(f"1 / {root}", f"{root}.reciprocal()", f"{root} ** -1")),
            ),
        )

    def square_root(self, q: str) -> str:
        return self.let(
            self.pick(f"torch.sqrt({q})", f"{q}.sqrt()", f"{q} ** 0.5", f"torch.pow({q}, 0.5)")
        )

    def inverse_root(self, q: str) -> tuple[str, str]:
        if self.is_mutation("no-root"):
            return self.pick(("root", q), ("inverse", self.let(f"1 / {q}")))
        if self.is_mutation("fourth-root"):
            return "inverse", self.let(
                self.pick(f"{q} ** -0.25", f"{q}.sqrt().sqrt().reciprocal()")
            )
        if self.is_mutation("root-of-root"):
            return "inverse", self.let(f"torch.rsqrt(torch.rsqrt({q}))")
        form = self.pick(
            "rsqrt",
            "rsqrt",
            "1/sqrt",
            "pow",
            "reciprocal",
            "root",
            "root",
            "q^-1 sqrt",
            "sqrt(1/q)",
        )
        if form == "root":
            return "root", self.square_root(q)
        made = {
            "rsqrt": self.pick(f"torch.rsqrt({q})", f"{q}.rsqrt()"),
            "1/sqrt": f"1.0 / {q}.sqrt()",
            "pow": self.pick(f"{q} ** -0.5", f"torch.pow({q}, -0.5)"),
            "reciprocal": self.pick(
                f"torch.reciprocal(torch.sqrt({q}))",
                f"{q}.sqrt().reciprocal()",
                f"{q}.sqrt() ** -1",
            ),
            "sqrt(1/q)": self.pick(f"(1 / {q}).sqrt()", f"{q}.reciprocal().sqrt()"),
            "q^-1 sqrt": f"{q}.sqrt() / {q}",
        }[form]
        return "inverse", self.let(made)

    # the whole

    def operand(self, name: str) -> str:
        """A weight or bias, brought into a shape that broadcasts."""
        norm = self.norm
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[
            norm.dtype
        ]
        shape = affine_shape(norm)
        self.input(name, shape, dtype)
        view = _weight_view(norm)
        rank = len(norm.shape)
        if view == shape:
            made = (
                name
                if not self.rarely()
                else self.let(f"{name}.view({[1] * (rank - len(shape)) + list(shape)})")
            )
        else:
            index = ", ".join([":"] + ["None"] * (len(view) - 1))
            made = self.let(
                self.pick(
                    f"{name}.view({list(view)})",
                    f"{name}[{index}]",
                    f"{name}.reshape(1, -1{', 1' * (rank - 2)})",
                    f"{name}[None, {index}]",
                )
            )
        if self.is_mutation("wrong-axis-weight") and name == "w":
            made = self.let(
                f"{name}.view({[-1] + [1] * (rank - 1)})"
                if norm.dims == (rank - 1,)
                else f"{name}.view([1] * {rank - 1} + [-1])"
            )
        if norm.dtype == "bfloat16" and self.pick(True, False):
            made = self.let(f"{made}.float()")
        return made

    def write(self) -> Program:
        norm = self.norm
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[
            norm.dtype
        ]
        name = f"torch.{norm.dtype}"
        x = self.input("x", norm.shape, dtype)
        if norm.gate != "none" or self.is_mutation(
            "mean-of-another", "variance-of-another", "numerator-of-another"
        ):
            self.input("z", norm.shape, dtype)
        bias = self.operand("b") if norm.bias else None
        weight = None
        if norm.weight == "scalar":
            weight = self.input("w", self.pick((), (1,)), dtype)
        elif norm.weight != "none":
            weight = self.operand("w")
        if weight is not None and norm.weight == "1+w":
            weight = self.let(
                self.pick(
                    f"1 + {weight}",
                    f"{weight} + 1.0",
                    f"torch.add({weight}, 1)",
                    f"1.0 - (-{weight})",
                )
            )
        self.weight, self.bias = weight, bias
        if norm.gate == "before":
            x = self.let(f"{x} * F.silu(z)")
        source = x
        if norm.dtype == "bfloat16":
            source = self.let(
                self.pick(
                    f"{x}.float()",
                    f"{x}.to(torch.float32)",
                    f"{x}.to(torch.float64)",
                    f"{x}.clone()",
                )
            )
        elif self.rarely():
            source = self.let(self.pick(f"{x}.double()", f"{x}.to({name})"))
        self.lines.append(f"h = {source}")
        y = self.body("h", weight, bias, name)
        if norm.gate == "after":
            y = self.mul(y, "F.silu(z)")
        y = self.touch(y)
        if self.pick(True, False):
            y = self.let(self.pick(f"{y}.to({name})", f"{y}.to(x.dtype)", f"{y}.type_as(x)"))
        returned = y
        extra = list(self.cache.values())
        if not self.mutation and extra and self.rarely():
            returned = f"{y}, {self.pick(*extra)}"
        arguments = ", ".join(self.inputs)
        body = "\n    ".join(line for line in self.lines if line != "pass")
        text = f"def f({arguments}):\n    {body}\n    return {returned}\n"
        grad = self.is_mutation("detached-mean", "detached-root", "no-grad-root") or self.rarely()
        if self.is_mutation("x-written-between"):  # autograd itself refuses some of these
            grad = False
        return Program(norm, text, self.inputs, self.namespace, self.mutation, grad)

    def body(self, h: str, weight: str | None, bias: str | None, name: str) -> str:
        norm = self.norm
        s = self.other(h)  # what the statistics are taken of
        normalize = (
            norm.statistic == "sum-square"
            and norm.eps_place == "floor"
            and norm.eps_form in ("float", "float32")
            and len(norm.dims) == 1
            and not self.mutation
        )
        kind, r = "", ""
        if normalize and self.pick(True, True, False):
            y = self.let(f"F.normalize({h}, dim={norm.dims[0]}, eps={self.eps()})")
            y = self.let(f"{y} * {norm.scale}") if norm.scale != 1 else y
            return self.affine(y, weight, bias, name)
        m = self.mean(s) if norm.centre else None
        if self.is_mutation("mean-of-another"):
            m = self.mean("z.to(h.dtype)")
        if self.is_mutation("mean-over-another-dim"):
            d = self.pick(*[i for i in range(len(norm.shape)) if i not in norm.dims])
            m = self.let(f"{h}.mean({d}, keepdim=True)")
        if self.is_mutation("wrong-axis-mean"):
            m = self.wrong_axis(m)
        if self.is_mutation("detached-mean"):
            m = self.let(
                self.pick(f"{m}.detach()", f"{h}.detach().mean({norm.dims}, keepdim=True)")
            )
        if self.is_mutation("no-grad-root"):
            start = len(self.lines)
            saved = dict(self.cache)
            self.cache = {}
            kind, r = self.root(s)
            self.lines[start:] = [
                "with torch.no_grad():\n        " + "\n        ".join(self.lines[start:])
            ] + ["pass"] * (len(self.lines) - start)
            self.cache = saved
        else:
            kind, r = self.root(s)
        if self.is_mutation("detached-root"):
            r = self.let(f"{r}.detach()")
        if self.is_mutation("wrong-axis-root"):
            r = self.wrong_axis(r)
        if self.is_mutation("eps-per-row"):
            rows = [1] * len(norm.shape)
            rows[norm.dims[-1]] = -1
            extra = f"torch.linspace(1, 2, {norm.shape[norm.dims[-1]]}).view({rows})"
            r = self.let(f"{r} + {extra}")
        r = self.touch(r)
        if norm.dtype != "bfloat16" and self.rarely():
            r = self.let(f"{r}.to({name})")
        num = h
        if self.is_mutation("numerator-of-another"):
            num = self.let("z + 0.0")
        if self.is_mutation("masked-numerator"):
            num = self.let(f"torch.where({h} > 0, {h}, 0.0)")
        if self.is_mutation("eps-in-numerator"):
            num = self.let(f"{h} + {norm.eps!r}")
        if self.is_mutation("x-written-between"):
            self.lines.append(self.pick("h.add_(1)", "h.mul_(2)", "h[0] = 1.0"))
            self.lines.append("pass")
        c = norm.scale
        if self.is_mutation("mean-not-weighted"):
            wr = self.mul(weight or "", r) if kind == "inverse" else self.let(f"{weight} / {r}")
            mr = self.mul(m or "", r) if kind == "inverse" else self.let(f"{m} / {r}")
            y = self.sub(self.mul(num, wr), mr)
            y = self.let(f"{y} * {c}") if c != 1 else y
            return self.affine(y, None, bias, name)
        if self.is_mutation("two-roots"):
            wr = self.mul(num, r) if kind == "inverse" else self.let(f"{num} / {r}")
            mr = self.mul(m or "", r) if kind == "inverse" else self.let(f"{m} / {r}")
            y = self.let(f"{wr} - {mr} * 1.001")
            y = self.let(f"{y} * {c}") if c != 1 else y
            return self.affine(y, weight, bias, name)
        if self.distributed and m is not None:
            r = r if kind == "inverse" else self.let(f"1 / {r}")
            a = self.mul(weight, r) if weight else r
            a = self.let(f"{a} * {c}") if c != 1 else a
            shift = self.mul(m or "", a)
            form = self.pick("a*x + (b - m*a)", "(a*x - m*a) + b", "addcmul")
            if form == "a*x + (b - m*a)":
                tail = self.sub(bias, shift) if bias else self.let(f"-{shift}")
                return self.add(self.mul(num, a), tail)
            if form == "addcmul":
                tail = self.sub(bias, shift) if bias else self.let(f"-{shift}")
                return self.let(f"torch.addcmul({tail}, {num}, {a})")
            y = self.sub(self.mul(num, a), shift)
            return self.add(y, bias) if bias else y
        if norm.centre:
            num = self.centred(num, m or "")
        num = self.touch(num)
        early = weight is not None and self.pick(0, 0, 0, 1) == 1
        if early:  # the weight before the root
            side = self.pick("num", "root")
            if side == "num" or kind == "root":
                num = self.mul(num, weight or "")
            else:
                r = self.mul(r, weight or "")
        if c != 1 and self.pick(True, False):
            num, c = self.let(self.pick(f"{num} * {c}", f"{c} * {num}", f"{num} / {1 / c!r}")), 1.0
        if self.is_mutation("floor-division"):
            y = self.let(f"torch.div({num}, {r}, rounding_mode='floor')")
        elif kind == "inverse":
            y = self.mul(num, r)
        else:
            y = self.let(
                self.pick(
                    f"{num} / {r}",
                    f"torch.div({num}, {r})",
                    f"{num} * (1 / {r})",
                    f"{num} / {r}",
                    f"{num}.divide({r})",
                )
            )
        y = self.touch(y)
        if c != 1:
            y = self.let(self.pick(f"{y} * {c}", f"{c} * {y}"))
        return self.affine(y, None if early else weight, bias, name)

    def centred(self, h: str, m: str) -> str:
        if self.is_mutation("mean-added"):
            return self.add(h, m)
        if self.is_mutation("mean-twice"):
            return self.let(f"{h} - 2 * {m}")
        if self.is_mutation("lerp-off"):
            return self.let(f"2 * ({h} - torch.lerp({h}, {m}.to({h}.dtype), 0.25))")
        if self.rarely():
            return self.let(f"2 * ({h} - torch.lerp({h}, {m}.to({h}.dtype), 0.5))")
        return self.sub(h, m)

    def affine(self, y: str, weight: str | None, bias: str | None, name: str) -> str:
        if self.rarely():
            y = self.let(self.pick(f"{y}.to({name})", f"{y}.type_as(x)"))
        if self.is_mutation("addcmul-value") and weight and bias:
            return self.let(f"torch.addcmul({bias}, {y}, {weight}, value=2)")
        if self.is_mutation("addcmul-value"):
            return self.let(f"torch.add({y} * {weight or 1.0}, {bias}, alpha=2)")
        if self.is_mutation("bias-scaled") and bias:
            y = self.add(y, bias)
            return self.mul(y, weight) if weight else self.let(f"{y} * 3.0")
        if weight and self.norm.weight == "1+w" and "w" in self.inputs and self.rarely():
            y = self.let(f"{y} + {y} * ({weight} - 1)")
            weight = None
        if weight and bias and self.rarely():
            return self.let(f"torch.addcmul({bias}, {y}, {weight})")
        y = self.mul(y, weight) if weight else y
        return self.add(y, bias) if bias else y

    def other(self, h: str) -> str:
        """What a mutation takes the statistics of, in place of h."""
        norm = self.norm
        rank = len(norm.shape)
        forms = {
            "variance-of-another": "z.to(h.dtype)",
            "statistic-of-relu": f"F.relu({h})",
            "statistic-of-weighted": f"{h} * {self.weight}",
            "statistic-of-shifted": f"{h} + {self.bias}",
            "statistic-of-masked": self.pick(
                f"torch.where({h} > 0, {h}, 0.0)",
                f"{h} * ({h} > 0)",
                f"{h}.masked_fill({h} > 0, 0.0)",
            ),
            "statistic-of-half": f"{h}[..., : {max(norm.shape[-1] // 2, 2)}]",
            "statistic-of-rounded": self.pick(
                f"({h} * 4).to(torch.int32).to({h}.dtype)", f"{h}.round()", f"(10 * {h}).floor()"
            ),
            "statistic-of-flipped": self.pick(
                f"{h}.transpose({rank - 2}, {rank - 1})",
                f"{h}.transpose(0, 1)",
                f"{h}.reshape(-1).reshape({list(reversed(norm.shape))}).mT",
            ),
        }
        made = forms.get(self.mutation)
        return h if made is None else self.let(made)

    def wrong_axis(self, v: str | None) -> str:
        """A kept statistic laid along the dim that it was reduced over."""
        d = self.norm.dims[-1]
        return self.let(self.pick(f"{v}.transpose({d}, {d - 1})", f"{v}.transpose({d}, 0)"))


@st.composite
def spellings(draw: Any) -> Program:
    """A normalization and a way to write it."""
    distributed = draw(st.integers(0, 7)) == 7
    return _Writer(draw, draw(norms()), "", distributed=distributed).write()


@st.composite
def distributed_spellings(draw: Any) -> Program:
    """The same, multiplied out: x * (w*r) + (b - m*w*r)."""
    return _Writer(draw, draw(norms(centre=True)), "", distributed=True).write()


@st.composite
def mutants(draw: Any) -> Program:
    """A way to write a normalization with one thing broken."""
    mutation = draw(st.sampled_from(sorted(MUTATIONS)))
    fixed = dict(MUTATIONS[mutation])
    if fixed.get("statistic") == "variance":
        fixed["centre"] = True
    return _Writer(draw, draw(norms(**fixed)), mutation).write()
