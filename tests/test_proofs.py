"""The identities that normfx relies on, checked by a computer algebra system: nothing here runs normfx.

Each is a polynomial or rational identity in n symbols, reduced to zero; a small n stands for all because every
step is the same for each coordinate.
"""

from __future__ import annotations

import pytest
import sympy as sp

N = 4
X = sp.symbols(f"x0:{N}", real=True)
Y = sp.symbols(f"y0:{N}", real=True)
EPS = sp.Symbol("eps", positive=True)


def mean(values):
    return sum(values) / sp.Integer(len(values))


def variance(values):
    centre = mean(values)
    return mean([(v - centre) ** 2 for v in values])


def layer_norm(values, eps=EPS):
    centre = mean(values)
    root = sp.sqrt(sp.expand(variance(values)) + eps)
    return [(v - centre) / root for v in values]


def rms_norm(values, eps=EPS):
    root = sp.sqrt(sp.expand(mean([v**2 for v in values])) + eps)
    return [v / root for v in values]


def assert_zero(expression):
    assert sp.simplify(sp.expand(expression)) == 0


def test_layer_norm_is_the_rms_norm_of_the_centred_vector_with_the_same_eps():
    centre = mean(X)
    for a, b in zip(layer_norm(X), rms_norm([x - centre for x in X]), strict=True):
        assert_zero(a - b)


def test_layer_norm_does_not_see_the_mean_of_its_input():
    shift = sp.Symbol("c", real=True)
    for a, b in zip(layer_norm(X), layer_norm([x + shift for x in X]), strict=True):
        assert_zero(a - b)


@pytest.mark.parametrize(
    "form",
    [
        mean([x * x for x in X]) - mean(X) ** 2,
        mean([(x - mean(X)) * x for x in X]),
        (sum(x * x for x in X) - sum(X) ** 2 / sp.Integer(N)) / N,
        sum((x - y) ** 2 for x in X for y in X) / (2 * sp.Integer(N) ** 2),
        sp.Rational(N - 1, N) * sum((x - mean(X)) ** 2 for x in X) / (N - 1),
    ],
    ids=["E[x^2]-E[x]^2", "E[(x-m)x]", "sums", "pairs", "unbiased"],
)
def test_every_form_of_the_variance_is_the_variance(form):
    assert_zero(form - variance(X))


def test_the_mean_of_the_square_of_a_shifted_vector_is_no_variance():
    shift = sp.Symbol("c", real=True)
    excess = sp.expand(mean([(x - shift) ** 2 for x in X]) - variance(X))
    assert_zero(excess - (mean(X) - shift) ** 2)


def test_a_constant_goes_in_and_out_of_a_root_with_eps():
    k, s = sp.symbols("k s", positive=True)
    assert_zero(sp.sqrt(k * s + EPS) - sp.sqrt(k) * sp.sqrt(s + EPS / k))
    assert_zero((sp.sqrt(k * s) + EPS) - sp.sqrt(k) * (sp.sqrt(s) + EPS / sp.sqrt(k)))


def test_the_floor_of_a_root_is_the_root_of_the_floor():
    s = sp.Symbol("s", nonnegative=True)
    # Both maxima take the same branch, for s - eps^2 and sqrt(s) - eps have one sign: their quotient is positive.
    assert_zero((s - EPS**2) - (sp.sqrt(s) - EPS) * (sp.sqrt(s) + EPS))
    assert (sp.sqrt(s) + EPS).is_positive
    # And on each branch they are the same number.
    assert sp.sqrt(EPS**2) == EPS


def test_a_floor_of_zero_under_a_sum_of_squares_does_nothing():
    real = sp.Symbol("r", real=True)
    assert sp.Max(real**2, 0) == real**2


def test_the_affine_part_of_a_norm_goes_into_the_linear_after_it():
    rows, cols = 3, N
    weight = sp.Matrix(rows, cols, sp.symbols(f"w0:{rows * cols}"))
    bias = sp.Matrix(sp.symbols(f"c0:{rows}"))
    gamma, beta = sp.Matrix(sp.symbols(f"g0:{cols}")), sp.Matrix(sp.symbols(f"b0:{cols}"))
    u = sp.Matrix(X)
    before = weight * (sp.diag(*gamma) * u + beta) + bias
    after = (weight * sp.diag(*gamma)) * u + (bias + weight * beta)
    assert (before - after).expand() == sp.zeros(rows, 1)


def test_a_static_affine_goes_into_the_linear_before_it():
    rows, cols = 3, N
    weight = sp.Matrix(rows, cols, sp.symbols(f"w0:{rows * cols}"))
    bias, scale = sp.Matrix(sp.symbols(f"c0:{rows}")), sp.Matrix(sp.symbols(f"s0:{rows}"))
    mu, beta = sp.Matrix(sp.symbols(f"m0:{rows}")), sp.Matrix(sp.symbols(f"b0:{rows}"))
    u = sp.Matrix(X)
    before = sp.diag(*scale) * (weight * u + bias - mu) + beta
    after = (sp.diag(*scale) * weight) * u + (sp.diag(*scale) * (bias - mu) + beta)
    assert (before - after).expand() == sp.zeros(rows, 1)


def test_a_linear_with_centred_columns_has_a_centred_output():
    rows = 3
    weight = sp.Matrix(rows, N, sp.symbols(f"w0:{rows * N}"))
    bias = sp.Matrix(sp.symbols(f"c0:{rows}"))
    centring = sp.eye(rows) - sp.ones(rows, rows) / rows
    u = sp.Matrix(X)
    output = (centring * weight) * u + centring * bias
    plain = weight * u + bias
    assert sp.expand(sum(output)) == 0
    assert (output - (plain - sp.ones(rows, 1) * sum(plain) / rows)).expand() == sp.zeros(rows, 1)


def test_a_row_scale_passes_a_linear_without_its_bias():
    r = sp.Symbol("r", positive=True)
    weight = sp.Matrix(3, N, sp.symbols(f"w0:{3 * N}"))
    u = sp.Matrix(X)
    assert (weight * (u * r) - (weight * u) * r).expand() == sp.zeros(3, 1)


def test_a_norm_multiplied_out_is_the_norm():
    m, r, w, b, x = sp.symbols("m r w b x", real=True)
    assert_zero(x * (w * r) + (b - m * w * r) - ((x - m) * r * w + b))


def test_two_channels_fewer_and_one_more_say_the_same_of_a_centred_vector():
    """The mean square of a centred vector of d entries from its first d - 1 (CRMSNorm)."""
    first = X[:-1]
    whole = [*first, -sum(first)]
    assert_zero(mean([v**2 for v in whole]) - (sum(v**2 for v in first) + sum(first) ** 2) / N)


def test_the_gradient_of_an_rms_norm_is_the_stated_one():
    cotangent = sp.Matrix(Y)
    square = mean([x**2 for x in X]) + EPS
    outputs = [x / sp.sqrt(square) for x in X]
    normed, r = sp.Matrix(outputs), 1 / sp.sqrt(square)
    stated = r * (cotangent - normed * (cotangent.dot(normed) / N))
    for x, given in zip(X, stated, strict=True):
        derived = sum(y * sp.diff(out, x) for y, out in zip(Y, outputs, strict=True))
        assert_zero(sp.together(derived - given))
