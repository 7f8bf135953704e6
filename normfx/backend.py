"""The backend: what `torch.compile(model, backend="normfx")` calls for each graph.

Registered through the entry-point group `torch_dynamo_backends`, so that normfx need not be
imported.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from normfx.errors import StageError
from normfx.kernels.select import Selector
from normfx.kernels.timing import time_through_inductor
from normfx.live import LiveWeights
from normfx.options import Options
from normfx.passes.calibrated import check_weights
from normfx.pipeline import rewrite, weights_are_tracked
from normfx.record import Journal
from normfx.reports import REPORTS, payload
from normfx.torch_internals import (
    compile_alone,
    compile_with_inductor,
    fakes_for_aot,
    inductor_settings,
    log_artifact,
)

log = logging.getLogger(__name__)


def normfx(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles one of dynamo's graphs.

    Args:
        gm: the graph; not changed.
        example_inputs: its inputs, parameters and buffers among them.
        mode: as in `torch.compile`: "default", "reduce-overhead", "max-autotune",
            "max-autotune-no-cudagraphs".
        options: see `normfx.Options`.

    Returns:
        A callable with the graph's inputs and outputs.

    Raises:
        OptionError: an unknown option or a value of the wrong type.
        StageError: a stage failed and `strict` is set.
        StatisticsError: calibrated statistics do not fit the graph, whether `strict` is set or not.
    """
    parsed = Options.parse(options)
    settings = inductor_settings(mode, dict(parsed.inductor))
    journal = Journal()
    try:
        compiled = compile_graph(gm, example_inputs, parsed, settings, journal)
    except StageError as error:
        if parsed.strict:
            raise
        journal.abandon(str(error))
        warnings.warn(
            f"{error}. The graph is left to plain Inductor; its results are not affected. "
            'Pass options={"strict": True} to see the whole error.',
            stacklevel=2,
        )
        compiled = (
            gm
            if parsed.lowering == "eager"
            else compile_with_inductor(gm, example_inputs, settings)
        )
    REPORTS.add(journal)
    _log(journal)
    return compiled


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    settings: dict[str, Any],
    journal: Journal,
) -> Callable[..., Any]:
    """The callable of one graph, with weights that are followed.

    Raises:
        StageError: a stage failed.
        StatisticsError: calibrated statistics do not fit the graph.
    """
    frozen = options.weights == "frozen"
    check_weights(gm, example_inputs, options)
    tracked = frozen or weights_are_tracked(gm, example_inputs)
    timer = time_through_inductor if options.lowering == "inductor" else None
    selector = Selector(options.kernels, timer, settings)
    rewritten = rewrite(
        gm, options, journal, tracked=tracked, inputs=example_inputs, selector=selector
    )
    hoisted = rewritten.hoisted
    compiled: Callable[..., Any] = rewritten.module
    if options.lowering == "inductor":
        further = fakes_for_aot(hoisted.values) if hoisted is not None else []
        compiled = compile_with_inductor(rewritten.module, [*example_inputs, *further], settings)
    if hoisted is None:
        return compiled
    otherwise = _as_it_came(gm, options) if hoisted.conditions else compiled
    return LiveWeights(hoisted, frozen=frozen).wrap(compiled, otherwise)


def _as_it_came(gm: fx.GraphModule, options: Options) -> Callable[..., Any]:
    """Dynamo's graph, for weights with which the rewritten one would be wrong."""
    plain = gm if options.lowering == "eager" else compile_alone(gm, "inductor", None)

    def run(*args: Any) -> Any:
        warnings.warn(
            "A graph was rewritten for weights with a property that they have lost (the scale of a "
            "norm has become zero, or what was baked is in use again). It runs as plain Inductor "
            "would run it; its results are not affected. Call torch.compiler.reset() to have it "
            "rewritten for the new weights.",
            stacklevel=2,
        )
        return plain(*args)

    return run


def _log(journal: Journal) -> None:
    log.info(
        "%s: %d norms, %d tensors hoisted, %.0f ms",
        journal.name,
        len(journal.sites),
        journal.hoisted,
        1e3 * sum(journal.stages.values()),
    )
    if log.isEnabledFor(logging.DEBUG):
        for site in journal.sites:
            for record in site.records:
                verdict = (
                    "changed"
                    if record.changed
                    else f"refused {record.code.value if record.code else ''}"
                )
                log.debug(
                    "%s %s %s %s %s", record.stage, record.rule, verdict, site.name, record.location
                )
        for miss in journal.near_misses:
            log.debug("recognise near miss %s %s %s", miss.code.value, miss.name, miss.location)
    log_artifact("normfx_journal", payload(journal))
