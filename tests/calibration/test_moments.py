"""Moments against float64 in numpy with more care, on data where a naive sum of squares fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from normfx.calibration.moments import Moments, merged, moments
from normfx.calibration.smoothing import MOMENTUM, fresh, smoothed

EPS = np.finfo(np.float64).eps


def rows(count: int, mean: float, deviation: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return mean + deviation * x


def exact(x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
    """By `math.fsum`, which rounds once."""
    a, b = x.double().numpy(), y.double().numpy()
    found = {"rows": np.float64(len(a))}
    mean, out = (np.array([math.fsum(c) / len(c) for c in v.T]) for v in (a, b))
    found |= {"mean": mean, "out_mean": out}
    for name, p, q, mp, mq in (
        ("square", a, a, mean, mean),
        ("out_square", b, b, out, out),
        ("cross", a, b, mean, out),
    ):
        pairs = zip(p.T, q.T, mp, mq, strict=True)
        found[name] = np.array([math.fsum((u - m) * (v - n)) for u, v, m, n in pairs])
    return found


def assert_exact(got: Moments, x: torch.Tensor, y: torch.Tensor) -> None:
    """Every moment to a few roundings, the co-moments at the size of the deviations they multiply.

    A mean is known to one ulp of itself, so a deviation is known to that, however exact the sums.
    """
    truth = exact(x, y)
    n = len(x)
    ulp = {"x": EPS * np.abs(truth["mean"]).max(), "y": EPS * np.abs(truth["out_mean"]).max()}
    size = {k: np.sqrt(truth[v] / n) for k, v in (("x", "square"), ("y", "out_square"))}
    for name, pair in (("square", "xx"), ("out_square", "yy"), ("cross", "xy")):
        a, b = pair
        bound = n * (
            8 * EPS * size[a] * size[b] + 8 * ulp[a] * (size[b] + ulp[b]) + 8 * ulp[b] * size[a]
        )
        assert (np.abs(getattr(got, name).numpy() - truth[name]) <= bound).all(), name
    for name, key in (("mean", "x"), ("out_mean", "y")):
        error = np.abs(getattr(got, name).numpy() - truth[name])
        assert (error <= 4 * ulp[key] + 4 * EPS * size[key]).all(), name
    assert got.rows.item() == n


HARD = [(0.0, 1.0), (1e6, 1e-3), (-1e8, 1.0), (1e-20, 1e-22), (1e150, 1e140), (3.0, 0.0)]


@pytest.mark.parametrize(("mean", "deviation"), HARD)
def test_exact(mean, deviation):
    x, y = rows(1000, mean, deviation), rows(1000, 1.0, 2.0, seed=1)
    assert_exact(moments(x, y), x, y)


@pytest.mark.parametrize(("mean", "deviation"), HARD)
def test_merged_in_uneven_parts(mean, deviation):
    x, y = rows(1000, mean, deviation), rows(1000, 1.0, 2.0, seed=1)
    sizes = [1, 2, 497, 400, 100]
    parts = [moments(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = merged(total, part)
    assert_exact(total, x, y)


def test_a_float32_batch_is_summed_in_float64():
    x = rows(4096, 1e4, 1e-2).float()
    assert_exact(moments(x, x), x, x)


def test_masked_rows_do_not_count_whatever_they_are():
    x, y = rows(100, 2.0, 1.0), rows(100, 1.0, 2.0, seed=1)
    keep = torch.rand(100, generator=torch.Generator().manual_seed(2)) > 0.4
    spoilt = torch.where(keep.unsqueeze(-1), x, torch.nan)
    assert_exact(moments(spoilt, y, keep), x[keep], y[keep])


def test_no_rows_are_neutral():
    x = rows(10, 2.0, 1.0)
    none = moments(x, x, torch.zeros(10, dtype=torch.bool))
    some = moments(x, x)
    for both in (merged(none, some), merged(some, none)):
        assert all(torch.equal(a, b) for a, b in zip(both, some, strict=True))
    assert merged(none, none).rows.item() == 0
    assert all(held.isfinite().all() for held in merged(none, none))


# ---------------------------------------------------------------------------- smoothing


def reference(batches: list[np.ndarray], length: int, filtration: bool):
    """Section 1 of the released code, step by step (with a warm-up of one window)."""
    window, running, skipped = np.zeros((length, batches[0].size)), None, 0
    for t, m in enumerate(batches, start=1):
        slot = t % length
        spread = np.sqrt(window).var(ddof=1)
        window[slot] = m
        arithmetic, geometric = window.mean(0), np.exp(np.log(np.maximum(window, 1e-300)).mean(0))
        skip = filtration and t > length and (arithmetic - geometric > length * spread).any()
        if skip:
            window[slot] = running
            skipped += 1
        value = m if t <= length or skip else geometric
        running = value if t == 1 else MOMENTUM * running + (1 - MOMENTUM) * value
    return window, running, skipped


@pytest.mark.parametrize("filtration", [False, True])
def test_smoothing_is_that_of_the_released_code(filtration):
    generator = np.random.default_rng(0)
    batches = [generator.uniform(0.9, 1.1, 6) for _ in range(40)]
    batches[20] = batches[20] * 50.0
    batches[31] = batches[31] * 0.001
    state = fresh(4, torch.zeros(6, dtype=torch.float64))
    one = torch.ones((), dtype=torch.float64)
    for m in batches:
        state = smoothed(state, torch.from_numpy(m), one, filtration=filtration)
    window, running, skipped = reference(batches, 4, filtration)
    assert np.abs(state.window.numpy() - window).max() <= 64 * EPS * window.max()
    assert np.abs(state.running.numpy() - running).max() <= 64 * EPS * running.max()
    assert state.skipped.item() == skipped
    assert (skipped > 0) is filtration


def test_a_batch_without_rows_changes_no_window():
    state = fresh(2, torch.zeros(3, dtype=torch.float64))
    after = smoothed(state, torch.ones(3, dtype=torch.float64), torch.zeros(()), filtration=True)
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
