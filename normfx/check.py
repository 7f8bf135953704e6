"""Check: each canonical node against the region it replaced, in float64 on random inputs.

A debugging aid and a test: recognition proves an identity of polynomials, and this runs both sides
of it. It needs the graph before recognition, so it is called from an observer of the pipeline
(`pipeline.rewrite(observe=...)`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from normfx import graph as g
from normfx.ops import NormSpec, norm
from normfx.torch_internals import is_symbolic


@dataclass(frozen=True, slots=True)
class Checked:
    """One comparison.

    Attributes:
        node: the canonical node's name.
        kind: of the norm.
        error: largest difference relative to the largest value of the region, or None if it could
            not be run.
        reason: why it could not be run.
    """

    node: str
    kind: str
    error: float | None
    reason: str = ""


class RegionCheck:
    """An observer: keeps the captured graph, and compares when the recognised one comes.

    Attributes:
        results: one entry for each canonical node.
    """

    def __init__(self, seed: int = 0) -> None:
        self.results: list[Checked] = []
        self._seed = seed
        self._before: fx.Graph | None = None

    def __call__(self, stage: str, module: fx.GraphModule) -> None:
        """Takes a stage's graph."""
        if stage == "capture":
            self._before = copy.deepcopy(module.graph)
            self._before.owning_module = module
        elif stage == "recognise" and self._before is not None:
            before = {node.name: node for node in self._before.nodes}
            for node in module.graph.find_nodes(op="call_function", target=norm):
                self.results.append(self._compare(node, before, module))

    def _compare(
        self, node: fx.Node, before: dict[str, fx.Node], module: fx.GraphModule
    ) -> Checked:
        spec: Any = node.kwargs["spec"]
        kind: str = spec.kind
        last = before.get(node.meta["normfx_region"])
        if last is None:
            return Checked(
                node.name, kind, None, "the region's last node is not in the captured graph"
            )
        inputs = _frontier(node, before)
        values = _Values(self._seed, module)
        try:
            got = values.of(node, stop=inputs)
            want = values.of(last, stop=inputs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return Checked(node.name, kind, None, f"{type(error).__name__}: {error}"[:200])
        scale = want.abs().amax().clamp_min(1e-300) if want.numel() else torch.ones(())
        error = float((got - want).abs().amax() / scale) if want.numel() else 0.0
        return Checked(node.name, kind, error)


def _frontier(node: fx.Node, before: dict[str, fx.Node]) -> set[str]:
    """The names of the captured values that a canonical node is made from."""
    found: set[str] = set()
    pending = list(node.all_input_nodes)
    while pending:
        current = pending.pop()
        if current.name in before:
            found.add(current.name)
        else:
            pending += current.all_input_nodes
    return found


class _Values:
    """Values of nodes in float64: random where a graph begins, computed from there on."""

    def __init__(self, seed: int, module: fx.GraphModule) -> None:
        self._seed, self._module = seed, module
        self._random: dict[str, Any] = {}

    def of(self, node: fx.Node, *, stop: set[str]) -> torch.Tensor:
        """The value of a node, computed from the values at which to stop."""
        known: dict[fx.Node, Any] = {}
        pending = [node]
        while pending:
            current = pending[-1]
            if current in known:
                pending.pop()
            elif (
                (current.name in stop and current is not node)
                or current.op == "placeholder"
                or is_symbolic(g.value(current))
            ):
                known[current] = self._drawn(current)
            elif missing := [i for i in current.all_input_nodes if i not in known]:
                pending += missing
            else:
                known[current] = self._run(current, known)
        return known[node]

    def _run(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            held = getattr(self._module, str(node.target))
            return held.double() if held.is_floating_point() else held
        target: Any = node.target
        args, kwargs = in_float64(map_arg((node.args, node.kwargs), lambda n: known[n]))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad():
                return target(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    def _drawn(self, node: fx.Node) -> Any:
        """A positive random tensor with a value's shape: positive, since it may be a variance."""
        if node.name not in self._random:
            held = g.value(node)
            if not isinstance(held, torch.Tensor):
                hint = getattr(getattr(held, "node", None), "hint", None)
                self._random[node.name] = held if hint is None else hint
            else:
                generator = torch.Generator().manual_seed(self._seed + len(self._random))
                sizes = [int(size) for size in held.shape]
                drawn = torch.rand(sizes, generator=generator, dtype=torch.float64) + 0.25
                self._random[node.name] = (
                    drawn if held.is_floating_point() else drawn.to(held.dtype)
                )
        return self._random[node.name]


def in_float64(held: Any) -> Any:
    """Arguments with every floating-point dtype among them replaced by float64."""
    if isinstance(held, torch.dtype):
        return torch.float64 if held.is_floating_point else held
    if isinstance(held, NormSpec):
        return NormSpec(*map(in_float64, held))
    if isinstance(held, (tuple, list)):
        return type(held)(map(in_float64, held))
    if isinstance(held, dict):
        return {key: in_float64(value) for key, value in held.items()}
    return held
