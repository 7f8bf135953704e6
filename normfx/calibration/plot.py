"""Plot: damage against what is saved, one point for each site and the order they are taken in."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

# What is exact has no place on a logarithmic axis: it is drawn here.
_FLOOR = 1e-12


def plot(
    points: Sequence[tuple[float, float, str]], path: str | os.PathLike[str], axis: str
) -> None:
    """Saves a figure.

    Args:
        points: (bytes saved a batch, damage, name) for each site, in the order they are taken.
        path: ends with .png, .svg or what else matplotlib writes.
        axis: what the damage is.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window and no global state: pyplot has both
    axes = figure.subplots()
    saved = [total / 2**20 for total in itertools.accumulate(point[0] for point in points)]
    damage = [max(point[1], _FLOOR) for point in points]
    axes.plot(saved, damage, "o-", linewidth=0.8, markersize=4)
    for x, y, (_, _, name) in zip(saved, damage, points, strict=True):
        axes.annotate(
            name, (x, y), fontsize=6, rotation=30, xytext=(2, 3), textcoords="offset points"
        )
    axes.set_yscale("log")
    axes.set_xlabel("MiB read and written by the norms up to this one, a batch")
    axes.set_ylabel(f"{axis} of this site alone")
    axes.grid(True, which="major", linewidth=0.3)
    figure.savefig(path)
