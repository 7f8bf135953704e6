"""Train a small GPT on Python's own source text with five norms, and fold the norms away.

    python examples/train_char_lm.py
    python examples/train_char_lm.py --norm LN,UN --seeds 0 --steps 500

LayerNorm, RMSNorm, BatchNorm over tokens, PowerNorm and Unified Normalization: the same weights at
the start, the same batches, the same hyper-parameters. Two minutes a model on one core. What was
trained is kept in the folder `--output` and not trained again: results as JSON, weights, curves.

Then each model is compiled with normfx: how many norms are left, and how far its loss moves.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from char_lm import SHAPE, CharLM, Text, held_out_loss, read_text, train
from curves import plot_curves
from folding import count_nodes
from kept import Folder
from presentation import make_console, new_table
from rich.console import Console
from small_transformer import norm_layers
from torch import Tensor

NORMS = ("LN", "RMS", "BN", "PN", "UN")
STEPS = 2000
# As a share of all steps, what the released configurations have: about a tenth.
WARMUP_SHARE = 0.1
WINDOWS = 1024
LOSS_BOUND = 1e-5


def new_model(norm: str, steps: int, seed: int = 0) -> CharLM:
    """A model that has learned nothing; a seed gives every norm the same weights."""
    torch.manual_seed(seed)
    return CharLM(norm_layers(SHAPE, int(WARMUP_SHARE * steps))[norm])


def trained(folder: Folder, text: Text, norm: str, seed: int, steps: int) -> dict[str, Any]:
    """The result of one training, from the folder if it is there."""
    name = f"{norm}-{seed}"
    if name not in folder.results:
        model = new_model(norm, steps, seed)
        curve = train(model, text, steps=steps, seed=seed)
        # What a batch knows of its own future: its statistics, which a layer in training uses.
        batch_statistics = held_out_loss(copy.deepcopy(model).train(), text.held_out, batch=16)
        folder.add(name, {**asdict(curve), "batch_statistics": batch_statistics}, model)
    return folder.results[name]


def show_losses(
    console: Console, results: dict[str, dict[str, Any]], norms: Sequence[str], seeds: Sequence[int]
) -> None:
    """The final loss of each norm beside LayerNorm's, seed by seed."""
    table = new_table(
        console,
        "Held-out loss, nats a character",
        f"Mean and range over seeds {', '.join(map(str, seeds))}. x LN: seed by seed. Batch "
        "statistics: the loss in training mode, in which BN, PN and UN see statistics of the "
        "whole batch, tokens to come among them. Seconds: of the steps of a training.",
    )
    table.add_column("norm")
    for heading in ("final", "range", "x LN", "each seed", "batch statistics", "seconds"):
        table.add_column(heading, justify="right")
    for norm in norms:
        runs = [results[f"{norm}-{seed}"] for seed in seeds]
        finals = [run["final"] for run in runs]
        cells = ["", ""]
        if "LN" in norms:
            ratios = [
                final / results[f"LN-{seed}"]["final"]
                for final, seed in zip(finals, seeds, strict=True)
            ]
            cells = [f"{statistics.fmean(ratios):.4f}", " ".join(f"{r:.4f}" for r in ratios)]
        table.add_row(
            norm,
            f"{statistics.fmean(finals):.4f}",
            f"{max(finals) - min(finals):.4f}",
            *cells,
            f"{statistics.fmean(run['batch_statistics'] for run in runs):.4f}",
            f"{statistics.fmean(run['seconds'] for run in runs):.0f}",
        )
    console.print(table)


def show_folds(console: Console, models: dict[str, CharLM], windows: Tensor, lowering: str) -> bool:
    """Compiles the models. Returns whether each loss is eager's, and no UN or BN is left."""
    table = new_table(
        console,
        'After torch.compile(model, backend="normfx")',
        "Norm nodes: normalizations that normfx found, and that its graph still has. Operators: "
        "of that graph, whose weights are folded.",
    )
    table.add_column("norm")
    for heading in ("norm nodes", "left", "operators", "loss, eager", "loss, compiled", "moved"):
        table.add_column(heading, justify="right")
    good = True
    for norm, model in models.items():
        count = count_nodes(model, windows[:64, :-1])
        fast = torch.compile(
            model, backend="normfx", options={"strict": True, "lowering": lowering}
        )
        losses = [held_out_loss(call, windows) for call in (model, fast)]
        moved = abs(losses[1] - losses[0])
        good &= moved <= LOSS_BOUND and (count.left == 0 or norm not in ("BN", "UN"))
        table.add_row(
            norm,
            *map(str, (count.found, count.left, count.operators)),
            *(f"{loss:.6f}" for loss in losses),
            f"{moved:.1e}",
        )
    console.print(table)
    return good


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--norm", default=",".join(NORMS), help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held out (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("char_lm"), help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    options = parser.parse_args(arguments)
    options.norm = options.norm.split(",")
    if unknown := set(options.norm) - set(NORMS):
        parser.error(f"unknown norm {', '.join(sorted(unknown))}; choose from {', '.join(NORMS)}")
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and folds. Returns the exit status: 0 if folding changed no loss and left no UN."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    console = make_console()
    text = read_text(options.windows)
    console.print(text.description, highlight=False)
    folder = Folder(options.output, {"steps": options.steps, "windows": options.windows})
    for seed in options.seeds:
        for norm in options.norm:
            run = trained(folder, text, norm, seed, options.steps)
            console.print(f"{norm}, seed {seed}: {run['final']:.4f}", highlight=False)
    show_losses(console, folder.results, options.norm, options.seeds)
    runs = {
        norm: [folder.results[f"{norm}-{seed}"] for seed in options.seeds] for norm in options.norm
    }
    plot_curves(
        options.output / "losses.svg",
        {norm: [(run["steps"], run["losses"]) for run in each] for norm, each in runs.items()},
        title=f"GPT of {SHAPE.depth} blocks, width {SHAPE.width}, on Python source",
        ylabel="held-out loss, nats a character",
    )
    models = {
        norm: folder.load(f"{norm}-{options.seeds[0]}", new_model(norm, options.steps))
        for norm in options.norm
    }
    return 0 if show_folds(console, models, text.held_out, options.lowering) else 1


if __name__ == "__main__":
    raise SystemExit(main())
