"""A character-level language model of Python source, its data and its training.

The text is the standard library that the interpreter came with: nothing is downloaded. Sizes and
hyper-parameters are those of nanoGPT's small character model for a CPU (`train_shakespeare_char`
with the arguments of its README), and the same for every norm: none was chosen by a result.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from small_transformer import Shape, Transformer, initialise, learning_rate, optimizer_for
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT, BATCH, PEAK, CLIP = 64, 12, 1e-3, 1.0
SHAPE = Shape(width=128, depth=4, heads=4, causal=True)
# Tab, newline and the printable characters of ASCII; all others are one more.
CHARACTERS = "\t\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(CHARACTERS) + 1
# Folders of tests and of installed packages: much of the same, and not the library itself.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}
HELD_OUT_EVERY = 20
EVALUATIONS = 20


class CharLM(nn.Module):
    """Tokens to the logits of the next character.

    Shapes: (batch, tokens) int64, at most CONTEXT of them; returns (batch, tokens, VOCABULARY).
    """

    def __init__(self, new_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, SHAPE.width)
        self.position = nn.Embedding(CONTEXT, SHAPE.width)
        self.transformer = Transformer(SHAPE, new_norm)
        self.head = nn.Linear(SHAPE.width, VOCABULARY)
        initialise(self, SHAPE.depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.transformer(x))


@dataclass(frozen=True, slots=True)
class Text:
    """The characters of the training files, and windows of the others.

    Attributes:
        train: (characters,) uint8.
        held_out: (windows, CONTEXT + 1) int64; two windows have no character in common.
        description: what it is, for the table.
    """

    train: Tensor
    held_out: Tensor
    description: str


def read_text(windows: int) -> Text:
    """Python's standard library; every twentieth file is held out.

    Args:
        windows: how many of the held-out files, evenly spread over them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path.relative_to(root) for path in root.rglob("*.py") if not LEFT_OUT & set(path.parts)
    )
    table = np.full(256, len(CHARACTERS), dtype=np.uint8)
    table[np.frombuffer(CHARACTERS.encode(), dtype=np.uint8)] = np.arange(len(CHARACTERS))

    def characters(part: list[Path]) -> Tensor:
        raw = b"\n".join((root / path).read_bytes() for path in part)
        return torch.from_numpy(table[np.frombuffer(raw, dtype=np.uint8)])

    train = characters([path for i, path in enumerate(files) if i % HELD_OUT_EVERY])
    held_out = characters(files[::HELD_OUT_EVERY])
    starts = torch.linspace(0, len(held_out) // (CONTEXT + 1) - 1, windows).long() * (CONTEXT + 1)
    description = (
        f"{len(files)} files of Python's standard library, {len(train) / 1e6:.1f} million "
        f"characters; {windows} windows of {CONTEXT} of the {len(files[::HELD_OUT_EVERY])} files "
        f"held out"
    )
    return Text(train, _windows(held_out, starts), description)


def _windows(characters: Tensor, starts: Tensor) -> Tensor:
    return characters[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)].long()


def batches(text: Text, seed: int) -> Iterator[Tensor]:
    """Random windows without end, (BATCH, CONTEXT + 1); a seed gives every norm the same ones."""
    generator = torch.Generator().manual_seed(seed)
    last = len(text.train) - CONTEXT - 1
    while True:
        yield _windows(text.train, torch.randint(last, (BATCH,), generator=generator))


def loss_of(logits: Tensor, windows: Tensor) -> Tensor:
    """Cross entropy of the next character, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(call: Callable[[Tensor], Tensor], windows: Tensor, batch: int = 64) -> float:
    """Mean loss over the windows, of which there are a multiple of `batch`."""
    losses = [loss_of(call(part[:, :-1]), part) for part in windows.split(batch)]
    return torch.stack(losses).double().mean().item()


@dataclass(slots=True)
class Curve:
    """Held-out losses during a training.

    Attributes:
        steps: when they were taken.
        losses: in nats a character; over every fourth of the held-out windows.
        final: the last, over all of them.
        seconds: processor time of the steps.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    final: float = float("nan")
    seconds: float = 0.0


def train(
    model: nn.Module,
    text: Text,
    *,
    steps: int,
    seed: int,
    peak: float = PEAK,
    evaluations: int = EVALUATIONS,
    after_step: Callable[[int], None] | None = None,
) -> Curve:
    """Trains a model; leaves it in eval mode.

    Args:
        model: changed in place.
        text: what to train on.
        steps: how many.
        seed: of the order of the batches.
        peak: the highest learning rate.
        evaluations: points of the curve.
        after_step: called with the number of each step, in training mode.
    """
    optimizer, curve = optimizer_for(model, peak), Curve()
    few = text.held_out[::4]
    stream = batches(text, seed)
    every = max(steps // evaluations, 1)
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        start = time.process_time()
        windows = next(stream)
        optimizer.zero_grad()
        loss_of(model(windows[:, :-1]), windows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        curve.seconds += time.process_time() - start
        if after_step is not None:
            after_step(step)
        if (step + 1) % every == 0:
            curve.steps.append(step + 1)
            curve.losses.append(held_out_loss(model.eval(), few))
    curve.final = held_out_loss(model.eval(), text.held_out)
    return curve
