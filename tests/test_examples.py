"""The examples run, and print what they promise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (EXAMPLES / f"{name}.py").exists():
            del sys.modules[name]


def test_scale_invariant_training(examples, capsys):
    import scale_invariant_training

    scale_invariant_training.main(["--steps", "20"])
    printed = capsys.readouterr().out
    views = {row.split()[0]: row.split()[1] for row in printed.splitlines() if ".weight" in row}
    assert views == {
        "0.weight": "channel",
        "3.weight": "channel",
        "6.weight": "4",
        "10.weight": "whole",
        "13.weight": "none",
    }
    assert "accuracy after 20 steps" in printed


def test_adamp_guesses_what_the_graph_says(examples):
    """In most of the steps: by layer where it has no view for groups."""
    import scale_invariant_training

    _, invariant, guesses = scale_invariant_training.train(20)
    for name, counts in guesses.items():
        view = "none" if name not in invariant else invariant[name].view
        assert counts.most_common(1)[0][0] == {"group": "whole"}.get(view, view)


def test_the_norms_of_invariant_weights_hardly_grow(examples):
    """By the projection, a step changes |w| in second order only."""
    import scale_invariant_training as example
    import torch

    torch.manual_seed(0)
    model, images = example.network(), example.Images(seed=1)
    invariant = example.normfx.scale_invariant_parameters(model)(images.batch()[0])
    optimizer = example.ProjectedAdam(model, invariant, lr=1e-3)
    inputs, classes = images.batch()
    torch.nn.functional.cross_entropy(model(inputs), classes).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, claim in invariant.items():
        if claim.view == "dead":
            continue
        after = model.get_parameter(name).detach()
        step = after - before[name] * (1 - 1e-3 * example.WEIGHT_DECAY * example.DECAY_RATIO)
        along = claim.dot(step, before[name]).abs()
        sizes = (claim.dot(step, step) * claim.dot(before[name], before[name])).sqrt()
        assert (along <= torch.finfo(torch.float32).eps ** 0.5 * sizes).all(), name
