"""What a form of a norm gains over another, alone: the measurements that `normfx/cost.py` rests on.

    python -m benchmarks.norm_forms

Each form is compiled by Inductor with its input made by an add, as in a residual stream. Medians of
calls in turns, in seconds of this process, one thread; ratios within each round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import machine
from normfx.timing import interleaved_latency, ratio, spread

EPS = 1e-5
SHAPES = ((64, 768), (1024, 768), (4096, 1024))


def layer_norm(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + y, w.shape, w, b, EPS)


def layer_norm_plain(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + y, w.shape, None, None, EPS)


def rms_norm(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x + y, w.shape, None, EPS)


def then_linear(x: Tensor, v: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, EPS) @ v


def linear_then_scale(x: Tensor, v: Tensor) -> Tensor:
    wide = x.float()
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return ((x @ v) * factor).to(x.dtype)


def bias_in_the_norm(x: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], None, b, EPS) @ v


def bias_in_the_product(x: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, F.layer_norm(x, x.shape[-1:], None, None, EPS), v)


# name of a table -> its forms, the first of which the others are compared with
FORMS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "norm": (layer_norm, layer_norm_plain, rms_norm),
    "scale past a product": (then_linear, linear_then_scale),
    "bias past a product": (bias_in_the_norm, bias_in_the_product),
}


def inputs(table: str, shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    width = shape[1]
    sizes = {
        "norm": [shape, shape, (width,), (width,)],
        "scale past a product": [shape, (width, width)],
        "bias past a product": [shape, (width, width), (width,)],
    }
    return [torch.randn(size).to(dtype) for size in sizes[table]]


def rows(table: str, shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> list[str]:
    """A line for each form."""
    given = inputs(table, shape, dtype)
    work = shape[0] * shape[1] * (1 if table == "norm" else 40)
    repeat = max(1, 2_000_000 // work)

    def times(call: Callable[..., Any]) -> None:
        for _ in range(repeat):
            call(*given)

    calls = {}
    torch.compiler.reset()  # each shape is compiled for itself
    for form in FORMS[table]:
        call = torch.compile(form, fullgraph=True, dynamic=False)
        call(*given)
        calls[form.__name__] = partial(times, call)
    seconds = interleaved_latency(calls, rounds=rounds, clock=time.process_time, warm_up=2)
    base = seconds[FORMS[table][0].__name__]
    size, name = "x".join(map(str, shape)), str(dtype).removeprefix("torch.")
    lines = []
    for form, durations in seconds.items():
        each, against = spread(durations), ratio(durations, base)
        lines.append(
            f"| {size} | {name} | {form} | {1e6 * each.median / repeat:.1f}"
            f" | {against.median:.3f} ± {against.half_iqr:.3f} |"
        )
    return lines


def main() -> None:
    """Prints every table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with torch.no_grad():
        for table in FORMS:
            print("| shape | dtype | form | us | x the first |\n|---|---|---|--:|--:|")
            for shape in SHAPES[: None if table == "norm" else 2]:
                for dtype in (torch.float32, torch.bfloat16):
                    print("\n".join(rows(table, shape, dtype, asked.rounds)), flush=True)


if __name__ == "__main__":
    main()
