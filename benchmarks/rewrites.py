"""What the rewrites do under Inductor: kernels and bytes, which are exact, then latency.

    python -m benchmarks.rewrites                              # all models, both tables
    python -m benchmarks.rewrites --models "U-Net;MiniLM-L6" --rounds 60
    python -m benchmarks.rewrites --check --rounds 0           # exit 1 if kernels or bytes rise

Kernels and bytes are Inductor's own counts of the code that it generates (`metrics`), with its
graph cache off. Latencies are medians of calls in turns, as ratios to Inductor in each round, in
seconds of this process, so that others on the machine disturb them less. `freezing` is Inductor's
own, for which parameters are constants. Each model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from benchmarks.machine import machine
from benchmarks.models import WORKLOADS, Workload, load
from normfx.backend import normfx
from normfx.timing import interleaved_latency, ratio, spread
from normfx.torch_internals import compile_alone, compile_with_inductor

# What must not rise where normfx stands in front of Inductor.
COUNTS = ("kernels", "bytes", "extern_calls")
BACKENDS = ("inductor", "normfx")
SUFFIXES = ("", ", freezing")
SECONDS = 6.0  # of timing a model, at most
MIB = 2**20


def inductor_counts(
    model: nn.Module, inputs: dict[str, Any], backend: str, *, freezing: bool
) -> tuple[Callable[..., Any], dict[str, int]]:
    """A model compiled and called once, and what Inductor counted of the code it made.

    Freezing must be on while dynamo traces: as an option of a backend it comes too late.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config, metrics

    # Inductor only counts bytes for this log; nobody reads it
    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    log.setLevel(logging.INFO)
    log.propagate = False
    metrics.reset()
    counters.clear()

    # a function of its own, since dynamo would take the code that it has for an equal backend
    def compiler(gm: fx.GraphModule, given: list[Any]) -> Any:
        if backend == "normfx":
            return normfx(gm, given, options={"strict": True})
        return compile_with_inductor(gm, given, {})

    with config.patch(freezing=freezing, fx_graph_cache=False):
        compiled = compile_alone(model, compiler, None)
        compiled(**inputs)
    counts = {
        "kernels": metrics.generated_kernel_count,
        "extern_calls": counters["inductor"]["extern_calls"],
        "bytes": metrics.num_bytes_accessed,
    }
    return compiled, counts


def norms_before_and_after(workload: Workload) -> dict[str, int]:
    """How many norms and operators a model has, and how many the rewritten graph computes."""
    from normfx.ops import norm
    from normfx.options import Options
    from normfx.pipeline import rewrite
    from normfx.record import Journal

    row = {"norms": 0, "norms_left": 0, "nodes": 0, "nodes_left": 0, "folded_bytes": 0}

    def backend(gm: fx.GraphModule, _: list[Any]) -> Any:
        def observe(stage: str, module: fx.GraphModule) -> None:
            calls = len([n for n in module.graph.nodes if n.op == "call_function"])
            if stage == "recognise":
                row["nodes"] += calls
            elif stage == "hoist":
                row["nodes_left"] += calls
                row["norms_left"] += len(module.graph.find_nodes(op="call_function", target=norm))

        journal = Journal()
        rewrite(gm, Options(), journal, observe=observe)
        row["norms"] += len(journal.sites)
        row["folded_bytes"] += journal.folded_bytes
        return gm.forward

    torch.compile(workload.model, backend=backend)(**workload.inputs)
    torch.compiler.reset()
    return row


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One model's row: norms, counts and latencies of every version."""
    workload = load(name)
    row: dict[str, Any] = {"model": name, **norms_before_and_after(workload), "versions": {}}
    calls: dict[str, Callable[[], object]] = {"eager": partial(workload.model, **workload.inputs)}
    exact = workload.model(**workload.inputs)
    asked = [(backend, workload.model, backend) for backend in BACKENDS]
    asked += [(what, model, "inductor") for what, model in workload.by_hand.items()]
    for title, model, backend in asked:
        for suffix in SUFFIXES:
            compiled, counts = inductor_counts(
                model, workload.inputs, backend, freezing=bool(suffix)
            )
            difference = (compiled(**workload.inputs) - exact).abs().max() / exact.abs().max()
            row["versions"][title + suffix] = {**counts, "difference": difference.item()}
            calls[title + suffix] = partial(compiled, **workload.inputs)
    if rounds:
        with torch.compiler.set_stance("fail_on_recompile"):
            seconds = interleaved_latency(
                calls, rounds=rounds, limit_s=SECONDS, clock=time.process_time
            )
        row["rounds"] = len(seconds["eager"])
        for title, durations in seconds.items():
            base = seconds["inductor" + (SUFFIXES[1] if title.endswith(SUFFIXES[1]) else "")]
            against, each = ratio(durations, base), spread(durations)
            row["versions"].setdefault(title, {}).update(
                ms=1e3 * each.median, ratio=against.median, half_iqr=against.half_iqr
            )
    return row


