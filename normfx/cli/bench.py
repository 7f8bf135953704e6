"""Bench: eager, Inductor and normfx on the same call, interleaved."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfx.cli.errors import UsageError
from normfx.cli.models import Loaded
from normfx.timing import Spread, interleaved_latency, ratio, spread

BACKENDS = ("eager", "inductor", "normfx")


@dataclass(frozen=True, slots=True)
class Bench:
    """Times of one model.

    Attributes:
        model: its name.
        train: whether a call is forward and backward.
        compile_s: seconds of the first call.
        seconds: of each timed call; equal positions are of the same round.
    """

    model: str
    train: bool
    compile_s: Mapping[str, float]
    seconds: Mapping[str, list[float]]

    def latency(self, name: str) -> Spread:
        """Milliseconds of a call."""
        return spread([1e3 * s for s in self.seconds[name]])

    def beside(self, name: str, baseline: str) -> Spread:
        """Seconds of one over those of another, round by round."""
        return ratio(self.seconds[name], self.seconds[baseline])

    def to_json(self) -> str:
        """Everything as JSON text."""
        held = {
            "model": self.model,
            "train": self.train,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rounds": len(self.seconds["eager"]),
            "backends": {
                name: {
                    "median_ms": self.latency(name).median,
                    "half_iqr_ms": self.latency(name).half_iqr,
                    "over_inductor": self.beside(name, "inductor").median,
                    "first_call_s": self.compile_s[name],
                    "seconds": self.seconds[name],
                }
                for name in BACKENDS
            },
        }
        return json.dumps(held, indent=1)

    def __str__(self) -> str:
        in_terminal = sys.stdout.isatty()
        console = Console(
            file=io.StringIO(),
            width=None if in_terminal else 100,
            force_terminal=in_terminal,
            highlight=False,
            color_system="auto" if in_terminal else None,
        )
        what = "forward and backward" if self.train else "forward"
        rounds = len(self.seconds["eager"])
        console.print(f"{self.model}: {what}, {rounds} rounds, {torch.get_num_threads()} threads")
        table = Table(box=None, pad_edge=False, show_edge=False)
        for column in (
            "backend",
            "median ms",
            "spread",
            "over eager",
            "over inductor",
            "first call s",
        ):
            table.add_column(column, justify="left" if column == "backend" else "right")
        for name in BACKENDS:
            ms, eager, inductor = (
                self.latency(name),
                self.beside(name, "eager"),
                self.beside(name, "inductor"),
            )
            table.add_row(
                name,
                f"{ms.median:.3f}",
                f"±{ms.half_iqr:.3f}",
                f"{eager.median:.3f} ±{eager.half_iqr:.3f}",
                f"{inductor.median:.3f} ±{inductor.half_iqr:.3f}",
                f"{self.compile_s[name]:.1f}",
            )
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def measure(
    name: str,
    loaded: Loaded,
    *,
    options: Mapping[str, Any],
    dynamic: bool | None,
    train: bool,
    rounds: int,
    limit_s: float,
) -> Bench:
    """Times a call under each backend; in training, its forward and backward.

    Each backend has a copy of the model, so that no other's compiled code is in its way.
    """
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    for backend in BACKENDS:
        call = _call(copy.deepcopy(loaded), backend, options, dynamic, train=train)
        start = time.perf_counter()
        call()
        first[backend] = time.perf_counter() - start
        calls[backend] = call
    seconds = interleaved_latency(calls, rounds=rounds, limit_s=limit_s)
    return Bench(name, train, first, seconds)


def _call(
    loaded: Loaded,
    backend: str,
    options: Mapping[str, Any],
    dynamic: bool | None,
    *,
    train: bool,
) -> Callable[[], object]:
    model: Any = loaded.model
    device = next(
        (
            t.device
            for t in pytree.tree_leaves((loaded.args, loaded.kwargs))
            if isinstance(t, Tensor)
        ),
        None,
    )
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    if backend == "inductor":
        model = torch.compile(model, dynamic=dynamic)
    elif backend == "normfx":
        model = torch.compile(model, backend="normfx", dynamic=dynamic, options=dict(options))

    def call() -> object:
        result = model(*loaded.args, **loaded.kwargs)
        if train:
            outputs = [
                t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad
            ]
            torch.autograd.backward([t.float().sum() for t in outputs])
            for parameter in parameters:
                parameter.grad = None
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return call


def check_chart(path: str) -> None:
    """Raises before anything is timed if no chart could be drawn.

    Raises:
        UsageError: matplotlib is missing, or the ending is of no picture.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--chart needs matplotlib: pip install matplotlib")
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--chart: expected a .png, .svg or .pdf, got {path!r}")


def chart(found: Bench, path: str) -> Path:
    """Draws the times of every round as boxes, beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.boxplot(
        [[1e3 * s for s in found.seconds[name]] for name in BACKENDS],
        orientation="horizontal",
        tick_labels=list(BACKENDS),
        showfliers=False,
    )
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds a call: median, quartiles, and the range but for outliers")
    axes.set_title(f"{found.model}{' (training)' if found.train else ''}")
    figure.savefig(path)
    return Path(path)
