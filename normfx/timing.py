"""Timing: several callables side by side, on a machine that others use too."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Fewer rounds have no quartiles to speak of.
MIN_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of a set of measurements, and half the distance between the quartiles."""

    median: float
    half_iqr: float


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
