"""The contract: what a comparison says of one tensor."""

from __future__ import annotations

import math

import pytest
import torch

from normfx.numerics import FACTOR, Comparison, compare, ulp_error

ULP = torch.finfo(torch.float32).eps
EXACT = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_one_ulp_is_that_of_the_largest_value():
    near = EXACT.float()
    near[2] += 2 * ULP
    found = compare(near, EXACT.float(), EXACT)
    assert found.ulp == 2 * ULP
    assert found.error_ulp == 1
    assert found.relative == ULP
    assert found.within


def test_twice_the_error_of_eager_is_allowed():
    eager, near, far = EXACT.float(), EXACT.float(), EXACT.float()
    eager[0] += 8 * ULP
    near[0] += FACTOR * 8 * ULP
    far[0] += FACTOR * 8 * ULP + ULP
    assert compare(near, eager, EXACT).within
    assert not compare(far, eager, EXACT).within
    assert str(compare(near, eager, EXACT)) == "error 1.91e-06, eager 9.54e-07, ulp 2.38e-07"


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stands_where_eager_has_it(special):
    eager = torch.tensor([1.0, special, 0.5])
    assert compare(eager.clone(), eager, EXACT).within
    assert "at other places than eager" in compare(EXACT.float(), eager, EXACT).problem
    assert "at other places than eager" in compare(eager, EXACT.float(), EXACT).problem


def test_nothing_finite_is_nothing_to_compare():
    nothing = torch.full((3,), math.nan)
    assert compare(nothing, nothing, EXACT) == Comparison()
    assert compare(torch.empty(0), torch.empty(0), torch.empty(0)).within


def test_shape_dtype_and_integers():
    assert compare(EXACT[:2], EXACT, EXACT).problem == "shape (2,), eager has (3,)"
    assert compare(EXACT.half(), EXACT, EXACT).problem == "torch.float16, eager has torch.float64"
    whole = torch.tensor([1, 2])
    assert compare(whole, whole, whole).within
    assert compare(whole + 1, whole, whole).problem == "differs from eager"


def test_complex_numbers_are_two_real_ones():
    exact = torch.complex(EXACT, EXACT)
    near = exact.to(torch.complex64)
    assert compare(near, near, exact).error == 0


def test_errors_of_several_inputs_are_taken_together():
    lucky = Comparison(error=3.0, eager=1.0, size=8.0, ulp=1.0)
    other = Comparison(error=2.0, eager=2.0, size=8.0, ulp=1.0)
    assert not lucky.within
    assert lucky.joined(other).within
    assert lucky.joined(Comparison(problem="missing")).problem == "missing"


def test_a_share_of_nothing():
    assert Comparison().error_ulp == 0
    assert Comparison(error=1.0).relative == math.inf


def test_an_element_near_zero_counts_by_its_row():
    exact = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    got = exact.float()
    got[0, 1] = ULP / math.sqrt(2)
    assert ulp_error(got, exact) == pytest.approx(1, rel=ULP)
