"""Random spellings of a normalization, as Python source, and mutations that break exactly one thing in them.

`spellings()` draws a `Norm` (what is computed) and then a `Program` (one way to write it): a straight-line function
over torch operators, in text, so that a failing example prints as a repro. It runs eagerly and can be traced.
`mutants()` draws the same with one thing broken. Nothing here is imported from normfx.

| file | is |
| --- | --- |
| spellings/norms.py | what is computed, and its formula in float64 |
| spellings/text.py | lines, products, sums, squares |
| spellings/layouts.py | x viewed and permuted, statistics brought back to it |
| spellings/statistics.py | means, squares, variances, eps, roots |
| spellings/writer.py | the whole function |
| spellings/mutations.py | what may be broken |
| spellings/gaps.py | what is not drawn, because it is not recognised |
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from spellings.gaps import GAPS
from spellings.mutations import GRADIENTS, MUTATIONS
from spellings.norms import Norm, canonical, condition, members, norms, reference
from spellings.program import Program
from spellings.writer import Writer

__all__ = [
    "GAPS",
    "GRADIENTS",
    "MUTATIONS",
    "Norm",
    "Program",
    "canonical",
    "condition",
    "distributed_spellings",
    "members",
    "mutants",
    "reference",
    "spellings",
]


@st.composite
def spellings(draw: Any) -> Program:
    """A normalization and a way to write it."""
    distributed = draw(st.integers(0, 7)) == 7
    return Writer(draw, draw(norms()), "", distributed=distributed).write()


@st.composite
def distributed_spellings(draw: Any) -> Program:
    """The same, multiplied out: x * (w*r) + (b - m*w*r)."""
    return Writer(draw, draw(norms(centre=True)), "", distributed=True).write()


@st.composite
def mutants(draw: Any) -> Program:
    """A way to write a normalization with one thing broken."""
    mutation = draw(st.sampled_from(sorted(MUTATIONS)))
    fixed = {k: v for k, v in MUTATIONS[mutation].items() if k not in ("layout", "divided")}
    return Writer(draw, draw(norms(**fixed)), mutation).write()
