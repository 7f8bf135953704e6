"""What a training step costs with each norm, compiled: time, peak memory, bytes saved for backward.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --backends inductor --norms LN,UN --rounds 100

Two models: one norm by itself, whose step is its forward and its backward pass, and a pre-norm
transformer, whose step also has the loss and AdamW. All norms run in this process, in turns; times
are in seconds of this process: medians, the median of the ratios to LayerNorm in each round, and
the ratio of the least times, which other work on the machine disturbs less. Memory is counted, not
sampled:

- saved: bytes of all tensors that autograd keeps from the forward pass to the backward pass, each
  storage once, without parameters, buffers and inputs (which live anyway).
- peak: the most bytes that are allocated during a step over what was allocated before it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import machine
from examples.small_transformer import Shape, Transformer, norm_layers, optimizer_for
from normfx.timing import interleaved_latency, ratio, spread

BACKENDS = ("eager", "inductor", "normfx")
BASE = "LN"
SHAPE = Shape(width=256, depth=2, heads=4, causal=True)
BATCH, TOKENS = 16, 128
# Within the steps that are run, UN and PowerNorm are past it: their statistics are smoothed ones.
WARMUP_STEPS = 4
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Step:
    """A model, what a step feeds it, and one step of it.

    Attributes:
        model: in training mode.
        given: the tensors that live anyway: inputs and upstream gradients.
        forward: the part of the step up to what is differentiated.
        run: the whole step.
    """

    model: nn.Module
    given: tuple[Tensor, ...]
    forward: Callable[[], Tensor]
    run: Callable[[], object]


def alone(new_norm: Callable[[], nn.Module], backend: str) -> Step:
    """A norm by itself, as it stands in a model: its input asks for a gradient too."""
    model = new_norm()
    call = _compiled(model, backend)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TOKENS, SHAPE.width, generator=generator, requires_grad=True)
    dy = torch.randn(x.shape, generator=generator)
    wanted = [x, *model.parameters()]

    def forward() -> Tensor:
        return call(x)

    def run() -> object:
        return torch.autograd.grad(forward(), wanted, dy)

    return Step(model, (x, dy), forward, run)


def transformer(new_norm: Callable[[], nn.Module], backend: str) -> Step:
    """A transformer with a loss and AdamW."""
    torch.manual_seed(0)
    model = Transformer(SHAPE, new_norm)
    x, wanted = torch.randn(2, BATCH, TOKENS, SHAPE.width).unbind()
    optimizer = optimizer_for(model, 1e-4)
    call = _compiled(model, backend)

    def forward() -> Tensor:
        return nn.functional.mse_loss(call(x), wanted)

    def run() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    return Step(model, (x, wanted), forward, run)


MODELS: Mapping[str, Callable[[Callable[[], nn.Module], str], Step]] = {
    "norm alone": alone,
    "transformer": transformer,
}


def _compiled(model: nn.Module, backend: str) -> Callable[..., Tensor]:
    if backend == "eager":
        return model
    options = {"strict": True} if backend == "normfx" else None
    return torch.compile(
        model, backend=backend, fullgraph=True, options=options, isolate_recompiles=True
    )


def saved_bytes(step: Step) -> int:
    """Bytes that the forward pass leaves for the backward pass."""
    alive = (*step.given, *step.model.parameters(), *step.model.buffers())
    known = {t.untyped_storage().data_ptr() for t in alive}
    storages: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(saved: Tensor) -> Tensor:
        held.append(saved)
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        step.forward().sum().backward()
    step.model.zero_grad()
    return sum(storages.values())


def peak_bytes(step: Step) -> int:
    """Most bytes allocated during a step, over those before it. Gradients exist only during it."""
    step.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step.run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(
    new_step: Callable[[Callable[[], nn.Module], str], Step],
    norms: Sequence[str],
    backends: Sequence[str],
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """One row for each "<norm>, <backend>": counts of bytes, milliseconds, ratio to LayerNorm."""
    layers = norm_layers(SHAPE, WARMUP_STEPS)
    steps = {}
    for backend in backends:
        for norm in norms:
            steps[f"{norm}, {backend}"] = new_step(layers[norm], backend)
            steps[f"{norm}, {backend}"].run()
    with torch.compiler.set_stance("fail_on_recompile"):
        rows = {
            name: {"saved": saved_bytes(step), "peak": peak_bytes(step)}
            for name, step in steps.items()
        }
        seconds = interleaved_latency(
            {name: step.run for name, step in steps.items()},
            rounds=rounds,
            warm_up=3,
            clock=time.process_time,
        )
    for name, durations in seconds.items():
        base = seconds[f"{BASE}, {name.split(', ')[1]}"]
        times = ratio(durations, base)
        rows[name].update(
            ms=1e3 * spread(durations).median,
            ratio=times.median,
            half_iqr=times.half_iqr,
            least=min(durations) / min(base),
        )
    return rows


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows of one model as Markdown."""
    lines = [
        f"| {title} | ms | time / LN | least / LN | peak, MiB | / LN | saved, MiB | / LN |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        base = rows[f"{BASE}, {name.split(', ')[1]}"]
        lines.append(
            f"| {name} | {row['ms']:.2f} | {row['ratio']:.3f} ± {row['half_iqr']:.3f}"
            f" | {row['least']:.3f} | {row['peak'] / MIB:.2f} | {row['peak'] / base['peak']:.3f}"
            f" | {row['saved'] / MIB:.2f} | {row['saved'] / base['saved']:.3f} |"
        )
    return lines


def main() -> None:
    """Measures both models and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--norms", default="LN,RMS,BN,PN,UN", help="LN among them: %(default)s")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (%(default)s)")
    parser.add_argument("--json", help="also write the rows here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    result: dict[str, Any] = {"machine": machine()}
    for model in asked.models.split(","):
        rows = measure(
            MODELS[model], asked.norms.split(","), asked.backends.split(","), asked.rounds
        )
        result[model] = rows
        print("\n".join(["", *table(model, rows)]), flush=True)
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
