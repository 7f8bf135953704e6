"""A spelling: a straight-line function over torch operators, in text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from spellings.norms import Norm


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
        title = f"\n# {self.norm}\n# {shapes} {self.namespace} mutation={self.mutation!r}"
        return f"{title} grad={self.grad}\n{self.source}"

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
