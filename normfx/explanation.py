"""Explain: what normfx would do to a model, without generating code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from normfx.errors import StageError, StatisticsError
from normfx.options import Options
from normfx.passes.calibrated import check_weights
from normfx.pipeline import rewrite, weights_are_tracked
from normfx.record import Journal
from normfx.reports import Report
from normfx.torch_internals import compile_alone, unwrapped


def explain(
    model: Callable[..., Any],
    *,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Report]:
    """The report of one call of a model: `print(normfx.explain(model)(*args))`.

    The call runs the model (its graphs are traced, rewritten and then run eagerly); Inductor is not
    started. Code compiled before stays valid, and `normfx.report()` does not change.

    Args:
        model: a module or a function, not compiled.
        dynamic: as in `torch.compile`.
        options: see `normfx.Options`.

    Returns:
        A function of the model's arguments that returns the `Report`.

    Raises:
        OptionError: an unknown option or a value of the wrong type.
        StatisticsError: calibrated statistics do not fit the model.
    """
    parsed = Options.parse(options)

    def explained(*args: Any, **kwargs: Any) -> Report:
        journals: list[Journal] = []
        lock = threading.Lock()

        def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            journal = Journal()
            tracked = parsed.weights == "frozen" or weights_are_tracked(gm, example_inputs)
            check_weights(gm, example_inputs, parsed)
            try:
                rewrite(gm, parsed, journal, tracked=tracked, inputs=example_inputs)
            except StageError as error:
                if parsed.strict:
                    raise
                journal.abandon(str(error))
            with lock:
                journal.name = f"graph {len(journals)}"
                journals.append(journal)
            return gm

        with unwrapped(StatisticsError):
            compile_alone(model, collect, dynamic)(*args, **kwargs)
        return Report(tuple(journals))

    return explained
