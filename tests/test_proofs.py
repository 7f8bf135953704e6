"""The identities that normfx relies on, checked by a computer algebra system: nothing here runs normfx.

Each is a polynomial or rational identity in n symbols, reduced to zero; a small n stands for all because every
step is the same for each coordinate.
"""

from __future__ import annotations

import itertools

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


def test_a_post_norm_stream_telescopes():
    """Two blocks n(h + B f(A h + a) + b) with any f: no norm is left but for one scale and shift."""
    width = 2
    function = sp.Function("f")

    def column(name):
        return sp.Matrix(sp.symbols(f"{name}0:{width}"))

    def square(name):
        return sp.Matrix(width, width, sp.symbols(f"{name}0:{width * width}"))

    def branch(h, a_weight, a_bias, b_weight, b_bias):
        return b_weight * (a_weight * h + a_bias).applyfunc(function) + b_bias

    x = column("x")
    a, b = (square("A"), square("C")), (square("B"), square("D"))
    a_bias, b_bias = (column("a"), column("c")), (column("b"), column("d"))
    scale, mu, shift = ([column(name + "p"), column(name + "q")] for name in ("s", "m", "t"))
    h = x
    for layer in range(2):
        summed = h + branch(h, a[layer], a_bias[layer], b[layer], b_bias[layer])
        h = sp.diag(*scale[layer]) * (summed - mu[layer]) + shift[layer]

    one = sp.diag(*scale[0])
    u = x + branch(x, a[0], a_bias[0], b[0], b_bias[0] - mu[0])
    u = u + branch(
        u,
        a[1] * one,
        a_bias[1] + a[1] * shift[0],
        one.inv() * b[1],
        one.inv() * (b_bias[1] + shift[0] - mu[1]),
    )
    telescoped = sp.diag(*scale[1]) * one * u + shift[1]
    assert (h - telescoped).applyfunc(sp.simplify) == sp.zeros(width, 1)


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


# -- means over axes -----------------------------------------------------------------------------

ROWS, COLUMNS = 2, 3
GRID = [sp.symbols(f"a{i}_0:{COLUMNS}", real=True) for i in range(ROWS)]
ALL = [(i, j) for i in range(ROWS) for j in range(COLUMNS)]
OPERAND = [sp.symbols(f"g{i}_0:{COLUMNS}", real=True) for i in range(ROWS)]
COLUMN = sp.symbols(f"c0:{ROWS}", real=True)


def test_a_mean_of_means_is_the_mean_over_both():
    whole = mean([GRID[i][j] for i, j in ALL])
    of_rows = mean([mean(row) for row in GRID])
    of_columns = mean([mean([row[j] for row in GRID]) for j in range(COLUMNS)])
    assert_zero(of_rows - whole)
    assert_zero(of_columns - whole)


def test_a_mean_of_a_mean_times_what_is_constant_along_it_is_the_mean_of_the_product():
    two_steps = mean([COLUMN[i] * mean(GRID[i]) for i in range(ROWS)])
    assert_zero(two_steps - mean([COLUMN[i] * GRID[i][j] for i, j in ALL]))
    # What varies along the inner mean too cannot go in: the difference is a covariance.
    inner = mean([OPERAND[i][0] * mean(GRID[i]) for i in range(ROWS)])
    assert sp.expand(inner - mean([OPERAND[i][j] * GRID[i][j] for i, j in ALL])) != 0


def test_what_is_constant_along_the_axes_stands_in_front_of_a_mean():
    for i in range(ROWS):
        assert_zero(
            mean([COLUMN[i] * a**2 for a in GRID[i]]) - COLUMN[i] * mean([a**2 for a in GRID[i]])
        )


@pytest.mark.parametrize(
    "quantity",
    [
        [a for row in GRID for a in row],
        [
            a * g
            for row, gs in zip(GRID, OPERAND, strict=True)
            for a, g in zip(row, gs, strict=True)
        ],
        [a**2 for row in GRID for a in row],
    ],
    ids=["x", "x*g", "x^2"],
)
def test_a_mean_of_squares_less_the_square_of_the_mean_is_a_sum_of_squares(quantity):
    n = sp.Integer(len(quantity))
    pairs = [(q - p) ** 2 for k, p in enumerate(quantity) for q in quantity[:k]]
    assert_zero(mean([q**2 for q in quantity]) - mean(quantity) ** 2 - sum(pairs) / n**2)
    assert all(pair.is_nonnegative for pair in pairs)


