"""The examples run, and print what they promise."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

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


TINY = ["--steps", "4", "--windows", "16", "--lowering", "eager"]


@pytest.fixture
def tiny(examples, monkeypatch):
    """A model of one block, in which there are three norms."""
    import char_lm
    import train_char_lm

    shape = dataclasses.replace(char_lm.SHAPE, width=32, depth=1)
    monkeypatch.setattr(char_lm, "SHAPE", shape)
    monkeypatch.setattr(train_char_lm, "SHAPE", shape)


def folds_of(printed: str) -> dict[str, tuple[str, str]]:
    """Norm nodes of each model, found and left, from the table of `show_folds`."""
    rows = [row.split() for row in printed.partition("norm nodes")[2].splitlines()]
    return {row[1]: (row[3], row[5]) for row in rows if row[1:2] in (["LN"], ["UN"])}


def test_train_char_lm(tiny, tmp_path, monkeypatch, capsys):
    import train_char_lm as example

    arguments = ["--norm", "LN,UN", "--seeds", "3", "--output", str(tmp_path), *TINY]
    assert example.main(arguments) == 0, "folding left a norm of UN, or moved a loss"
    folds = folds_of(capsys.readouterr().out)
    assert folds == {"LN": ("3", "3"), "UN": ("3", "0")}

    kept = json.loads((tmp_path / "results.json").read_text())["results"]
    assert kept.keys() == {"LN-3", "UN-3"}
    assert all(run["losses"][-1] < run["losses"][0] for run in kept.values())
    assert "<svg" in (tmp_path / "losses.svg").read_text()

    monkeypatch.setattr(example, "train", None)  # what is in the folder is not trained again
    monkeypatch.setattr(example, "show_folds", lambda *_: True)
    assert example.main(arguments) == 0
    with pytest.raises(SystemExit, match="give another --output"):
        example.main([*arguments, "--steps", "5"])


def test_remove_layernorm(tiny, tmp_path, capsys):
    import remove_layernorm as example

    arguments = ["--models", str(tmp_path / "models"), "--output", str(tmp_path), *TINY]
    # After four steps of training nothing is learned that a conversion could damage.
    assert example.main([*arguments, "--fine-tuning", "8", "--rounds", "1"]) == 0
    assert "0 of 3 norm nodes left" in capsys.readouterr().out
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [left for _, left, _ in stages] == [3, 0, 2, 1, 0, 0, 0]
    assert "<svg" in (tmp_path / "losses.svg").read_text()


def test_train_digits_vit(examples, tmp_path, capsys):
    import train_digits_vit as example

    arguments = ["--seeds", "0", "--epochs", "2", "--lowering", "eager", "--output", str(tmp_path)]
    assert example.main(arguments) == 0, "an answer has changed, or a norm is left"
    rows = [
        row.split() for row in capsys.readouterr().out.splitlines() if "%" in row and "|" in row
    ]
    assert {row[1]: row[9:14:2] for row in rows} == {
        "LN": ["5", "5", "0"],
        "BN": ["5", "0", "0"],
        "UN": ["5", "0", "0"],
    }
    kept = json.loads((tmp_path / "results.json").read_text())["results"]
    assert all(run["accuracies"][-1] > 1.5 / example.CLASSES for run in kept.values())


def test_moved_images_keep_what_is_in_them(examples):
    import train_digits_vit as example

    images = torch.full((50, example.SIDE, example.SIDE), -1.0)
    images[:, 3, 4] = torch.arange(50.0)
    moved = example.moved(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved.sum((1, 2)), images.sum((1, 2)))
    places = {tuple((row > -1).nonzero()[0].tolist()) for row in moved}
    assert places == {(y, x) for y in (2, 3, 4) for x in (3, 4, 5)}


def test_a_folded_norm_leaves_no_operator(tiny):
    """UN and BatchNorm: as many operators as with no norm at all."""
    import char_lm
    from folding import count_nodes
    from small_transformer import norm_layers

    layers = norm_layers(char_lm.SHAPE, 10)
    tokens = torch.zeros(1, 5, dtype=torch.int64)

    def operators(new_norm):
        return count_nodes(char_lm.CharLM(new_norm).eval(), tokens).operators

    none = operators(torch.nn.Identity)
    assert operators(layers["LN"]) > none
    assert operators(layers["BN"]) == operators(layers["UN"]) == none


def test_every_norm_starts_from_the_same_weights(examples):
    import train_char_lm as example

    first, *others = [example.new_model(norm, 100, seed=5) for norm in example.NORMS]
    weights = dict(first.named_parameters())
    for other in others:
        for name, weight in other.named_parameters():
            assert torch.equal(weight, weights[name]), name


def test_statistics_over_the_batch_know_the_future_in_training_alone(examples):
    """What docs/training.md says of BatchNorm, UN and PowerNorm in a causal model."""
    import train_char_lm as example

    tokens = torch.randint(90, (4, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90
    for norm in example.NORMS:
        model = example.new_model(norm, 100)
        with torch.no_grad():
            model.train()
            now = [copy.deepcopy(model)(t)[:, :-1] for t in (tokens, changed)]
            assert torch.equal(*now) == (norm in ("LN", "RMS")), norm
            model.eval()
            assert torch.equal(*(model(t)[:, :-1] for t in (tokens, changed))), norm
