"""Error and latency of several versions of one model, measured side by side.

Errors are taken against a float64 run of the original model, because eager is itself rounded: a
compiled model that differs from eager may well be the more accurate of the two. Nothing here knows
about normfx; the functions take plain callables.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The promise of normfx: against float64, at most twice eager's own error, or one ulp.
ALLOWED_RATIO = 2.0
ALLOWED_ULP = 1.0
# Fewer rounds have no quartiles to speak of.
MIN_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Distance of one output from eager's and from float64's.

    Attributes:
        from_eager: Largest absolute difference from the eager output.
        from_float64: Largest absolute difference from the float64 output.
        error_ulp: The difference from float64 in units in the last place, see `ulp_error`.
    """

    from_eager: float
    from_float64: float
    error_ulp: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of a set of measurements, and half the distance between the quartiles."""

    median: float
    half_iqr: float


def ulp_error(y: Tensor, exact: Tensor) -> float:
    """Largest |y - exact| / (eps * max(|exact|, rms of its row)).

    The row's root mean square keeps an element that happens to be near zero from counting as a huge
    error: the sum that made it was rounded at the scale of its neighbours.

    Shapes: y, exact: (..., cols).
    Dtypes: y: the dtype that is judged; exact: float64.
    """
    scale = torch.maximum(exact.abs(), exact.square().mean(-1, keepdim=True).sqrt())
    # An all-zero row has no scale; the smallest normal number makes any error there huge.
    scale = scale.clamp_min(torch.finfo(y.dtype).tiny)
    return ((y.double() - exact).abs() / (torch.finfo(y.dtype).eps * scale)).max().item()


def accuracy(y: Tensor, eager: Tensor, exact: Tensor) -> Accuracy:
    """Compare an output with eager's and with the float64 run's. NaN stays NaN, and fails."""
    return Accuracy(
        from_eager=(y - eager).abs().max().item(),
        from_float64=(y.double() - exact).abs().max().item(),
        error_ulp=ulp_error(y, exact),
    )


def keeps_promise(compiled: Accuracy, eager: Accuracy) -> bool:
    """Whether the compiled error is at most twice eager's own, or one ulp."""
    return compiled.error_ulp <= max(ALLOWED_RATIO * eager.error_ulp, ALLOWED_ULP)


def spread(values: Sequence[float]) -> Spread:
    """Median and half the interquartile range; a single value has no spread."""
    if len(values) < 2:
        return Spread(values[0], 0.0)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, (high - low) / 2)


def interleaved_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    limit_s: float = math.inf,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, in rounds in which each one is called once.

    All versions are timed within the same moments, so that a slow spell of the machine falls on all
    of them. The order turns by one each round: whoever runs after the version that leaves the
    caches coldest is another one each time.

    Args:
        calls: Name to callable.
        rounds: How many times each is timed, at most.
        limit_s: No new round starts after that many seconds, once `MIN_ROUNDS` are done.
        warm_up: Untimed rounds before.
        clock: What is read before and after; `time.process_time` leaves out what others compute.

    Returns:
        Name to durations in seconds; equal positions belong to the same round.
    """
    names = list(calls)
    for _ in range(warm_up):
        for name in names:
            calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for index in range(rounds):
        if index >= MIN_ROUNDS and time.perf_counter() - begin > limit_s:
            break
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Spread of seconds / baseline, taken round by round; below 1 is faster than the baseline."""
    return spread([a / b for a, b in zip(seconds, baseline, strict=True)])
