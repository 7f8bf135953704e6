"""Running a model to see the graph after every stage. Nothing comes from a cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from normfx.errors import StageError, StatisticsError
from normfx.graphdiff.snapshot import Recorder, Snapshot
from normfx.options import Options
from normfx.passes.calibrated import check_weights
from normfx.pipeline import rewrite, weights_are_tracked
from normfx.record import Journal
from normfx.torch_internals import compile_alone, unwrapped


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the stages made of one graph.

    Attributes:
        name: "graph 0", "graph 1", ... in the order of compilation; of a body "graph 0, body.0".
        snapshots: by the name of the stage, in order; of a graph that was left to Inductor, those
            before the stage that failed.
        journal: its decisions; of a body, those of the graph around it.
        is_body: whether it is the body of an operator (an activation checkpoint).
    """

    name: str
    snapshots: Mapping[str, Snapshot]
    journal: Journal
    is_body: bool = False


@dataclass(slots=True)
class _Run:
    """Collects the graphs of a call; dynamo may compile on several threads."""

    options: Options
    found: list[Recorded] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        journal, recorder = Journal(), Recorder()
        tracked = self.options.weights == "frozen" or weights_are_tracked(gm, example_inputs)
        check_weights(gm, example_inputs, self.options)
        try:
            rewrite(
                gm,
                self.options,
                journal,
                tracked=tracked,
                inputs=example_inputs,
                observe=recorder,
                observe_body=recorder.body,
            )
        except StageError as error:
            if self.options.strict:
                raise
            journal.abandon(str(error))
        with self.lock:
            journal.name = f"graph {self.count}"
            self.count += 1
            self.found += _flattened(journal.name, recorder, journal)
        recorder.forget()
        return gm


def _flattened(name: str, recorder: Recorder, journal: Journal) -> list[Recorded]:
    """A graph and the bodies in it."""
    found = [Recorded(name, recorder.snapshots, journal, is_body=", " in name)]
    for index, body in enumerate(recorder.bodies.values()):
        found += _flattened(f"{name}, body.{index}", body, journal)
    return found


def record(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dynamic: bool | None,
    options: Mapping[str, Any] | None,
) -> tuple[Recorded, ...]:
    """The graphs of one call of a model, after every stage.

    Raises:
        OptionError: an unknown option or a value of the wrong type.
        StatisticsError: calibrated statistics do not fit the model.
        StageError: a stage failed and `strict` is set.
    """
    run = _Run(Options.parse(options))
    with unwrapped(StatisticsError, StageError):
        compile_alone(model, run, dynamic)(*args, **kwargs)
    return tuple(run.found)