def test_a_mean_of_squares_pays_for_no_larger_share_of_the_square_of_the_mean():
    """With all of the quantity alike the two are equal: a factor above one makes it negative."""
    alike = dict.fromkeys(X, sp.Integer(1))
    difference = mean([x**2 for x in X]) - sp.Rational(3, 2) * mean(X) ** 2
    assert difference.subs(alike) < 0


def test_the_variance_of_a_masked_vector_is_made_of_masked_moments():
    """sum m (x - mu)^2 / sum m = E[m x^2] / E[m] - mu^2, with mu = sum m x / sum m."""
    mask = sp.symbols(f"k0:{N}", positive=True)
    mu = sum(k * x for k, x in zip(mask, X, strict=True)) / sum(mask)
    spelled = sum(k * (x - mu) ** 2 for k, x in zip(mask, X, strict=True)) / sum(mask)
    moments = mean([k * x**2 for k, x in zip(mask, X, strict=True)]) / mean(mask) - mu**2
    assert sp.cancel(spelled - moments) == 0
    assert sp.cancel(mu - mean([k * x for k, x in zip(mask, X, strict=True)]) / mean(mask)) == 0
    # And with all of the mask alike it is the variance.
    assert_zero(sp.cancel(spelled).subs(dict.fromkeys(mask, sp.Integer(1))) - variance(X))


def test_a_sum_of_products_is_a_number_of_elements_times_a_mean():
    dot = sum(x * y for x, y in zip(X, Y, strict=True))
    assert_zero(dot - N * mean([x * y for x, y in zip(X, Y, strict=True)]))
    matrix, right = sp.Matrix(GRID), sp.Matrix(sp.symbols(f"v0:{COLUMNS}"))
    left = sp.Matrix(COLUMN)
    row_by_row = matrix * right
    for i in range(ROWS):
        products = [GRID[i][j] * right[j] for j in range(COLUMNS)]
        assert_zero(row_by_row[i] - COLUMNS * mean(products))
    bilinear = (left.T * matrix * right)[0]
    everything = [GRID[i][j] * left[i] * right[j] for i, j in ALL]
    assert_zero(bilinear - ROWS * COLUMNS * mean(everything))


def test_a_gram_matrix_is_no_mean_over_one_axis():
    """Its elements are products of two rows: along one axis of x alone there is no such value."""
    gram = sp.Matrix(GRID) * sp.Matrix(GRID).T
    assert sp.expand(gram[0, 1] - COLUMNS * mean([a * a for a in GRID[0]])) != 0


