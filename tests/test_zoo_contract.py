"""The comparisons of the zoo: what counts as kept, as reached, and as float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.zoo import beside_oracle
from benchmarks.zoo_contract import _InFloat64, drawn, is_kept, moved, ratios, table


def test_every_cast_is_one_to_float64():
    x = torch.randn(4, 8, dtype=torch.float64)
    with _InFloat64():
        for cast in (x.float(), x.half(), x.to(torch.float32), x.to(dtype=torch.bfloat16)):
            assert cast.dtype is torch.float64
        assert torch.zeros(2, dtype=torch.float32).dtype is torch.float64
        assert torch.equal(x.float().mean(-1, dtype=torch.float32), x.mean(-1))
        assert x.to(torch.int32).dtype is torch.int32
    assert x.float().dtype is torch.float32


def test_what_is_kept():
    exact = {"y": torch.ones(100, dtype=torch.float64)}
    unit = torch.finfo(torch.float32).eps
    eager = {"y": torch.full((100,), 1 + 4 * unit)}
    for steps, kept in ((8, True), (9, False), (-8, True)):
        got = {"y": torch.full((100,), 1 + steps * unit)}
        (numbers,) = ratios(got, eager, exact, gradients=False).values()
        assert is_kept(*numbers) == kept


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_a_number_that_is_not_finite_where_eager_is(special):
    exact = {"y": torch.ones(4, dtype=torch.float64)}
    got = torch.ones(4)
    got[1] = special
    (numbers,) = ratios({"y": got}, {"y": torch.ones(4)}, exact, gradients=False).values()
    assert not is_kept(*numbers)
    (numbers,) = ratios({"y": got}, {"y": got.clone()}, exact, gradients=False).values()
    assert is_kept(*numbers)


def test_a_gradient_of_zero_is_held_to_the_largest_of_the_model():
    exact = {"a": torch.zeros(4, dtype=torch.float64), "b": torch.ones(4, dtype=torch.float64)}
    eager = {"a": torch.zeros(4), "b": torch.ones(4)}
    got = {"a": torch.full((4,), torch.finfo(torch.float32).eps / 2), "b": torch.ones(4)}
    assert all(is_kept(*n) for n in ratios(got, eager, exact, gradients=True).values())
    assert not all(is_kept(*n) for n in ratios(got, eager, exact, gradients=False).values())


def test_the_control_is_another_rounding_of_each_weight():
    model = nn.Linear(64, 64).bfloat16()
    other = moved(model, 1)
    change = (other.weight.double() / model.weight.double() - 1).abs()
    assert 0 < change.max() <= torch.finfo(torch.bfloat16).eps
    assert (change > 0).double().mean() > 0.2


def test_other_inputs_are_of_the_same_kind():
    given = {
        "input_ids": torch.arange(12).view(2, 6),
        "x": 3 + 2 * torch.randn(1000),
        "mask": torch.ones(2),
    }
    other = drawn(given, 1)
    assert torch.equal(other["input_ids"].sort(-1).values, given["input_ids"])
    assert abs(other["x"].mean() - 3) < 0.5
    assert torch.equal(other["mask"], given["mask"])


DEAR = {"rule": "fold-affine-into-linear", "code": "not-worth-it"}


def _site(kind, weight, actions):
    return {
        "kind": kind,
        "on_weight": False,
        "weight": weight,
        "bias": False,
        "origin": "algebra",
        "actions": actions,
        "records": [] if actions else [DEAR],
    }


def _row(*sites):
    return {"report": {"graphs": [{"sites": [_site(*site) for site in sites]}]}}


def test_beside_the_oracle():
    names = ("recentrable", "affine_foldable", "static_foldable_back", "static_foldable_forward")
    oracle = {"a": dict.fromkeys(names, 1), "b": dict.fromkeys(names, 0) | {"affine_foldable": 2}}
    rows = {
        "a": _row(
            ("LayerNorm", True, ["recentre", "fold-affine-into-linear"]),
            ("LayerNorm", True, ["fold-affine-into-linear"]),
            ("BatchNorm", True, ["fold-statistics-into-previous"]),
            ("BatchNorm", True, ["telescope"]),
        ),
        "b": _row(
            ("RMSNorm", True, ["hoist"]), ("RMSNorm", False, ["drop-unread"]), ("RMSNorm", True, [])
        ),
    }
    lines = beside_oracle(rows, oracle)
    assert lines[2].endswith("| 1 | 1 | 1 (100.0%) | 0 |")
    assert lines[3].endswith("| 3 | 3 | 2 (66.7%) | 1 |")
    assert lines[-1] == "| b | weights and biases of norms into what follows | 2 | 1 | 1 |"


def test_the_table_names_what_is_out_of_contract():
    draw = {"kept": True, "worst": "out", "ratio": 1.0, "broken": 0, "tensors": 2}
    out = draw | {"kept": False, "ratio": 3.0, "broken": 1}
    rows = {
        "fine": {"status": "kept", "draws": [draw]},
        "loud": {"status": "amplified", "draws": [out, draw], "median": 2.0, "control": 4.0},
        "none": {"status": "not run", "error": "eager: no kernel"},
    }
    lines = table(rows)
    assert lines[0] == "- 3 families: kept 1, amplified 1, not run 1"
    assert lines[-2] == "| loud | 1 of 2, out | 1 of 2 | 3.00 | 2.00 | 4.00 | amplified |"
    assert lines[-1].endswith("eager: no kernel |")
