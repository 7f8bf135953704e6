"""Timing of one graph on the device: through Inductor, as the model itself will be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from normfx.torch_internals import compile_apart

# Triton's own benchmark clears the second-level cache before each run, as the rest of a model does.
_WARMUP_MS, _RUN_MS = 10, 50


def time_through_inductor(
    graph: fx.GraphModule, operands: list[Tensor], grad: bool, settings: Mapping[str, Any]
) -> float:
    """Microseconds of a call (with its backward pass, with `grad`) on a GPU.

    Without a backward pass and with CUDA graphs among the settings, the launches are captured, so
    that what the CPU does between them is left out, as it is in the model.
    """
    from triton import testing

    graphs = bool(settings.get("triton.cudagraphs")) and not grad
    plain = {k: v for k, v in settings.items() if k not in ("triton.cudagraphs",)}
    compiled = compile_apart(graph, operands, plain)
    with torch.set_grad_enabled(grad):
        outputs = [t for t in compiled(*operands) if t.is_floating_point()]
        seeds = [torch.randn_like(t) for t in outputs]

    def step() -> None:
        results = compiled(*operands)
        if grad:
            torch.autograd.grad(
                [t for t in results if t.requires_grad],
                operands,
                [s for s, t in zip(seeds, results, strict=True) if t.requires_grad],
                allow_unused=True,
            )

    with torch.set_grad_enabled(grad):
        if graphs:
            return 1e3 * float(testing.do_bench_cudagraph(step, rep=_RUN_MS, return_mode="median"))
        milliseconds = testing.do_bench(step, warmup=_WARMUP_MS, rep=_RUN_MS, return_mode="median")
    return 1e3 * float(milliseconds)