def test_a_norm_of_groups_through_a_view_is_a_norm_over_two_axes():
    """C channels of S elements, viewed as (G, C/G * S): statistics over the second dim are over (C/G, S)."""
    groups, inner, size = 2, 2, 2
    flat = sp.symbols(f"t0:{groups * inner * size}", real=True)
    tensor = sp.Array(flat).reshape(groups * inner, size)
    viewed = sp.Array(flat).reshape(groups, inner * size)
    cut = sp.Array(flat).reshape(groups, inner, size)
    back = []
    for k in range(groups):
        row = [viewed[k, i] for i in range(inner * size)]
        apart = [cut[k, c, s] for c in range(inner) for s in range(size)]
        channels = [tensor[k * inner + c, s] for c in range(inner) for s in range(size)]
        assert row == apart == channels
        assert_zero(
            mean(row) - mean([mean([cut[k, c, s] for s in range(size)]) for c in range(inner)])
        )
        back += layer_norm(row)
    normed = sp.Array(back).reshape(groups * inner, size)
    for c in range(groups * inner):
        group = [tensor[c // inner * inner + d, s] for d in range(inner) for s in range(size)]
        for s in range(size):
            assert normed[c, s] == (tensor[c, s] - mean(group)) / sp.sqrt(
                sp.expand(variance(group)) + EPS
            )


# -- families ------------------------------------------------------------------------------------


def test_the_compressed_statistic_in_moments():
    """(sum u^2 + (sum u)^2) / (n + 1) = n / (n + 1) * (m2 + n m1^2), the form that is looked for."""
    n = sp.Integer(N)
    stated = (sum(x**2 for x in X) + sum(X) ** 2) / (n + 1)
    assert_zero(stated - n / (n + 1) * (mean([x**2 for x in X]) + n * mean(X) ** 2))
    # With eps under the root: the number in front and eps as they are rewritten.
    share, square = n / (n + 1), mean([x**2 for x in X]) + n * mean(X) ** 2
    assert_zero(
        1 / sp.sqrt(sp.expand(stated) + EPS)
        - 1 / sp.sqrt(share) / sp.sqrt(sp.expand(square) + EPS / share)
    )


def test_a_compressed_norm_is_the_first_elements_of_the_norm_of_the_whole_vector():
    whole = [*X, -sum(X)]
    assert_zero(sum(whole))
    root = sp.sqrt(sp.expand((sum(x**2 for x in X) + sum(X) ** 2) / sp.Integer(N + 1)) + EPS)
    for x, normed in zip(X, rms_norm(whole), strict=False):
        assert_zero(x / root - normed)
    for a, b in zip(rms_norm(whole), layer_norm(whole), strict=True):
        assert_zero(a - b)


def test_a_global_response_in_means_has_its_eps_divided_by_the_root_of_the_number():
    """x G / (mean G + eps) with G = sqrt(n m2) is x R / (mean R + eps / sqrt(n)) with R = sqrt(m2)."""
    squares = sp.symbols("s0:3", positive=True)  # the m2 of three channels
    n, x = sp.Symbol("n", positive=True), X[0]
    norms, roots = [sp.sqrt(n * s) for s in squares], [sp.sqrt(s) for s in squares]
    for norm, root in zip(norms, roots, strict=True):
        ours = x * root / (mean(roots) + EPS / sp.sqrt(n))
        assert sp.simplify(x * norm / (mean(norms) + EPS) - ours) == 0


def test_a_global_response_without_eps_does_not_see_the_scale_of_its_input():
    k = sp.Symbol("k", positive=True)
    squares = sp.symbols("s0:3", positive=True)
    roots = [sp.sqrt(s) for s in squares]
    scaled = [sp.sqrt(k**2 * s) for s in squares]
    for a, b in zip(roots, scaled, strict=True):
        assert sp.simplify(b / mean(scaled) - a / mean(roots)) == 0


def test_a_local_response_in_units_of_its_statistic():
    """x (k + alpha s)^-beta = alpha^-beta x (s + k / alpha)^-beta, and back with alpha from the factor."""
    alpha, beta, k = sp.symbols("alpha beta k", positive=True)
    s, x = sp.Symbol("s", nonnegative=True), X[0]
    stated = x * (k + alpha * s) ** -beta
    ours = alpha**-beta * x * (s + k / alpha) ** -beta
    assert sp.simplify(sp.powsimp(sp.expand_power_base(stated / ours, force=True))) == 1
    front = alpha**-beta
    assert sp.simplify(front ** (-1 / beta)) == alpha
    # A further factor c > 0 goes into alpha and k.
    c = sp.Symbol("c", positive=True)
    grown = alpha * c ** (-1 / beta)
    both = c * (k + alpha * s) ** -beta / (k * c ** (-1 / beta) + grown * s) ** -beta
    at = {alpha: sp.Rational(1, 2), beta: sp.Rational(3, 4), k: 2, s: sp.Rational(7, 3), c: 5}
    assert abs(sp.N(both.subs(at), 30) - 1) < sp.Rational(1, 10**25)


def test_a_window_of_zeros_around_divides_by_its_size():
    """The mean over a window that reaches over the end: the squares within, over the size."""
    size = 3
    padded = [0, *X, 0]
    for i in range(N):
        window = [X[j] for j in range(i - 1, i + 2) if 0 <= j < N]
        assert_zero(mean(padded[i : i + size]) - sum(window) / sp.Integer(size))


def test_a_factor_goes_out_of_a_maximum():
    k = sp.Symbol("k", positive=True)
    a, b = sp.symbols("a b", real=True)
    # Both maxima take the same branch, and on each branch they are the same number.
    assert_zero((k * a - b) - k * (a - b / k))
    assert_zero(k * (b / k) - b)


def test_a_maximum_with_what_is_negative_is_what_is_not():
    real, low = sp.Symbol("r", real=True), sp.Symbol("l", nonpositive=True)
    assert sp.Max(real**2, low) == real**2


def test_a_mean_over_the_batch_and_over_one_element_differ():
    """The two roots of an EvoNorm are of variances over other axes: no identity joins them."""
    over_all = variance([GRID[i][j] for i, j in ALL])
    within = mean([variance(row) for row in GRID])
    assert_zero(over_all - within - variance([mean(row) for row in GRID]))


# -- given statistics ----------------------------------------------------------------------------

GROUPS, TAPS = 2, 2


def given_statistics(channels):
    """A norm with given statistics, and the (s, t) of s * y + t that it is, for each channel."""
    w, b, m = (sp.symbols(f"{name}0:{channels}", real=True) for name in "wbm")
    v = sp.symbols(f"v0:{channels}", nonnegative=True)
    s = [w[o] / sp.sqrt(v[o] + EPS) for o in range(channels)]
    t = [b[o] - m[o] * s[o] for o in range(channels)]
    return lambda y, o: w[o] * (y - m[o]) / sp.sqrt(v[o] + EPS) + b[o], s, t


def test_given_statistics_go_into_the_operator_before_them():
    """s (V x + c) + t = (s V) x + (s c + t): a convolution is such a V x at each place, borders too."""
    norm, s, t = given_statistics(3)
    weight, c = sp.Matrix(3, N, sp.symbols(f"k0:{3 * N}")), sp.symbols("c0:3")
    for at_a_border in (False, True):  # where it reads zeros in place of some x
        x = sp.Matrix([0, *X[1:]] if at_a_border else X)
        folded = (sp.diag(*s) * weight) * x + sp.diag(*s) * sp.Matrix(c) + sp.Matrix(t)
        for o in range(3):
            assert_zero(norm((weight * x)[o] + c[o], o) - folded[o])


def test_neutral_statistics_leave_what_they_read():
    """(x - 0) / sqrt((1 - eps) + eps) * 1 + t = x + t, as `bake_` leaves a norm."""
    x, t = sp.symbols("x t", real=True)
    assert_zero((x - 0) / sp.sqrt((1 - EPS) + EPS) * 1 + t - (x + t))


def test_a_shift_may_stay_in_the_norm():
    """Of an operator without bias: s (V x) + t = norm((s V) x) with the neutral statistics and the bias t."""
    norm, s, t = given_statistics(3)
    weight = sp.Matrix(3, N, sp.symbols(f"k0:{3 * N}"))
    for o, folded in enumerate((sp.diag(*s) * weight) * sp.Matrix(X)):
        neutral = folded / sp.sqrt((1 - EPS) + EPS) + t[o]
        assert_zero(norm((weight * sp.Matrix(X))[o], o) - neutral)


def test_given_statistics_go_into_a_transposed_convolution_before_them():
    """Its weight is (groups * in, out of a group, taps); its channels are numbered by (group, out)."""
    inner, outer = 2, 3
    norm, s, t = given_statistics(GROUPS * outer)
    shape = GROUPS * inner, outer, TAPS
    weight = sp.Array(sp.symbols(f"k0:{GROUPS * inner * outer * TAPS}"), shape)
    c = sp.symbols(f"c0:{GROUPS * outer}")
    x = sp.Array(sp.symbols(f"x0:{GROUPS * inner * TAPS}"), (GROUPS * inner, TAPS))

    def made(weight, group, out):
        """What the taps that meet at one place add up to."""
        rows = range(group * inner, (group + 1) * inner)
        return sum(weight[i, out, tap] * x[i, tap] for i in rows for tap in range(TAPS))

    # as the rule scales it: unflattened to (groups, in, out, taps), times s as (groups, 1, out, 1)
    unflattened = weight.reshape(GROUPS, inner, outer, TAPS)
    by_group = sp.Array(s).reshape(GROUPS, outer)
    scaled = sp.Array(
        [
            unflattened[g, i, o, tap] * by_group[g, o]
            for g in range(GROUPS)
            for i in range(inner)
            for o in range(outer)
            for tap in range(TAPS)
        ],
        shape,
    )
    for group in range(GROUPS):
        for out in range(outer):
            channel = group * outer + out
            folded = made(scaled, group, out) + s[channel] * c[channel] + t[channel]
            assert_zero(norm(made(weight, group, out) + c[channel], channel) - folded)


POSITIVE = sp.Symbol("c", positive=True)


def test_a_norm_without_eps_does_not_see_a_factor():
    for norm in (layer_norm, rms_norm):
        for a, b in zip(norm(X, 0), norm([POSITIVE * x for x in X], 0), strict=True):
            assert_zero(a - b)


def test_a_constant_beside_a_scaled_vector_is_dead_only_where_the_mean_is_subtracted():
    """c x + b = c (x + b) + (1 - c) b, of which a LayerNorm over what shares b sees c (x + b) at most."""
    b = sp.Symbol("b", real=True)
    scaled = [POSITIVE * x + b for x in X]
    for a, e in zip(layer_norm(scaled, 0), layer_norm([x + b for x in X], 0), strict=True):
        assert_zero(a - e)
    values = dict(zip(X, range(1, N + 1), strict=True)) | {POSITIVE: 2, b: 1}
    seen = rms_norm(scaled, 0)[0] - rms_norm([x + b for x in X], 0)[0]
    assert sp.simplify(seen.subs(values)) != 0


def test_a_gradient_is_at_right_angles_to_what_the_scale_of_is_not_seen():
    """<w, dL/dw> = 0, of a weight in front of a norm and through a power (Euler)."""
    weights = sp.symbols("w0:2", real=True)
    made = [weights[0] * X[i] + weights[1] * Y[i] for i in range(3)]
    for power in (1, 2):
        loss = rms_norm([m**power for m in made], 0)[0]
        along = sum(w * sp.diff(loss, w) for w in weights)
        assert_zero(along)


def test_what_is_added_to_all_keys_is_not_seen_by_a_softmax():
    scores = [sp.exp(X[0] * Y[i]) for i in range(3)]
    moved = [sp.exp(X[0] * (Y[i] + X[1])) for i in range(3)]
    for a, b in zip(scores, moved, strict=True):
        assert_zero(a / sum(scores) - b / sum(moved))


# -- a norm of a norm ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["inside", "outside", "floor", "floor-inside"])
def test_a_norm_of_a_norm_is_one_norm(place):
    """For a statistic T of x that a factor of x goes into by its square; p T and q T are under the roots."""
    a, b, p, q, e1, e2, t = sp.symbols("a b p q e1 e2 t", positive=True)

    def root(times, eps, statistic):
        s = times * statistic
        return {
            "inside": sp.sqrt(s + eps),
            "outside": sp.sqrt(s) + eps,
            "floor": sp.Max(sp.sqrt(s), eps),
            "floor-inside": sp.sqrt(sp.Max(s, eps)),
        }[place]

    first = a / root(p, e1, t)  # what x is multiplied by
    both = first * b / root(q, e2, first**2 * t)
    squared = place in ("inside", "floor-inside")
    own = q / p * a**2 if squared else sp.sqrt(q / p) * a
    factor = own + e2 if place in ("inside", "outside") else sp.Max(own, e2)
    scale = a * b / (sp.sqrt(factor) if squared else factor)
    one = scale / root(p, e1 * e2 / factor, t)
    if "floor" not in place:
        assert sp.simplify(both**2 / one**2) == 1
        return
    # all branches of the maxima, and both sides of each
    numbers = [sp.Rational(1, 3), sp.Integer(5)]
    for at in itertools.product(numbers, repeat=5):
        given = dict(zip((a, p, q, e1, e2), at, strict=True)) | {b: 7}
        for size in (sp.Rational(1, 100), sp.Rational(1, 2), sp.Integer(3), sp.Integer(900)):
            ratio = (both / one).subs({**given, t: size})
            assert abs(sp.N(ratio, 30) - 1) < sp.Rational(1, 10**25)


def test_the_mean_square_of_a_centred_vector_is_its_variance():
    centred = [x - mean(X) for x in X]
    assert_zero(mean([c**2 for c in centred]) - variance(X))
    assert_zero(mean(centred))


def test_a_factor_goes_into_a_statistic_by_its_square():
    k = sp.Symbol("k", real=True)
    assert_zero(variance([k * x for x in X]) - k**2 * variance(X))
    assert_zero(mean([(k * x) ** 2 for x in X]) - k**2 * mean([x**2 for x in X]))


# -- a bounded input -----------------------------------------------------------------------------


def test_a_statistic_far_below_eps_moves_the_root_by_half_of_its_share():
    """1 >= (1 + s)^(-1/2) >= 1 - s / 2 for s = S / eps: the tangent of a convex function is below it."""
    s = sp.Symbol("s", nonnegative=True)
    root = (1 + s) ** sp.Rational(-1, 2)
    assert sp.diff(root, s, 2).is_positive
    assert sp.series(root, s, 0, 2).removeO() == 1 - s / 2
    assert sp.diff(root, s).is_negative


def test_a_number_of_a_norm_is_at_most_the_root_of_how_many_there_are():
    """n (mean(x^2) + eps) - x_0^2 is a sum of squares and n eps."""
    rest = sp.expand(N * (mean([x**2 for x in X]) + EPS) - X[0] ** 2)
    assert_zero(rest - (sum(x**2 for x in X[1:]) + N * EPS))


def test_given_statistics_go_into_the_operator_after_them():
    """V (s x + t) + c = (V diag(s)) x + (c + V t)."""
    norm, s, t = given_statistics(N)
    weight, c = sp.Matrix(3, N, sp.symbols(f"k0:{3 * N}")), sp.Matrix(sp.symbols("c0:3"))
    before = weight * sp.Matrix([norm(x, i) for i, x in enumerate(X)]) + c
    after = (weight * sp.diag(*s)) * sp.Matrix(X) + (c + weight * sp.Matrix(t))
    for a, b in zip(before, after, strict=True):
        assert_zero(a - b)


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_a_scale_goes_out_of_a_maximum_but_for_its_sign(sign):
    """max(s x + t) = m (max(p x - p mu) + b / m) with p = s / m and m = |s|, or any m > 0 where s is 0."""
    size, mu, b = (
        sp.Symbol("m", positive=True),
        sp.Symbol("mu", real=True),
        sp.Symbol("b", real=True),
    )
    s, p = sign * size, sp.Integer(sign)
    for x in X:
        moved = size * ((p * x - p * mu) + b / size)
        # every element is the same increasing function of what is compared, so the maximum is, too
        assert_zero(moved - (s * (x - mu) + b))
        assert sp.diff(size * (X[0] - p * mu) + b, X[0]).is_positive


def test_a_scale_next_to_zero_stays_where_nothing_is_divided_by_it():
    """With m = max(|s|, 2^-32), p = s / m is no more than one and s = p m."""
    least = sp.Rational(1, 2**32)
    for s in (sp.Rational(-3, 7), sp.Integer(0), least / 5, -least / 2**90, sp.Integer(9)):
        size = sp.Max(abs(s), least)
        assert abs(s / size) <= 1
        assert s / size * size == s


def test_zeros_around_a_shifted_image_are_zeros_of_it():
    """conv(pad(m (y + t / m); 0); V) = conv(pad(y + t / m; 0); V m): a zero times m is zero."""
    size, shift = sp.Symbol("m", positive=True), sp.Symbol("t", real=True)
    taps = sp.symbols("v0:3")
    row = [0, *[x + shift / size for x in X], 0]
    whole = [0, *[size * x + shift for x in X], 0]
    for i in range(N):
        given = sum(v * whole[i + k] for k, v in enumerate(taps))
        folded = sum(v * size * row[i + k] for k, v in enumerate(taps))
        assert_zero(given - folded)
    # into a bias it cannot go: at the border fewer taps meet it
    missing = sum(taps) * shift - sum(v * shift for k, v in enumerate(taps) if k)
    assert_zero(missing - taps[0] * shift)


def test_what_takes_a_factor_out_that_is_not_negative():
    """ReLU and its kin at k x for k > 0: both take the same branch, which is linear without a shift."""
    k, slope = sp.Symbol("k", positive=True), sp.Symbol("a", real=True)
    positive, negative = sp.Symbol("u", positive=True), sp.Symbol("w", negative=True)
    for x in (positive, negative):
        assert (k * x).is_positive == x.is_positive
        assert_zero(sp.Max(k * x, 0) - k * sp.Max(x, 0))
        assert_zero(sp.Abs(k * x) - k * sp.Abs(x))
        assert_zero(slope * (k * x) - k * (slope * x))


def test_a_factor_for_each_number_leaves_the_scale_of_its_channel():
    s, factors = sp.symbols(f"s0:{N}"), sp.symbols(f"f0:{N}")
    row = sp.Matrix(1, N, sp.symbols(f"v0:{N}"))
    given = row * sp.Matrix([s[i] * X[i] * factors[i] for i in range(N)])
    folded = (row * sp.diag(*s)) * sp.Matrix([X[i] * factors[i] for i in range(N)])
    assert_zero((given - folded)[0])


def test_moments_of_two_sets_make_those_of_their_union():
    a, b, u, v = X[:2], X[2:], Y[:2], Y[2:]
    m, n = sp.Integer(len(a)), sp.Integer(len(b))

    def cross(p, q):
        return sum((x - mean(p)) * (y - mean(q)) for x, y in zip(p, q, strict=True))

    d, e = mean(b) - mean(a), mean(v) - mean(u)
    assert_zero(mean(a) + d * n / (m + n) - mean(X))
    assert_zero(cross(a, u) + cross(b, v) + d * e * m * n / (m + n) - cross(X, Y))
    assert_zero(cross(a, a) + cross(b, b) + d * d * m * n / (m + n) - cross(X, X))


def test_the_fitted_affine_map_is_the_nearest():
    """Its error is stationary in both numbers, and a square in them."""
    s, t = sp.symbols("s t")
    error = mean([(s * x + t - y) ** 2 for x, y in zip(X, Y, strict=True)])
    covariance = mean([(x - mean(X)) * (y - mean(Y)) for x, y in zip(X, Y, strict=True)])
    best = covariance / variance(X)
    at = {s: best, t: mean(Y) - best * mean(X)}
    assert_zero(sp.together(sp.diff(error, s).subs(at)))
    assert_zero(sp.together(sp.diff(error, t).subs(at)))


def test_an_affine_map_before_the_weight_and_bias_is_one_affine_map():
    s, t, w, b, x = sp.symbols("s t w b x")
    assert_zero(w * (s * x + t) + b - (x * (w * s) + (w * t + b)))


def test_a_clamp_between_infinities_leaves_every_number():
    assert_zero(sp.Min(sp.Max(X[0], -sp.oo), sp.oo) - X[0])
    assert_zero(sp.Max(X[0], -sp.oo) - X[0])


def test_a_factor_of_activations_stays_behind_the_norm():
    """norm(x; c d) V^T = (d norm(x; c)) V^T = (d norm(x; 1)) (V diag(c))^T for a factor d of each row."""
    c, d, v = sp.symbols("c0:4"), sp.Symbol("d"), sp.symbols("v0:4")
    normed = rms_norm(X)
    given = sum(v[i] * normed[i] * (c[i] * d) for i in range(len(X)))
    assert_zero(given - sum((v[i] * c[i]) * (d * normed[i]) for i in range(len(X))))


def test_a_maximum_lets_a_factor_pass_that_is_not_negative():
    """Zero included: w max(x, y) = max(w x, w y)."""
    w = sp.Symbol("w", nonnegative=True)
    x, y = sp.symbols("x y", real=True)
    for larger, smaller in ((x, y), (y, x)):
        apart = sp.Symbol("apart", nonnegative=True)  # larger = smaller + apart
        at = {larger: smaller + apart}
        assert_zero((w * larger - sp.Max(w * x, w * y)).subs(at).rewrite(sp.Piecewise).simplify())
