"""Compile three transformers with normfx and check them: answers, what was rewritten, latency.

    python examples/embed_sentences.py
    python examples/embed_sentences.py --models minilm --repeat 50 --threads 1

A trained sentence encoder embeds the sentences of `sentences.txt`; GPT-2 small and ViT base follow
with random weights. Each model runs eager, under `backend="inductor"` and under `backend="normfx"`
in the same process: the largest difference from eager and from a float64 run of the original model,
the report of what normfx found, and the latency, with the calls of the three interleaved.

Exit status: 0 if normfx kept its promise on each model (it found normalizations, and its error
against float64 is at most twice eager's own, or one ulp), 1 if not.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from measure import accuracy
from presentation import Outcome, make_console, model_table, neighbour_table, summary_table
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from workloads import WORKLOADS, Workload

import normfx
from normfx.timing import interleaved_latency


@contextmanager
def step(console: Console, description: str, *, spin: bool = True) -> Iterator[None]:
    """Show that a step runs: a spinner with the time so far on a terminal, then one line."""
    start = time.perf_counter()
    if spin and console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as display:
            display.add_task(description, total=None)
            yield
    else:
        yield
    console.print(f"{description}: {time.perf_counter() - start:.1f} s", highlight=False)


def run_all(call: Callable[..., object], workload: Workload) -> Tensor:
    """The outputs of all batches, one below the other. Shapes: returns (rows, ..., cols)."""
    return torch.cat([workload.output(call(**batch)) for batch in workload.batches])


def float64_output(workload: Workload) -> Tensor:
    """The output of the original model in float64, which stands for the exact one."""
    model = copy.deepcopy(workload.model).double()
    output = workload.output
    batches = [
        {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
        for batch in workload.batches
    ]
    return torch.cat([output(model(**batch)) for batch in batches])


def demonstrate(console: Console, workload: Workload, *, rounds: int, limit_s: float) -> Outcome:
    """Run, compile, compare and time one model, and print its report and its table."""
    console.rule(workload.title, characters="─" if console.is_terminal else "-")
    torch.compiler.reset()
    normfx.reset()
    versions: dict[str, Callable[..., object]] = {"eager": workload.model}
    with step(console, "float64 and eager"):
        exact = float64_output(workload)
        outputs = {"eager": run_all(workload.model, workload)}
    # No table compares these compile times: they depend on what is in the caches on disk, and the
    # second backend finds there what it has in common with the first.
    for backend in ("inductor", "normfx"):
        with step(console, f"compile with {backend}"):
            versions[backend] = torch.compile(workload.model, backend=backend)
            versions[backend](**workload.batches[0])
    for backend in ("inductor", "normfx"):
        outputs[backend] = run_all(versions[backend], workload)
    report = normfx.report()
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)

    if workload.sentences:
        count = len(workload.sentences)
        embeddings, eager = outputs["normfx"][:count], outputs["eager"][:count]
        console.print(neighbour_table(console, embeddings, eager, workload.sentences))
    # The spinner's thread would take its share of the cores from what is timed.
    with step(console, "interleaved timing", spin=False):
        inputs = workload.batches[0]
        calls = {name: partial(version, **inputs) for name, version in versions.items()}
        seconds = interleaved_latency(calls, rounds=rounds, limit_s=limit_s)
    errors = {name: accuracy(y, outputs["eager"], exact) for name, y in outputs.items()}
    outcome = Outcome(
        name=workload.name,
        title=workload.title,
        accuracy=errors,
        seconds=seconds,
        norms=len(report.sites),
        rewritten=sum(bool(site.actions) for site in report.sites),
    )
    console.print(model_table(console, outcome))
    console.print()
    return outcome


def model_names(text: str) -> list[str]:
    """Parse `minilm,gpt2`. Raises ArgumentTypeError: an unknown name, the empty one included."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WORKLOADS:
            message = f"unknown model {name!r}; choose from {', '.join(WORKLOADS)}"
            raise argparse.ArgumentTypeError(message)
    return names


def positive(text: str) -> int:
    """Parse a positive integer. Raises ArgumentTypeError or ValueError: it is none."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {value}")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument(
        "--models",
        type=model_names,
        default=list(WORKLOADS),
        metavar="NAME,...",
        help=f"which of {','.join(WORKLOADS)} to run (default: all)",
    )
    parser.add_argument(
        "--repeat", type=positive, default=20, help="timed rounds a model (default: 20)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="stop timing a model after that (default: 10)"
    )
    parser.add_argument("--threads", type=positive, help="threads of torch (default: its own)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit status: 0 if normfx kept its promise on every model."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = make_console()
    outcomes: list[Outcome] = []
    with torch.no_grad():
        for name in options.models:
            with step(console, f"load {name}"):
                workload = WORKLOADS[name]()
            outcomes.append(
                demonstrate(console, workload, rounds=options.repeat, limit_s=options.seconds)
            )
    console.print(summary_table(console, outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