def risen(row: dict[str, Any]) -> list[str]:
    """What a model has more of with normfx than without."""
    found = []
    for suffix in SUFFIXES:
        before, after = (row["versions"][backend + suffix] for backend in BACKENDS)
        for what in COUNTS:
            if after[what] > before[what]:
                found.append(
                    f"{row['model']}{suffix}: {what} rise from {before[what]} to {after[what]}"
                )
    return found


def counts_table(rows: list[dict[str, Any]]) -> list[str]:
    """Kernels and bytes, with Inductor alone and with normfx before it."""
    lines = [
        "| model | norms | left | kernels | MiB moved | with freezing: kernels | MiB moved |"
        " folded copies, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = []
        for suffix in SUFFIXES:
            before, after = (row["versions"][backend + suffix] for backend in BACKENDS)
            cells.append(f"{before['kernels']} -> {after['kernels']}")
            cells.append(f"{before['bytes'] / MIB:.2f} -> {after['bytes'] / MIB:.2f}")
        counts = " | ".join(cells)
        lines.append(
            f"| {row['model']} | {row['norms']} | {row['norms_left']} | {counts}"
            f" | {row['folded_bytes'] / MIB:.2f} |"
        )
    return lines


def latency_table(rows: list[dict[str, Any]]) -> list[str]:
    """Milliseconds of Inductor, and every other version as a ratio to it."""
    lines = [
        "| model | Inductor, ms | eager | normfx | with freezing: Inductor, ms | normfx |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        versions = row["versions"]
        lines.append(
            f"| {row['model']} | {versions['inductor']['ms']:.2f} | {_times(versions['eager'])}"
            f" | {_times(versions['normfx'])} | {versions['inductor, freezing']['ms']:.2f}"
            f" | {_times(versions['normfx, freezing'])} |"
        )
    return lines


def by_hand_table(rows: list[dict[str, Any]]) -> list[str]:
    """What was rewritten by hand, beside Inductor alone."""
    lines = [
        "| model | by hand | kernels | MiB moved | time | with freezing: kernels | time |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    known = {name + suffix for name in ("eager", *BACKENDS) for suffix in SUFFIXES}
    for row in rows:
        versions = row["versions"]
        for title in versions:
            if title in known or title.endswith(SUFFIXES[1]):
                continue
            plain, frozen = versions[title], versions[title + SUFFIXES[1]]
            lines.append(
                f"| {row['model']} | {title} | {plain['kernels']} | {plain['bytes'] / MIB:.2f}"
                f" | {_times(plain)} | {frozen['kernels']} | {_times(frozen)} |"
            )
    return lines


def _times(version: dict[str, Any]) -> str:
    """A ratio of times, where they were taken."""
    return f"{version['ratio']:.2f} ± {version['half_iqr']:.2f}" if "ratio" in version else ""


def main() -> int:
    """Measures every model and prints the tables. Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=";".join(WORKLOADS), help=ALL)
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds a model; 0: none")
    parser.add_argument("--threads", type=int, default=1, help=THREADS)
    parser.add_argument("--check", action="store_true", help="exit 1 if kernels or bytes rise")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        torch.set_num_threads(asked.threads)
        with torch.no_grad():
            print(json.dumps(measure(asked.one, asked.rounds)))
        return 0
    rows = []
    for name in _names(asked.models):
        command = [sys.executable, "-m", "benchmarks.rewrites", "--one", name]
        command += ["--rounds", str(asked.rounds), "--threads", str(asked.threads)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)
    failures = [failure for row in rows for failure in risen(row)]
    print(machine())
    print("\n".join(counts_table(rows)))
    if asked.rounds:
        print("\n".join(latency_table(rows)))
    print("\n".join(by_hand_table(rows)))
    print("\n".join(failures) or "kernels and bytes rise nowhere")
    return 1 if failures and asked.check else 0


ALL = "which models, with semicolons between them (default: all)"

THREADS = "threads of torch; one is the steadier where others use the machine (default: 1)"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(";")]


if __name__ == "__main__":
    raise SystemExit(main())
