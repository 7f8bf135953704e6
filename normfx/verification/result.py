"""Result: what `normfx.verify` found, as values, as a table, as JSON and as a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normfx import pages


@dataclass(frozen=True, slots=True)
class Measured:
    """How far a graph is from the original, in the worst of its tensors.

    Attributes:
        tensor: the output, written input or gradient that is worst.
        ulp: the largest distance from the original in float64, in units in the last place.
        relative: the same as a share of the largest value.
        eager_ulp: that of the original model itself in its own dtype.
        meaning: the largest relative distance where both run in float64: what rounding does not
            explain; or None where the graph could not be run so.
        problem: what no distance says (NaN at another place, another shape), or "".
    """

    tensor: str = ""
    ulp: float = 0.0
    relative: float = 0.0
    eager_ulp: float = 0.0
    meaning: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage on one variant of the inputs.

    Attributes:
        stage: "capture", ..., "lower", and "inductor" for the compiled code.
        variant: of the inputs: "given", or a harder one.
        verdict: "ok"; "unchanged": the graph is that of the stage before; "approximate": some norms
            became others, as asked for; "violation": the contract does not hold; "not run".
        measured: the errors; None where nothing was run.
        detail: why it was not run, or what is violated.
    """

    stage: str
    variant: str
    verdict: str
    measured: Measured | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SiteResult:
    """One norm after one stage, on the inputs as given.

    Attributes:
        site: its key in the report; `norm#1` is the second of a name.
        stage: the stage.
        at: the value that was compared: the norm's, or the nearest after it that a rule kept.
        ulp: its distance from the original in float64, in units in the last place.
        relative: the same as a share of the largest value.
        eager_ulp: that of the original model itself.
    """

    site: str
    stage: str
    at: str
    ulp: float
    relative: float
    eager_ulp: float


@dataclass(frozen=True, slots=True)
class Blame:
    """The first rewrite that leaves the contract.

    Attributes:
        graph: the name of the graph.
        stage: the stage.
        rule: the rule, or the stage's name where it is none of them.
        site: the key of the norm, or "" if it is no single one.
        location: `file:line` of the user's line, or "".
        variant: the inputs that show it.
        tensor: the tensor that shows it most.
        detail: the error and what is allowed.
    """

    graph: str
    stage: str
    rule: str
    site: str
    location: str
    variant: str
    tensor: str
    detail: str

    @property
    def skip(self) -> str:
        """What the option `skip` needs to leave this rewrite out, or ""."""
        return f"{self.rule}@{self.site}" if self.site else ""


@dataclass(slots=True)
class GraphResult:
    """One graph of the model.

    Attributes:
        name: "graph 0", ...
        training: whether gradients were compared too.
        norms: how many were found.
        calls: how often it ran.
        fallback: why it was left to Inductor, or "".
        stages: every stage on every variant.
        sites: every norm after every stage.
        approximate: norms that became others, as asked for (by statistics, say).
        blamed: the first rewrite that leaves the contract, or None.
    """

    name: str
    training: bool = False
    norms: int = 0
    calls: int = 0
    fallback: str = ""
    stages: list[StageResult] = field(default_factory=list)
    sites: list[SiteResult] = field(default_factory=list)
    approximate: list[str] = field(default_factory=list)
    blamed: Blame | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """What `normfx.verify` found.

    Attributes:
        graphs: one entry for each graph that dynamo made of the model.
    """

    graphs: tuple[GraphResult, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every stage of every graph keeps the contract."""
        return not self.violations

    @property
    def violations(self) -> list[StageResult]:
        """The stages that do not keep it."""
        return [s for graph in self.graphs for s in graph.stages if s.verdict == "violation"]

    @property
    def blamed(self) -> list[Blame]:
        """The first rewrite of each graph that leaves the contract."""
        return [graph.blamed for graph in self.graphs if graph.blamed is not None]

    def to_json(self) -> str:
        """Everything as JSON text; a number that is not finite is a string."""
        held = {"ok": self.ok, "graphs": [asdict(graph) for graph in self.graphs]}
        return json.dumps(_finite(held), indent=1)

    def to_html(self, path: str | Path) -> Path:
        """Writes one page that needs no network, and returns its path."""
        return pages.write(path, "verify", verification=self, number=number)

    def __str__(self) -> str:
        from normfx.verification.table import render

        return render(self)


def number(held: float | None) -> str:
    """A number for people."""
    return "-" if held is None else f"{held:.3g}"


def _finite(held: Any) -> Any:
    if isinstance(held, dict):
        return {key: _finite(value) for key, value in held.items()}
    if isinstance(held, (list, tuple)):
        return [_finite(value) for value in held]
    return str(held) if isinstance(held, float) and not math.isfinite(held) else held
