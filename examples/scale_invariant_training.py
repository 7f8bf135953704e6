"""Train a small network with a step that leaves the norms of scale-invariant weights alone.

    python examples/scale_invariant_training.py
    python examples/scale_invariant_training.py --steps 50

The step is AdamP's (arXiv 2006.08217): Adam, less the component of the update along each weight
that a normalization makes scale-invariant. AdamP guesses at every step which weights these are,
and whether by channel or by layer, from the cosine between weight and gradient. Here the graph says
it, once, before the first step; the table at the end says how often the guess would have agreed.

The images are ten patterns, moved and in noise: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import normfx

CLASSES, SIDE, BATCH = 10, 8, 64
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-2
# AdamP's own numbers: the cosine that counts as none, and the share of weight decay that is left.
DELTA, DECAY_RATIO = 0.1, 0.1


def network() -> nn.Sequential:
    """Three convolutions with two kinds of norm, and a head that has none."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 2) ** 2, 32, bias=False),
        nn.LayerNorm(32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


class Images:
    """Patterns of one class each, moved by up to two pixels, in noise.

    Shapes: a batch is (BATCH, 1, SIDE, SIDE) images and (BATCH,) classes.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        always_the_same = torch.Generator().manual_seed(0)
        self._patterns = torch.randn(CLASSES, 1, SIDE, SIDE, generator=always_the_same)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next images, all of them new."""
        classes = torch.randint(CLASSES, (BATCH,), generator=self._generator)
        moves = torch.randint(-2, 3, (BATCH, 2), generator=self._generator).tolist()
        images = [self._patterns[c].roll(m, (1, 2)) for c, m in zip(classes, moves, strict=True)]
        noise = torch.randn(BATCH, 1, SIDE, SIDE, generator=self._generator)
        return torch.stack(images) + 0.7 * noise, classes


class ProjectedAdam:
    """Adam with decoupled weight decay, projected where the graph says so."""

    def __init__(
        self, model: nn.Module, invariant: Mapping[str, normfx.Invariance], lr: float
    ) -> None:
        self._parameters, self._invariant, self._lr = dict(model.named_parameters()), invariant, lr
        self._first = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._count = 0

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients that the parameters have."""
        self._count += 1
        corrections = [1 - beta**self._count for beta in BETAS]
        for name, weight in self._parameters.items():
            first, second = self._first[name], self._second[name]
            assert weight.grad is not None
            first.lerp_(weight.grad, 1 - BETAS[0])
            second.lerp_(weight.grad.square(), 1 - BETAS[1])
            update = first / corrections[0] / ((second / corrections[1]).sqrt() + EPS)
            decay = WEIGHT_DECAY
            if name in self._invariant:
                update = self._invariant[name].project(update, weight)
                decay *= DECAY_RATIO
            weight.mul_(1 - self._lr * decay).sub_(update, alpha=self._lr)


def guess(weight: Tensor, grad: Tensor) -> str:
    """What AdamP takes a weight for at one step: the first view in which no cosine is large."""
    for view, rows in (("channel", weight.shape[0]), ("whole", 1)):
        w, g = weight.reshape(rows, -1), grad.reshape(rows, -1)
        if F.cosine_similarity(g, w, dim=1, eps=EPS).abs().max() < DELTA / math.sqrt(w.shape[1]):
            return view
    return "none"


def train(
    steps: int, lr: float = 3e-3
) -> tuple[nn.Module, normfx.ScaleInvariance, dict[str, Counter[str]]]:
    """Train the network. Returns it, what the graph says, and AdamP's guesses at each step."""
    torch.manual_seed(0)
    model, images = network().train(), Images(seed=1)
    invariant = normfx.scale_invariant_parameters(model)(images.batch()[0])
    optimizer = ProjectedAdam(model, invariant, lr)
    guesses = {name: Counter[str]() for name, p in model.named_parameters() if p.dim() > 1}
    for _ in range(steps):
        inputs, classes = images.batch()
        model.zero_grad()
        F.cross_entropy(model(inputs), classes).backward()
        for name, counts in guesses.items():
            weight = model.get_parameter(name)
            assert weight.grad is not None
            counts[guess(weight.detach(), weight.grad)] += 1
        optimizer.step()
    return model, invariant, guesses


@torch.no_grad()
def accuracy(model: nn.Module, batches: int = 10) -> float:
    """The share of new images that the model names."""
    images = Images(seed=2)
    right = 0
    model.eval()
    for _ in range(batches):
        inputs, classes = images.batch()
        right += int((model(inputs).argmax(1) == classes).sum())
    return right / (batches * BATCH)


def table(invariant: normfx.ScaleInvariance, guesses: Mapping[str, Counter[str]]) -> Table:
    """The graph's word beside AdamP's guesses, for each matrix and each kernel."""
    shown = Table(title="scale-invariant?", box=None)
    for column in ("weight", "the graph", "because of", "AdamP: channel", "whole", "none"):
        shown.add_column(column, justify="left" if column in ("weight", "the graph") else "right")
    for name, counts in guesses.items():
        claim = invariant.get(name)
        view = "none" if claim is None else claim.view
        if claim is not None and view == "group":
            view = f"{claim.groups} groups"
        shares = [f"{counts[v] / counts.total():.0%}" for v in ("channel", "whole", "none")]
        shown.add_row(name, view, ", ".join(claim.norms) if claim else "-", *shares)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print what the graph and the guesses say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="steps to train (default: 400)")
    steps = parser.parse_args(arguments).steps
    start = time.perf_counter()
    model, invariant, guesses = train(steps)
    console = Console(highlight=False)
    console.print(table(invariant, guesses))
    console.print(f"accuracy after {steps} steps: {accuracy(model):.1%} of new images")
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
