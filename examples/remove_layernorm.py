"""Take every LayerNorm out of a trained GPT: calibrate, convert, fine-tune, fold.

    python examples/train_char_lm.py --norm LN --seeds 0
    python examples/remove_layernorm.py

The LayerNorms of the model of `train_char_lm.py` (it is trained here, if it is not there) become
Unified Normalization one after the other, the one first whose affine map explains most, while the
model is trained on. A copy with its LayerNorms is trained on by the same steps: it says how much of
the final loss is due to more training. In the end normfx folds the constant affine maps away.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from char_lm import CONTEXT, CharLM, Curve, Text, batches, held_out_loss, read_text, train
from curves import plot_curves
from folding import count_nodes
from kept import Folder
from presentation import make_console, new_table, spread_text
from rich.console import Console
from torch import Tensor, nn
from train_char_lm import LOSS_BOUND, STEPS, WINDOWS, new_model, trained

import normfx
from normfx.timing import interleaved_latency, ratio, spread

# A third of the model's own training, at a third of its learning rate: values for fine-tuning that
# no result was used to choose.
FINE_TUNING, PEAK = 600, 3e-4
WARMUP_SHARE = 0.1
# Conversions take the first three quarters of the steps, so that the last one has time to settle.
CONVERTING_SHARE = 0.75
CALIBRATION_BATCHES = 32
ALLOWED_LOSS = 1.02
CALIBRATION_SEED, FINE_TUNING_SEED = 100, 101


@dataclass(frozen=True, slots=True)
class Stage:
    """The held-out loss after something was done, and how many LayerNorms are left then."""

    what: str
    layer_norms: int
    loss: float


def layer_norms(model: nn.Module) -> int:
    """How many are left."""
    return sum(isinstance(module, nn.LayerNorm) for module in model.modules())


def calibrated(model: nn.Module, text: Text) -> normfx.Statistics:
    """Statistics of the norms of a model in eval mode, over training text."""
    windows = islice(batches(text, CALIBRATION_SEED), CALIBRATION_BATCHES)
    return normfx.calibrate(model, [part[:, :-1] for part in windows], progress=False)


def converted_at_once(model: CharLM, text: Text, stages: list[Stage]) -> None:
    """What conversion does without any training: to a copy."""
    model = copy.deepcopy(model)
    normfx.convert(model, "unified", statistics=calibrated(model, text))
    loss = held_out_loss(model, text.held_out)
    stages.append(Stage("all converted, not trained", layer_norms(model), loss))


def fine_tuned(
    model: CharLM, text: Text, steps: int, stages: list[Stage], say: Callable[[Stage], None]
) -> Curve:
    """Trains the model on, and converts its LayerNorms on the way."""
    schedule = normfx.GradualConversion(
        model,
        "unified",
        statistics=lambda: calibrated(model, text),
        every=max(int(CONVERTING_SHARE * steps) // layer_norms(model), 1),
        order="damage",
        warmup_steps=int(WARMUP_SHARE * steps),
    )

    def after_step(step: int) -> None:
        record = schedule.step()
        if record is not None:
            model.eval()
            loss = held_out_loss(model, text.held_out)
            model.train()
            names = ", ".join(swap.names[0] for swap in record.swapped)
            stages.append(Stage(f"step {step + 1}: {names}", layer_norms(model), loss))
            say(stages[-1])

    return train(model, text, steps=steps, seed=FINE_TUNING_SEED, peak=PEAK, after_step=after_step)


def compiled(model: nn.Module, backend: str, lowering: str) -> Callable[[Tensor], Tensor]:
    """A compiled model, with the code generator that is asked for."""
    if backend == "inductor":
        return torch.compile(model, backend=lowering)
    options = {"strict": True, "lowering": lowering}
    return torch.compile(model, backend="normfx", options=options)


def show_speed(
    console: Console, before: CharLM, after: CharLM, lowering: str, rounds: int
) -> dict[str, float]:
    """Times one window and a batch of them; the LayerNorm model under Inductor is the measure."""
    versions: dict[str, Callable[[Tensor], Tensor]] = {
        "LayerNorm, eager": before,
        "LayerNorm, inductor": compiled(before, "inductor", lowering),
        "LayerNorm, normfx": compiled(before, "normfx", lowering),
        "no norm, eager": after,
        "no norm, normfx": compiled(after, "normfx", lowering),
    }
    ratios = {}
    for size in (1, 32):
        tokens = torch.zeros(size, CONTEXT, dtype=torch.int64)
        torch.compiler.reset()
        calls = {name: partial(call, tokens) for name, call in versions.items()}
        with torch.no_grad():
            seconds = interleaved_latency(calls, rounds=rounds, warm_up=2, clock=time.process_time)
        base = seconds["LayerNorm, inductor"]
        table = new_table(
            console,
            f"Latency of {size} x {CONTEXT} tokens",
            f"Medians of {rounds} rounds, processor time; below 1 is faster.",
        )
        table.add_column("version")
        for heading in ("ms", "x LayerNorm, inductor"):
            table.add_column(heading, justify="right")
        for name, each in seconds.items():
            times = ratio(each, base)
            ratios[f"{name}, {size}"] = times.median
            table.add_row(name, f"{1e3 * spread(each).median:.2f}", spread_text(times, 3))
        console.print(table)
    return ratios


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("char_lm"), help="of train_char_lm.py")
    parser.add_argument("--seed", type=int, default=0, help="which LN model (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="it has (%(default)s)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held out (%(default)s)")
    parser.add_argument("--fine-tuning", type=int, default=FINE_TUNING, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("remove_layernorm"))
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it. Returns the exit status: 0 if the loss is kept, and folding left no norm."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    console = make_console()
    text = read_text(options.windows)
    folder = Folder(options.models, {"steps": options.steps, "windows": options.windows})
    trained(folder, text, "LN", options.seed, options.steps)
    before = folder.load(f"LN-{options.seed}", new_model("LN", options.steps))
    stages: list[Stage] = []

    def say(stage: Stage) -> None:
        console.print(
            f"{stage.what}: {stage.loss:.4f}, {stage.layer_norms} LayerNorms left", highlight=False
        )

    stages.append(Stage("trained", layer_norms(before), held_out_loss(before, text.held_out)))
    converted_at_once(before, text, stages)
    for stage in stages:
        say(stage)
    after, control = copy.deepcopy(before), copy.deepcopy(before)
    curve = fine_tuned(after, text, options.fine_tuning, stages, say)
    stages.append(Stage("fine-tuned", layer_norms(after), curve.final))
    say(stages[-1])
    kept = train(control, text, steps=options.fine_tuning, seed=FINE_TUNING_SEED, peak=PEAK)
    say(Stage("with its LayerNorms, the same steps", layer_norms(control), kept.final))

    count = count_nodes(after, text.held_out[:64, :-1])
    folded = held_out_loss(compiled(after, "normfx", options.lowering), text.held_out)
    stages.append(Stage("folded", layer_norms(after), folded))
    against, moved = folded / stages[0].loss, abs(folded - curve.final)
    console.print(
        f"folded: {folded:.4f}, {count.left} of {count.found} norm nodes left; {moved:.1e} from "
        f"before folding; x {against:.4f} of the LayerNorm model's loss as it came, x "
        f"{folded / kept.final:.4f} of its loss after the same steps",
        highlight=False,
    )
    ratios = show_speed(console, before, after, options.lowering, options.rounds)

    options.output.mkdir(parents=True, exist_ok=True)
    result = {
        "stages": [[stage.what, stage.layer_norms, stage.loss] for stage in stages],
        "control": kept.final,
        "ratios": ratios,
    }
    (options.output / "results.json").write_text(json.dumps(result, indent=1))
    plot_curves(
        options.output / "losses.svg",
        {
            "UN": [(curve.steps, curve.losses)],
            "LN": [(kept.steps, kept.losses)],
        },
        title="LayerNorms converted one after the other (UN), or kept (LN)",
        ylabel="held-out loss, nats a character",
    )
    good = count.left == 0 and moved <= LOSS_BOUND and against <= ALLOWED_LOSS
    return 0 if good and layer_norms(after) == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
