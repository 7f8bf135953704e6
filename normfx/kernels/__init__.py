"""Kernels: the one table of what Triton source there is, and where it may run.

Nothing here imports Triton before `kernels()` is called, and without Triton the table is empty:
everything then goes to Inductor. A row of the table says what a kernel supports; the selector
(`normfx.kernels.select`) asks it, and times the kernel against what Inductor generates.

How a kernel is made from a `NormSpec`: its Triton source is plain code with constants, and the
constants come from the spec (`generate.py`). Triton compiles one program for each set of them, in
which nothing is left of what the spec does not ask for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from normfx.ops import NormSpec

if TYPE_CHECKING:
    from normfx.kernels.offline import Build

Supports = Callable[[NormSpec, int, torch.dtype, torch.device], str]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: of the operator, below `torch.ops.normfx`.
        computes: the equation, for docs/kernels.md.
        limits: what it does not take, for docs/kernels.md.
        supports: why a (spec, size of the last dim, dtype of x, device) is not supported, or "".
        builds: every configuration that is compiled offline, for one target.
    """

    name: str
    computes: str
    limits: str
    supports: Supports
    builds: Callable[[], Iterable[Build]]


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def kernels() -> tuple[Kernel, ...]:
    """The table; empty without Triton. The operators of its kernels exist after this call."""
    if not has_triton():
        return ()
    from normfx.kernels import channel, linear, row  # noqa: F401 (registers the operators)
    from normfx.kernels.channel_table import CHANNEL_KERNELS
    from normfx.kernels.linear_table import LINEAR_KERNELS
    from normfx.kernels.row_table import ROW_KERNELS

    return (*ROW_KERNELS, *LINEAR_KERNELS, *CHANNEL_KERNELS)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1, set before its import."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def runs_on(x: torch.Tensor) -> bool:
    """Whether a kernel is launched on a tensor, or else its body in plain torch is run.

    It is on a GPU. On a CPU it is only in the interpreter and only for a tensor with numbers in it:
    what is traced on a CPU is the body in plain torch.
    """
    if x.device.type == "cuda":
        return True
    has_numbers = type(x) in (torch.Tensor, nn.Parameter) and not torch._is_functional_tensor(x)
    return x.device.type == "cpu" and has_numbers and interpreted()
