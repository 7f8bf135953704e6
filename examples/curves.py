"""Plots of trainings: one line a norm, with the range of its seeds around it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

# A colour for each norm, the same in every picture, that colour-blind readers can tell apart.
COLOURS = {"LN": "#000000", "RMS": "#56b4e9", "BN": "#e69f00", "PN": "#cc79a7", "UN": "#009e73"}


def plot_curves(
    path: Path,
    curves: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]],
    *,
    title: str,
    ylabel: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Writes a picture (.svg or .png by its name).

    Args:
        path: where to.
        curves: name of a norm to (steps, values) of each seed.
        title: above the picture.
        ylabel: what the values are, with their unit.
        limits: of the vertical axis; by default all values.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, seeds in curves.items():
        steps = seeds[0][0]
        columns = list(zip(*(values for _, values in seeds), strict=True))
        means = [statistics.fmean(column) for column in columns]
        colour = COLOURS.get(name)
        axes.plot(steps, means, label=name, color=colour, linewidth=1.4)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(title=title, xlabel="step", ylabel=ylabel, ylim=limits)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date, so that the same numbers give the same file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
