"""What a call costs beside the compiled code: the check of every folded parameter.

    python -m benchmarks.call_overhead

A callable that does nothing is called with and without the check, alternating; medians of the
difference.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import fx

from benchmarks.machine import machine
from normfx.live import LiveWeights
from normfx.passes.hoist import Hoisted

CALLS, ROUNDS = 2000, 25


def _nothing(*_: Any) -> None:
    return None


def _double(parameters: int) -> Hoisted:
    """A hoisted graph that doubles the first of its parameters."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"p{i}") for i in range(parameters)]
    graph.output((graph.call_function(torch.mul, (inputs[0], 2.0)),))
    value = torch.empty(4)
    return Hoisted(fx.GraphModule({}, graph), tuple(range(parameters)), (value,))


def overhead_us(parameters: int) -> tuple[float, float]:
    """Microseconds that the check of this many parameters adds to a call: median and least."""
    given = [torch.nn.Parameter(torch.randn(4)) for _ in range(parameters)]
    checked = LiveWeights(_double(parameters), frozen=False).wrap(_nothing, _nothing)
    checked(*given)
    differences = []
    for _ in range(ROUNDS):
        seconds = []
        for call in (_nothing, checked):
            start = time.perf_counter()
            for _ in range(CALLS):
                call(*given)
            seconds.append(time.perf_counter() - start)
        differences.append(1e6 * (seconds[1] - seconds[0]) / CALLS)
    return statistics.median(differences), min(differences)


def main() -> None:
    """Prints the table."""
    print(machine())
    print("parameters  median (us)  least (us)  least, us each")
    for parameters in (1, 10, 50, 100, 200):
        median, least = overhead_us(parameters)
        print(f"{parameters:10d}  {median:11.2f}  {least:10.2f}  {least / parameters:14.3f}")


if __name__ == "__main__":
    main()
