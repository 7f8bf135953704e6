"""Timing of one graph on the device: through Inductor, as the model itself will be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    step = step_of(graph, operands, grad, settings)
    milliseconds: Any
    if settings.get("triton.cudagraphs") and not grad:
        milliseconds = testing.do_bench_cudagraph(step, rep=_RUN_MS, return_mode="median")
    else:
        milliseconds = testing.do_bench(step, warmup=_WARMUP_MS, rep=_RUN_MS, return_mode="median")
    return 1e3 * float(milliseconds)


def step_of(
    graph: fx.GraphModule, operands: list[Tensor], grad: bool, settings: Mapping[str, Any]
) -> Callable[[], Any]:
    """A call of the compiled graph, with its backward pass if wanted; it has run once."""
    # captured here, where it is timed, and not by each side in a way of its own
    apart = {name: value for name, value in settings.items() if name != "triton.cudagraphs"}
    with torch.set_grad_enabled(grad):
        compiled = compile_apart(graph, operands, apart)
        seeds = [torch.randn_like(result) for result in compiled(*operands)]

    def step() -> Any:
        with torch.set_grad_enabled(grad):
            results = compiled(*operands)
            if not grad:
                return results
            return torch.autograd.grad(results, operands, seeds, allow_unused=True)

    step()
    return step
