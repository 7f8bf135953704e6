"""Plot: damage against what is saved: a row for each site, in the order they are taken in."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence


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

    saved = [total / 2**20 for total in itertools.accumulate(point[0] for point in points)]
    # what is exact, or an improvement, has no place on a logarithmic axis: it is drawn at its edge
    least = min((point[1] for point in points if point[1] > 0), default=1.0) / 2
    damage = [max(point[1], least) for point in points]
    rows = range(len(points))
    figure = Figure(figsize=(8.0, 1.4 + 0.24 * len(points)), layout="constrained")
    FigureCanvasAgg(figure)  # no window and no global state: pyplot has both
    axes = figure.subplots()
    axes.hlines(rows, least, damage, linewidth=0.8, color="0.75")
    axes.plot(damage, rows, "o", markersize=5)
    axes.set_xscale("log")
    axes.set_xlabel(f"{axis} of this site alone")
    axes.set_yticks(rows, [name for _, _, name in points], fontsize=7)
    axes.set_ylim(len(points) - 0.5, -0.5)  # the first that is taken on top
    axes.grid(True, axis="x", which="major", linewidth=0.3)
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.set_yticks(rows, [f"{total:.2f}" for total in saved], fontsize=7)
    right.set_ylabel("MiB a batch saved down to here", fontsize=7)
    figure.savefig(path)
