"""Verify: a model as it is, beside what every stage of normfx makes of it, on the same inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from normfx.backend import compile_graph
from normfx.errors import OptionError, StageError, StatisticsError
from normfx.options import Options
from normfx.passes.calibrated import check_weights
from normfx.record import Journal
from normfx.torch_internals import compile_alone, inductor_settings, unwrapped
from normfx.verification.check import GraphCheck
from normfx.verification.result import Blame, GraphResult, Measured, SiteResult, StageResult
from normfx.verification.result import Verification as Verification
from normfx.verification.variants import Inputs

__all__ = [
    "Blame",
    "GraphResult",
    "Measured",
    "SiteResult",
    "StageResult",
    "Verification",
    "verify",
]


def verify(
    model: Callable[..., Any],
    *,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    inputs: Inputs = "given",
    compiled: bool = False,
) -> Callable[..., Verification]:
    """Holds every stage to the numerics contract: `print(normfx.verify(model)(*args))`.

    The model runs in float64 and in its own dtype, then the graph after every stage, on the same
    inputs. Where a stage leaves the contract, the rule and the norm that it begins with are named.
    Gradients of inputs and parameters are compared too, where the call is one of training.

    Nothing is changed: neither parameters and buffers (the statistics of a BatchNorm), nor the
    inputs, nor the random number generators. A model that breaks into several graphs is verified
    graph by graph, each on what it is called with.

    Args:
        model: a module or a function, not compiled.
        dynamic: as in `torch.compile`.
        options: see `normfx.Options`.
        inputs: "given": what the model is called with. "hard": also rows of other scales, of zeros
            and with a large mean, and weights that change between two calls.
        compiled: also runs the code that Inductor makes of the last stage.

    Returns:
        A function of the model's arguments that returns the `Verification`.

    Raises:
        OptionError: an unknown option or a value of the wrong type.
        StatisticsError: calibrated statistics do not fit the model.
    """
    if inputs not in ("given", "hard"):
        raise OptionError(f"inputs: expected 'given' or 'hard', got {inputs!r}.")
    parsed = Options.parse(options)

    def verified(*args: Any, **kwargs: Any) -> Verification:
        checks: list[GraphCheck] = []
        lock = threading.Lock()

        def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            check_weights(gm, example_inputs, parsed)
            code = _compiled(gm, example_inputs, parsed) if compiled else None
            with lock:
                name = f"graph {len(checks)}"
                check = GraphCheck(name, gm, example_inputs, parsed, inputs, code)
                checks.append(check)

            def run(*given: Any) -> Any:
                check(given)
                return gm(*given)

            return run

        args, kwargs = pytree.tree_map(_copied, (args, kwargs))
        with unwrapped(StatisticsError, StageError), _restored(model):
            compile_alone(model, collect, dynamic)(*args, **kwargs)
        return Verification(tuple(check.result for check in checks))

    return verified


def _compiled(gm: fx.GraphModule, inputs: list[Any], options: Options) -> Callable[..., Any]:
    """What the backend makes of a graph; random numbers as eager draws them."""
    settings = inductor_settings(None, {**options.inductor, "fallback_random": True})
    return compile_graph(gm, inputs, replace(options, lowering="inductor"), settings, Journal())


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Gives a module the parameters, buffers and random numbers back that it had."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    held: list[tuple[dict[str, Any], str, Tensor, int, Tensor]] = [
        (table, name, t, t._version, t.detach().clone())
        for module in modules
        for table in (module._parameters, module._buffers)
        for name, t in table.items()
        if t is not None and not t.is_inference()
    ]
    devices = sorted({t.device.index or 0 for _, _, t, _, _ in held if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for table, name, t, version, value in held:
                table[name] = t
                # `batch_norm` writes to its statistics and bumps no version
                if t._version != version or not torch.equal(t, value):
                    t.copy_(value)
