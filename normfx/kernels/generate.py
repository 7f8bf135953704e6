"""The form of a row kernel: what a `NormSpec` and its neighbours leave to compute for one row.

A kernel is one Triton source, and Triton compiles it anew for every set of constants. So a kernel
is generated from a norm by giving its constants: `RowForm.of` takes them from a `NormSpec`, and
`RowForm.constants` hands them to the source. An operator of torch takes the form as text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch

from normfx.ops import NormSpec

STATISTICS = ("variance", "mean-square", "sum-square", "compressed")
EPS_PLACES = ("inside", "outside", "floor", "floor-inside")
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu-tanh", "sigmoid")
GATES = ("none", "before", "after", "swish")
QUANTISED = {"none": 0.0, "float8_e4m3fn": 448.0, "int8": 127.0}


@dataclass(frozen=True, slots=True)
class RowForm:
    """y = act(scale * (t - centre*mean) / root * (weight + weight_offset) + bias), for each row.

    | gate | what it does (z is the gate) |
    | --- | --- |
    | before | x * silu(z) is normalized |
    | after | the result is multiplied by silu(z) |
    | swish | t = x * sigmoid(z * x), with one z a column, is divided by the root of x |

    Attributes:
        statistic: as in `NormSpec`: one of `STATISTICS`.
        centre: as in `NormSpec`.
        correction: as in `NormSpec`.
        eps: as in `NormSpec`; float32 in the kernel.
        eps_place: as in `NormSpec`.
        scale: a number in front.
        weight_offset: what is added to the weight (1.0 for a weight that is stored as w - 1).
        norm_dtype: what the normalized value is rounded to before the weight.
        out_dtype: of the result, or "" for the dtype of the input.
        activation: applied to the result: one of `ACTIVATIONS`.
        gate: how a gate enters: one of `GATES`.
        quantise: the dtype of a quantised result: one of `QUANTISED`.
        block: how many columns share a scale of the quantised result; 0: all of a row.
    """

    statistic: str = "variance"
    centre: bool = True
    correction: int = 0
    eps: float = 1e-5
    eps_place: str = "inside"
    scale: float = 1.0
    weight_offset: float = 0.0
    norm_dtype: str = "float32"
    out_dtype: str = ""
    activation: str = "none"
    gate: str = "none"
    quantise: str = "none"
    block: int = 0

    @classmethod
    def of(cls, spec: NormSpec) -> RowForm | None:
        """The form of a norm over the last dim, or None if it is none of this family."""
        plain = not (spec.groups or spec.prefix or spec.beyond or spec.window)
        if (
            spec.statistic not in STATISTICS
            or spec.eps_place not in EPS_PLACES
            or spec.eps is None
            or spec.stats_dtype != torch.float32
            or not plain
        ):
            return None
        return cls(
            statistic=spec.statistic,
            centre=spec.centre,
            correction=spec.correction,
            eps=float(spec.eps),
            eps_place=spec.eps_place,
            scale=spec.scale,
            norm_dtype=dtype_name(spec.norm_dtype),
            out_dtype=dtype_name(spec.out_dtype),
        )

    @property
    def needs_mean(self) -> bool:
        """Whether the mean of a row is computed."""
        return self.centre or self.statistic in ("variance", "compressed")

    @property
    def text(self) -> str:
        """What differs from the defaults, as JSON: the argument of an operator."""
        mine = asdict(self)
        return json.dumps({f.name: mine[f.name] for f in fields(self) if mine[f.name] != f.default})

    @staticmethod
    @cache
    def parse(text: str) -> RowForm:
        """The form of a text.

        Raises:
            ValueError: a name or a value is unknown.
        """
        form = RowForm(**json.loads(text))
        for value, known in (
            (form.statistic, STATISTICS),
            (form.eps_place, EPS_PLACES),
            (form.activation, ACTIVATIONS),
            (form.gate, GATES),
            (form.quantise, tuple(QUANTISED)),
        ):
            if value not in known:
                raise ValueError(f"form of a row kernel: expected one of {known}, got {value!r}.")
        return form

    def constants(self) -> dict[str, Any]:
        """The constants of the Triton source that depend on the form alone."""
        return {
            "STATISTIC": self.statistic,
            "CENTRE": self.centre,
            "MEAN": self.needs_mean,
            "CORRECTION": self.correction,
            "EPS": self.eps,
            "EPS_PLACE": self.eps_place,
            "SCALE": self.scale,
            "WEIGHT_OFFSET": self.weight_offset,
            "NORM_DTYPE": self.norm_dtype,
            "ACTIVATION": self.activation,
            "GATE": self.gate,
        }


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """torch.float32 for `float32`."""
    return getattr(torch, name)
