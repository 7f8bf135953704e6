"""The backward row kernels: dx, and the gradients of weight and bias from the same pass.

With t the value that is divided, V and k the direction of `half_slope`, P the pull of `pull_of`, f
the factor, and g the gradient at (t - mean) * f:

    dt = g * f
    dh = dt * dt/dh - f^2 * sum(g * (t - mean)) * k * P * V - centre * mean(g) * f

A program takes rows at a fixed distance, and sums what it has for weight and bias in registers.
Its sums are one row of a small tensor, which torch adds up after it: no atomics, the same bits each
run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normfx.kernels.row_math import (
    activated,
    activation_slope,
    affine,
    factor_of,
    half_slope,
    pull_of,
    rounded,
    sigmoid,
    silu,
    silu_slope,
)


@triton.jit
def upstream(
    x_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dgate_ptr,
    x_at,
    gate_at,
    dy_at,
    col,
    mask,
    inside,
    mean,
    factor,
    CENTRE: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    NORM_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,
    STREAM_DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
):
    """(h, top, normal, g_affine, g) of a tile.

    h is what the statistics are of; top is t - centre*mean; normal is what the weight multiplies;
    g_affine is the gradient at the result of the affine part, and g the one at top * factor.
    Writes the gradient of a gate after the norm.
    """
    h = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
    if GATE == "before":
        h *= silu(tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32))
        h = rounded(h, STREAM_DTYPE)
    top = h
    if GATE == "swish":
        top *= sigmoid(tl.load(gate_ptr + col, mask=inside, other=0.0).to(tl.float32) * h)
    if CENTRE:
        top -= mean
    normal = top * factor * SCALE
    if ACTIVATION != "none" or GATE == "after":
        y = affine(
            normal,
            weight_ptr,
            bias_ptr,
            col,
            inside,
            NORM_DTYPE,
            WEIGHT_DTYPE,
            BIAS_DTYPE,
            WEIGHT_OFFSET,
        )
        if GATE == "after":
            z = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
            if dgate_ptr is not None:
                dz = g * activated(y, ACTIVATION) * silu_slope(z)
                tl.store(dgate_ptr + dy_at, dz.to(dgate_ptr.dtype.element_ty), mask=mask)
            g *= silu(z)
        if ACTIVATION != "none":
            g *= activation_slope(y, ACTIVATION)
    g_affine = g
    g = g * SCALE
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
        g *= weight + WEIGHT_OFFSET
    return h, top, normal, g_affine, g


@triton.jit
def downstream(
    h,
    g,
    x_ptr,
    gate_ptr,
    dstream_ptr,
    dx_ptr,
    dgate_ptr,
    x_at,
    gate_at,
    dx_at,
    col,
    mask,
    inside,
    mean,
    square,
    factor,
    dot,
    total,
    n,
    STATISTIC: tl.constexpr,
    CENTRE: tl.constexpr,
    CORRECTION: tl.constexpr,
    EPS: tl.constexpr,
    EPS_PLACE: tl.constexpr,
    GATE: tl.constexpr,
):
    """Writes dx (and the gradient of a gate before the norm) of a tile; returns d(gate) of swish.

    `dot` is sum(g * top) and `total` sum(g) of each row.
    """
    pull = pull_of(square, factor, EPS, EPS_PLACE)
    direction, k = half_slope(h, mean, n, STATISTIC, CORRECTION)
    dtop = g * factor
    dgate = dtop
    dh = dtop
    if GATE == "swish":
        v = tl.load(gate_ptr + col, mask=inside, other=0.0).to(tl.float32)
        s = sigmoid(v * h)
        curve = h * s * (1.0 - s)
        dh = dtop * (s + v * curve)
        dgate = dtop * h * curve
    dh -= (factor * dot * k) * factor * (pull * direction)
    if CENTRE:
        dh -= total / n * factor
    if GATE == "before":
        z = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
        if dgate_ptr is not None:
            x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
            dz = dh * x * silu_slope(z)
            tl.store(dgate_ptr + dx_at, dz.to(dgate_ptr.dtype.element_ty), mask=mask)
        dh *= silu(z)
    if dstream_ptr is not None:
        dh += tl.load(dstream_ptr + dx_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + dx_at, dh.to(dx_ptr.dtype.element_ty), mask=mask)
    return dgate


@triton.jit
def backward_persistent(
    x_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dstream_ptr,
    mean_ptr,
    square_ptr,
    dx_ptr,
    dgate_ptr,
    dweight_ptr,
    dbias_ptr,
    dswish_ptr,
    rows,
    cols,
    x_row_stride,
    gate_row_stride,
    dy_row_stride,
    STATISTIC: tl.constexpr,
    CENTRE: tl.constexpr,
    MEAN: tl.constexpr,
    CORRECTION: tl.constexpr,
    EPS: tl.constexpr,
    EPS_PLACE: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    NORM_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,
    STREAM_DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of BLOCK_M rows in registers: x and dy are read once."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_N)[None, :]
    inside = col < cols
    n = cols.to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    dswish = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(program * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
        row_inside = row < rows
        mask = row_inside & inside
        square = tl.load(square_ptr + row, mask=row_inside, other=1.0)
        mean = tl.load(mean_ptr + row, mask=row_inside, other=0.0) if MEAN else square * 0.0
        factor = factor_of(square, EPS, EPS_PLACE)
        x_at = row * x_row_stride + col
        gate_at = row * gate_row_stride + col
        dx_at = row * cols + col
        h, top, normal, g_affine, g = upstream(
            x_ptr,
            gate_ptr,
            weight_ptr,
            bias_ptr,
            dy_ptr,
            dgate_ptr,
            x_at,
            gate_at,
            row * dy_row_stride + col,
            col,
            mask,
            inside,
            mean,
            factor,
            CENTRE,
            SCALE,
            WEIGHT_OFFSET,
            NORM_DTYPE,
            WEIGHT_DTYPE,
            BIAS_DTYPE,
            STREAM_DTYPE,
            ACTIVATION,
            GATE,
        )
        if dweight_ptr is not None:
            dweight += g_affine * rounded(normal, NORM_DTYPE)
        if dbias_ptr is not None:
            dbias += g_affine
        dgate = downstream(
            h,
            g,
            x_ptr,
            gate_ptr,
            dstream_ptr,
            dx_ptr,
            dgate_ptr,
            x_at,
            gate_at,
            dx_at,
            col,
            mask,
            inside,
            mean,
            square,
            factor,
            tl.sum(g * top, axis=1, keep_dims=True),
            tl.sum(g, axis=1, keep_dims=True),
            n,
            STATISTIC,
            CENTRE,
            CORRECTION,
            EPS,
            EPS_PLACE,
            GATE,
        )
        if dswish_ptr is not None:
            dswish += dgate
    at = program.to(tl.int64) * cols + tl.arange(0, BLOCK_N)
    keep = tl.arange(0, BLOCK_N) < cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=keep)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=keep)
    if dswish_ptr is not None:
        tl.store(dswish_ptr + at, tl.sum(dswish, axis=0), mask=keep)


@triton.jit
def backward_sums(
    x_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    mean_ptr,
    square_ptr,
    dgate_ptr,
    sum_ptr,
    cols,
    x_row_stride,
    gate_row_stride,
    dy_row_stride,
    CENTRE: tl.constexpr,
    MEAN: tl.constexpr,
    EPS: tl.constexpr,
    EPS_PLACE: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    NORM_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,
    STREAM_DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    SPLIT_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum(g * top) and sum(g) of one part of one long row: (rows, splits, 2)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * SPLIT_N
    end = tl.minimum(first + SPLIT_N, cols)
    one = tl.zeros([1, 1], dtype=tl.int64)
    square = tl.load(square_ptr + row + one)
    mean = tl.load(mean_ptr + row + one) if MEAN else square * 0.0
    factor = factor_of(square, EPS, EPS_PLACE)
    dot = tl.zeros([1], dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    for start in range(first, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        mask = col < end
        _h, top, _normal, _g_affine, g = upstream(
            x_ptr,
            gate_ptr,
            weight_ptr,
            bias_ptr,
            dy_ptr,
            dgate_ptr,
            row * x_row_stride + col,
            row * gate_row_stride + col,
            row * dy_row_stride + col,
            col,
            mask,
            mask,
            mean,
            factor,
            CENTRE,
            SCALE,
            WEIGHT_OFFSET,
            NORM_DTYPE,
            WEIGHT_DTYPE,
            BIAS_DTYPE,
            STREAM_DTYPE,
            ACTIVATION,
            GATE,
        )
        dot += tl.sum(g * top, axis=1)
        total += tl.sum(g, axis=1)
    at = (row * tl.num_programs(1) + split) * 2 + tl.arange(0, 1)
    tl.store(sum_ptr + at, dot)
    tl.store(sum_ptr + at + 1, total)


@triton.jit
def backward_wide(
    x_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dstream_ptr,
    mean_ptr,
    square_ptr,
    sum_ptr,
    dx_ptr,
    dgate_ptr,
    dweight_ptr,
    dbias_ptr,
    dswish_ptr,
    rows,
    cols,
    x_row_stride,
    gate_row_stride,
    dy_row_stride,
    STATISTIC: tl.constexpr,
    CENTRE: tl.constexpr,
    MEAN: tl.constexpr,
    CORRECTION: tl.constexpr,
    EPS: tl.constexpr,
    EPS_PLACE: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    NORM_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,
    STREAM_DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns of the rows of a program, with the sums that `backward_sums` left."""
    program = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = col < cols
    n = cols.to(tl.float32)
    one = tl.zeros([1, 1], dtype=tl.int64)
    dweight = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    dswish = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    for start in range(program, rows, tl.num_programs(0)):
        row = start + one
        dot = tl.zeros([1, 1], dtype=tl.float32)
        total = tl.zeros([1, 1], dtype=tl.float32)
        for part in range(SPLITS):
            at = (row * SPLITS + part) * 2
            dot += tl.load(sum_ptr + at)
            total += tl.load(sum_ptr + at + 1)
        square = tl.load(square_ptr + row)
        mean = tl.load(mean_ptr + row) if MEAN else square * 0.0
        factor = factor_of(square, EPS, EPS_PLACE)
        x_at = row * x_row_stride + col
        gate_at = row * gate_row_stride + col
        h, _top, normal, g_affine, g = upstream(
            x_ptr,
            gate_ptr,
            weight_ptr,
            bias_ptr,
            dy_ptr,
            None,
            x_at,
            gate_at,
            row * dy_row_stride + col,
            col,
            inside,
            inside,
            mean,
            factor,
            CENTRE,
            SCALE,
            WEIGHT_OFFSET,
            NORM_DTYPE,
            WEIGHT_DTYPE,
            BIAS_DTYPE,
            STREAM_DTYPE,
            ACTIVATION,
            GATE,
        )
        if dweight_ptr is not None:
            dweight += g_affine * rounded(normal, NORM_DTYPE)
        if dbias_ptr is not None:
            dbias += g_affine
        dgate = downstream(
            h,
            g,
            x_ptr,
            gate_ptr,
            dstream_ptr,
            dx_ptr,
            dgate_ptr,
            x_at,
            gate_at,
            row * cols + col,
            col,
            inside,
            inside,
            mean,
            square,
            factor,
            dot,
            total,
            n,
            STATISTIC,
            CENTRE,
            CORRECTION,
            EPS,
            EPS_PLACE,
            GATE,
        )
        if dswish_ptr is not None:
            dswish += dgate
    at = program.to(tl.int64) * cols + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, dweight, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, dbias, mask=inside)
    if dswish_ptr is not None:
        tl.store(dswish_ptr + at, dswish, mask=inside)
