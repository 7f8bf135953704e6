"""The arithmetic of a row, as functions that the row kernels call. All of it is in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(h, DTYPE: tl.constexpr):
    """H as it would be after a store in DTYPE and a load."""
    if DTYPE == "bfloat16":
        h = h.to(tl.bfloat16).to(tl.float32)
    elif DTYPE == "float16":
        h = h.to(tl.float16).to(tl.float32)
    return h


@triton.jit
def moments(h, mask, n, MEAN: tl.constexpr):
    """The mean of each row and the sum of squares about it, in two passes over registers.

    Never E[x^2] - mean^2: it cancels where the mean is large beside the deviation. Without MEAN,
    (0, sum of squares). `h` is zero outside of the mask.
    """
    if MEAN:
        mean = tl.sum(h, axis=1) / n
        h = tl.where(mask, h - mean[:, None], 0.0)
    else:
        mean = tl.zeros([h.shape[0]], dtype=tl.float32)
    return mean, tl.sum(h * h, axis=1)


@triton.jit
def joined(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """The moments of two parts as those of the whole (Chan, Golub and LeVeque 1979)."""
    n = n_a + n_b
    delta = mean_b - mean_a
    part = n_b / tl.maximum(n, 1.0)
    return n, mean_a + delta * part, m2_a + m2_b + delta * delta * n_a * part


@triton.jit
def square_of(mean, m2, n, STATISTIC: tl.constexpr, MEAN: tl.constexpr, CORRECTION: tl.constexpr):
    """S of `NormSpec`, from moments.

    Compressed: sum of x^2 = m2 + n*mean^2 and (sum of x)^2 = n^2*mean^2, so that
    S = m2 / (n + 1) + n * mean^2.
    """
    if STATISTIC == "variance":
        square = m2 / (n - CORRECTION)
    elif STATISTIC == "compressed":
        square = m2 / (n + 1.0) + n * mean * mean
    elif STATISTIC == "mean-square":
        square = m2 / n + mean * mean if MEAN else m2 / n
    else:
        square = m2 + n * mean * mean if MEAN else m2
    return square


@triton.jit
def factor_of(square, EPS: tl.constexpr, EPS_PLACE: tl.constexpr):
    """1 / root."""
    if EPS_PLACE == "inside":
        factor = reciprocal(tl.sqrt_rn(square + EPS))
    elif EPS_PLACE == "floor-inside":
        factor = reciprocal(tl.sqrt_rn(at_least(square, EPS)))
    elif EPS_PLACE == "outside":
        factor = reciprocal(tl.sqrt_rn(square) + EPS)
    else:
        factor = reciprocal(at_least(tl.sqrt_rn(square), EPS))
    return factor


@triton.jit
def reciprocal(root):
    """1 / root, correctly rounded: the error of a plain division would be in every column."""
    return tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit
def at_least(value, low):
    """max(value, low), and NaN where the value is NaN."""
    return tl.where(value < low, low, value)


@triton.jit
def pull_of(square, factor, EPS: tl.constexpr, EPS_PLACE: tl.constexpr):
    """P, where d factor / d S = -factor^2 * P / 2: the factor, or 1/sqrt(S) where eps is outside.

    Zero where a floor holds, and zero for a row of zeros without an eps under its root, as the
    norm and the deviation of torch have it. The gradient is made of products that stay near one:
    factor^3 would overflow in a row of zeros with a small eps.
    """
    if EPS_PLACE == "inside":
        pull = factor
    elif EPS_PLACE == "floor-inside":
        pull = tl.where(square < EPS, 0.0, factor)
    else:
        root = tl.sqrt_rn(square)
        pull = tl.where(root == 0.0, 0.0, reciprocal(tl.where(root == 0.0, 1.0, root)))
        if EPS_PLACE == "floor":
            pull = tl.where(root < EPS, 0.0, pull)
    return pull


@triton.jit
def half_slope(h, mean, n, STATISTIC: tl.constexpr, CORRECTION: tl.constexpr):
    """(V, k), where d S / d h = 2 * k * V."""
    if STATISTIC == "variance":
        direction = h - mean
        k = 1.0 / (n - CORRECTION)
    elif STATISTIC == "compressed":
        direction = h + n * mean
        k = 1.0 / (n + 1.0)
    elif STATISTIC == "mean-square":
        direction = h
        k = 1.0 / n
    else:
        direction = h
        k = n / n
    return direction, k


@triton.jit
def sigmoid(h):
    """1 / (1 + exp(-h)): zero where exp overflows."""
    return 1.0 / (1.0 + tl.exp(-h))


@triton.jit
def silu(z):
    """Z * sigmoid(z)."""
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_slope(z):
    """D silu / d z."""
    s = sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def activated(h, ACTIVATION: tl.constexpr):
    """act(h)."""
    if ACTIVATION == "relu":
        h = tl.where(h < 0.0, 0.0, h)  # NaN stays
    elif ACTIVATION == "silu":
        h = silu(h)
    elif ACTIVATION == "sigmoid":
        h = sigmoid(h)
    elif ACTIVATION == "gelu":
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu-tanh":
        h = h / (1.0 + tl.exp(-1.5957691216057308 * (h + 0.044715 * h * h * h)))
    return h


@triton.jit
def activation_slope(h, ACTIVATION: tl.constexpr):
    """D act / d h."""
    if ACTIVATION == "relu":
        slope = tl.where(h > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        slope = silu_slope(h)
    elif ACTIVATION == "sigmoid":
        s = sigmoid(h)
        slope = s * (1.0 - s)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        slope = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    elif ACTIVATION == "gelu-tanh":
        inner = 1.5957691216057308 * (h + 0.044715 * h * h * h)
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * h * h)
        # not 1 - sigmoid, which cancels where h is large
        slope = sigmoid(inner) * (1.0 + h * sigmoid(-inner) * inner_slope)
    else:
        slope = h * 0.0 + 1.0
    return slope


@triton.jit
def affine(
    h,
    weight_ptr,
    bias_ptr,
    col,
    inside,
    NORM_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
):
    """H * (weight + offset) + bias, rounded where torch's promotion rounds it."""
    h = rounded(h, NORM_DTYPE)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
        h = rounded(h * (weight + WEIGHT_OFFSET), WEIGHT_DTYPE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
        h = rounded(h + bias, BIAS_DTYPE)
    return h
