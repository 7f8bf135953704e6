"""Commands: each calls one public function and prints what it returns."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import normfx
from normfx.cli.errors import ModelError, UsageError, one_line
from normfx.cli.models import Loaded, data, load
from normfx.errors import NormfxError
from normfx.reports import Report


def run(asked: argparse.Namespace) -> bool:
    """Runs the command that was asked for.

    Returns:
        False if it has a finding.
    """
    return _COMMANDS[asked.command](asked)


def explain(asked: argparse.Namespace) -> bool:
    """Prints the report of one call."""
    loaded = _load(asked)
    with _called(asked, loaded):
        report = normfx.explain(loaded.model, **_settings(asked))(*loaded.args, **loaded.kwargs)
    _reported(asked, report)
    return True


def _reported(asked: argparse.Namespace, found: Report) -> None:
    print(found.to_json() if asked.json else str(found).rstrip())
    if asked.html is not None:
        _wrote(found.to_html(asked.html))


def diff(asked: argparse.Namespace) -> bool:
    """Prints a unified diff of two stages."""
    loaded = _load(asked)
    with _called(asked, loaded):
        found = normfx.diff(loaded.model, **_settings(asked))(*loaded.args, **loaded.kwargs)
        text = found.text(asked.before, asked.after, asked.context, expand=asked.expand)
    if asked.json:
        stages = [{**asdict(stage), "delta": dict(stage.delta)} for stage in found.stages]
        print(json.dumps({"stages": stages, "text": text}, indent=1))
    else:
        print(text.rstrip())
    if asked.html is not None:
        found.html(asked.html)
        _wrote(asked.html)
    return True


def verify(asked: argparse.Namespace) -> bool:
    """Prints the errors of every stage."""
    loaded = _load(asked)
    with _called(asked, loaded):
        checked = normfx.verify(
            loaded.model, inputs=asked.inputs, compiled=asked.compiled, **_settings(asked)
        )
        found = checked(*loaded.args, **loaded.kwargs)
    print(found.to_json() if asked.json else str(found).rstrip())
    if asked.html is not None:
        _wrote(found.to_html(asked.html))
    return found.ok


def bench(asked: argparse.Namespace) -> bool:
    """Prints the times of eager, Inductor and normfx."""
    from normfx.cli.bench import chart, check_chart, measure

    if asked.chart is not None:
        check_chart(asked.chart)
    loaded = _load(asked)
    with _called(asked, loaded):
        found = measure(
            asked.model,
            loaded,
            options=_options(asked),
            dynamic=asked.dynamic or None,
            train=asked.train,
            rounds=asked.rounds,
            limit_s=asked.limit,
        )
    print(found.to_json() if asked.json else str(found).rstrip())
    if asked.chart is not None:
        _wrote(chart(found, asked.chart))
    return True


def calibrate(asked: argparse.Namespace) -> bool:
    """Writes the statistics of the norms over data."""
    loaded = _load(asked, needs_inputs=False)
    batches = data(asked.data)
    statistics = normfx.calibrate(
        loaded.model,
        batches,
        batches=asked.batches,
        budget=asked.budget,
        mask=asked.mask,
        path=asked.output,
    )
    chosen = list(statistics.sites) if statistics.chosen is None else list(statistics.chosen)
    held = {
        "path": asked.output,
        "batches": statistics.batches,
        "complete": statistics.complete,
        "sites": list(statistics.sites),
        "chosen": chosen,
        "refused": dict(statistics.refused),
    }
    if asked.json:
        print(json.dumps(held, indent=1))
    else:
        print(f"{len(statistics.sites)} norms measured over {statistics.batches} batches")
        for name, reason in statistics.refused.items():
            print(f"not measured: {name} ({reason})")
        print(f"to replace: {', '.join(chosen) or 'none'}")
        _wrote(asked.output)
    return True


def report(asked: argparse.Namespace) -> bool:
    """Prints a saved report."""
    text = sys.stdin.read() if asked.file == "-" else Path(asked.file).read_text(encoding="utf-8")
    try:
        found = Report.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{asked.file} is no report: expected what `normfx explain --json` prints"
        ) from error
    _reported(asked, found)
    return True


_COMMANDS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "explain": explain,
    "diff": diff,
    "verify": verify,
    "bench": bench,
    "calibrate": calibrate,
    "report": report,
}


def _load(asked: argparse.Namespace, *, needs_inputs: bool = True) -> Loaded:
    with _working(f"building {asked.model}"):
        return load(
            asked.model,
            device=asked.device,
            dtype=asked.dtype,
            train=asked.train,
            needs_inputs=needs_inputs,
        )


def _settings(asked: argparse.Namespace) -> dict[str, Any]:
    return {"options": _options(asked), "dynamic": asked.dynamic or None}


def _options(asked: argparse.Namespace) -> dict[str, Any]:
    """The options of normfx; a value is JSON where it can be read so, else it is text."""
    options: dict[str, Any] = {}
    for entry in asked.option:
        key, equals, text = entry.partition("=")
        if not (key and equals):
            raise UsageError(f"--option: expected KEY=VALUE, got {entry!r}")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    if asked.rules is not None:
        options["rules"] = [rule for rule in asked.rules.split(",") if rule]
    normfx.Options.parse(options)
    return options


@contextmanager
def _called(asked: argparse.Namespace, loaded: Loaded) -> Iterator[None]:
    """Runs the model with or without gradients; what it raises is the model's."""
    with (
        _working(f"{asked.command} {asked.model}"),
        nullcontext() if asked.train else torch.no_grad(),
    ):
        try:
            yield
        except (NormfxError, UsageError, OSError):
            raise
        except Exception as error:
            raise ModelError(f"running {asked.model} failed: {_cause(loaded, error)}") from error


def _cause(loaded: Loaded, error: Exception) -> str:
    """What went wrong, in the words of the model itself where it does not run as it is either."""
    try:
        loaded()
    except Exception as own:
        return one_line(own)
    return one_line(error)


@contextmanager
def _working(description: str) -> Iterator[None]:
    """Shows on a terminal that something runs, and for how long."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        p.add_task(description, total=None)
        yield


def _wrote(path: str | Path) -> None:
    print(f"wrote {path}", file=sys.stderr)
