"""The forward row kernels: one source each for rows in registers, looped rows and split rows.

Every kernel reads x (and a residual, a gate), takes one mean and one S for each row, and writes
what it is given a pointer for: the result y, the stream x + residual, the statistics, the factor
scale/root alone, a quantised result with its scales. Offsets of rows are 64-bit; columns past the
end are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normfx.kernels.row_math import (
    activated,
    affine,
    factor_of,
    joined,
    moments,
    rounded,
    sigmoid,
    silu,
    square_of,
)


@triton.jit
def read(
    x_ptr,
    residual_ptr,
    gate_ptr,
    x_at,
    residual_at,
    gate_at,
    mask,
    STREAM_DTYPE: tl.constexpr,
    GATE: tl.constexpr,
):
    """What is normalized: x, x + residual or x * silu(gate), rounded as the model rounds it."""
    h = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
        h = rounded(h, STREAM_DTYPE)
    if GATE == "before":
        h *= silu(tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32))
        h = rounded(h, STREAM_DTYPE)
    return h


@triton.jit
def normalized(
    h,
    mean,
    factor,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    gate_at,
    col,
    mask,
    inside,
    CENTRE: tl.constexpr,
    SCALE: tl.constexpr,
    NORM_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
):
    """The result for a tile whose rows have these means and factors."""
    if GATE == "swish":
        h *= sigmoid(tl.load(gate_ptr + col, mask=inside, other=0.0).to(tl.float32) * h)
    if CENTRE:
        h -= mean[:, None]
    h = h * factor[:, None] * SCALE
    h = affine(
        h, weight_ptr, bias_ptr, col, inside, NORM_DTYPE, WEIGHT_DTYPE, BIAS_DTYPE, WEIGHT_OFFSET
    )
    h = activated(h, ACTIVATION)
    if GATE == "after":
        h *= silu(tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32))
    return h


@triton.jit
def quantised(h, largest, QUANTISE: tl.constexpr, LIMIT: tl.constexpr):
    """(h / scale, scale) with scale = largest / LIMIT; h has an axis at the end that shares one."""
    scale = tl.where(largest == 0.0, 1.0, largest / LIMIT)
    h = h / scale[:, :, None]
    if QUANTISE == "int8":
        # the nearest integer, half to even: the sum has no bits left for a fraction
        h = (h + 12582912.0) - 12582912.0
    return tl.clamp(h, -LIMIT, LIMIT), scale


@triton.jit
def store_blocks(
    h,
    y_ptr,
    scale_ptr,
    row,
    first,
    y_row_stride,
    scale_row_stride,
    row_inside,
    cols,
    QUANTISE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantises a tile from column `first` on, with a scale for each BLOCK columns of a row."""
    ROWS: tl.constexpr = h.shape[0]
    BLOCKS: tl.constexpr = h.shape[1] // BLOCK
    h = tl.reshape(h, [ROWS, BLOCKS, BLOCK])
    q, scale = quantised(h, tl.max(tl.abs(h), axis=2), QUANTISE, LIMIT)
    block = tl.arange(0, BLOCKS)
    col = first + block[None, :, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    y_at = row[:, None, None] * y_row_stride + col
    inside = row_inside[:, None, None] & (col < cols)
    tl.store(y_ptr + y_at, q.to(y_ptr.dtype.element_ty), mask=inside)
    scale_at = row[:, None] * scale_row_stride + first // BLOCK + block[None, :]
    scale_inside = row_inside[:, None] & (first + block * BLOCK < cols)[None, :]
    tl.store(scale_ptr + scale_at, scale, mask=scale_inside)


@triton.jit
def forward_persistent(
    x_ptr,
    residual_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    scale_ptr,
    stream_ptr,
    mean_ptr,
    square_ptr,
    factor_ptr,
    rows,
    cols,
    x_row_stride,
    residual_row_stride,
    gate_row_stride,
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
    QUANTISE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows in registers: every number is read once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)[None, :]
    row_inside = row < rows
    inside = col < cols
    mask = row_inside[:, None] & inside
    x_at = row[:, None] * x_row_stride + col
    residual_at = row[:, None] * residual_row_stride + col
    gate_at = row[:, None] * gate_row_stride + col
    y_at = row[:, None] * cols + col
    h = read(x_ptr, residual_ptr, gate_ptr, x_at, residual_at, gate_at, mask, STREAM_DTYPE, GATE)
    if stream_ptr is not None:
        tl.store(stream_ptr + y_at, h.to(stream_ptr.dtype.element_ty), mask=mask)
    n = cols.to(tl.float32)
    mean, m2 = moments(h, mask, n, MEAN)
    square = square_of(mean, m2, n, STATISTIC, MEAN, CORRECTION)
    factor = factor_of(square, EPS, EPS_PLACE)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row_inside)
    if square_ptr is not None:
        tl.store(square_ptr + row, square, mask=row_inside)
    if factor_ptr is not None:
        tl.store(factor_ptr + row, factor * SCALE, mask=row_inside)
    if y_ptr is not None:
        y = normalized(
            h,
            mean,
            factor,
            gate_ptr,
            weight_ptr,
            bias_ptr,
            gate_at,
            col,
            mask,
            inside,
            CENTRE,
            SCALE,
            NORM_DTYPE,
            WEIGHT_DTYPE,
            BIAS_DTYPE,
            WEIGHT_OFFSET,
            ACTIVATION,
            GATE,
        )
        if QUANTISE == "none":
            tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            WIDTH: tl.constexpr = BLOCK_N if BLOCK == 0 else BLOCK
            y = tl.where(mask, y, 0.0)  # the bias is past the end too
            store_blocks(
                y,
                y_ptr,
                scale_ptr,
                row,
                0,
                cols,
                tl.cdiv(cols, WIDTH),
                row_inside,
                cols,
                QUANTISE,
                LIMIT,
                WIDTH,
            )


@triton.jit
def forward_statistics(
    x_ptr,
    residual_ptr,
    gate_ptr,
    stream_ptr,
    part_ptr,
    cols,
    x_row_stride,
    residual_row_stride,
    gate_row_stride,
    MEAN: tl.constexpr,
    STREAM_DTYPE: tl.constexpr,
    GATE: tl.constexpr,
    SPLIT_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The moments of one part of one row: (rows, splits, 3)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * SPLIT_N
    end = tl.minimum(first + SPLIT_N, cols)
    _n, pivot, mean, m2 = row_moments(
        x_ptr + row * x_row_stride,
        residual_ptr if residual_ptr is None else residual_ptr + row * residual_row_stride,
        gate_ptr if gate_ptr is None else gate_ptr + row * gate_row_stride,
        stream_ptr if stream_ptr is None else stream_ptr + row * cols,
        first,
        end,
        MEAN,
        STREAM_DTYPE,
        GATE,
        BLOCK_N,
    )
    at = (row * tl.num_programs(1) + split) * 3 + tl.arange(0, 1)
    tl.store(part_ptr + at, pivot)
    tl.store(part_ptr + at + 1, mean)
    tl.store(part_ptr + at + 2, m2)


@triton.jit
def row_moments(
    x_ptr,
    residual_ptr,
    gate_ptr,
    stream_ptr,
    first,
    end,
    MEAN: tl.constexpr,
    STREAM_DTYPE: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(n, pivot, mean - pivot, m2) of the columns from `first` to `end`, chunk after chunk.

    The pivot is the mean of the first chunk. Means relative to it are small, so that their
    differences, which m2 takes, are exact where the mean is large. Without MEAN, m2 is the plain
    sum of squares. Writes the stream on the way.
    """
    n = tl.zeros([1], dtype=tl.float32)
    pivot = tl.zeros([1], dtype=tl.float32)
    mean = tl.zeros([1], dtype=tl.float32)
    m2 = tl.zeros([1], dtype=tl.float32)
    for start in range(first, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        mask = col < end
        h = read(x_ptr, residual_ptr, gate_ptr, col, col, col, mask, STREAM_DTYPE, GATE)
        if stream_ptr is not None:
            tl.store(stream_ptr + col, h.to(stream_ptr.dtype.element_ty), mask=mask)
        count = tl.minimum(end - start, BLOCK_N).to(tl.float32)
        if MEAN:
            if start == first:
                pivot = tl.sum(h, axis=1) / count
            h = tl.where(mask, h - pivot[:, None], 0.0)
        chunk_mean, chunk_m2 = moments(h, mask, count, MEAN)
        if MEAN:
            n, mean, m2 = joined(n, mean, m2, count, chunk_mean, chunk_m2)
        else:
            m2 += chunk_m2
    return n, pivot, mean, m2


@triton.jit
def row_output(
    x_ptr,
    residual_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    scale_ptr,
    row,
    first,
    end,
    cols,
    x_row_stride,
    residual_row_stride,
    gate_row_stride,
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
    QUANTISE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes the result for the columns from `first` to `end` of a row, chunk after chunk.

    One scale for a whole row takes one pass more, to find the largest value.
    """
    PASSES: tl.constexpr = 2 if QUANTISE != "none" and BLOCK == 0 else 1  # pyright: ignore
    largest = tl.zeros([1], dtype=tl.float32)
    for step in tl.static_range(PASSES):  # pyright: ignore
        for start in range(first, end, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)[None, :]
            mask = col < end
            gate_at = row * gate_row_stride + col
            h = read(
                x_ptr,
                residual_ptr,
                gate_ptr,
                row * x_row_stride + col,
                row * residual_row_stride + col,
                gate_at,
                mask,
                STREAM_DTYPE,
                GATE,
            )
            y = normalized(
                h,
                mean,
                factor,
                gate_ptr,
                weight_ptr,
                bias_ptr,
                gate_at,
                col,
                mask,
                mask,
                CENTRE,
                SCALE,
                NORM_DTYPE,
                WEIGHT_DTYPE,
                BIAS_DTYPE,
                WEIGHT_OFFSET,
                ACTIVATION,
                GATE,
            )
            if QUANTISE == "none":
                at = row * cols + col
                tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
            else:
                y = tl.where(mask, y, 0.0)
                if BLOCK != 0:
                    store_blocks(
                        y,
                        y_ptr,
                        scale_ptr,
                        row + tl.zeros([1], dtype=tl.int64),
                        start,
                        cols,
                        tl.cdiv(cols, BLOCK),
                        tl.full([1], 1, tl.int1),
                        end,
                        QUANTISE,
                        LIMIT,
                        BLOCK,
                    )
                elif step == 0:
                    largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
                else:
                    q, scale = quantised(y[:, None, :], largest[:, None], QUANTISE, LIMIT)
                    q = tl.reshape(q, [1, BLOCK_N])
                    at = row * cols + col
                    tl.store(y_ptr + at, q.to(y_ptr.dtype.element_ty), mask=mask)
                    tl.store(scale_ptr + row + tl.zeros([1, 1], dtype=tl.int64), scale)


@triton.jit
def forward_looped(
    x_ptr,
    residual_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    scale_ptr,
    stream_ptr,
    mean_ptr,
    square_ptr,
    factor_ptr,
    part_ptr,
    cols,
    x_row_stride,
    residual_row_stride,
    gate_row_stride,
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
    QUANTISE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One part of one row: the whole row where there is one part.

    With one part the moments are taken here, and the row is read twice. With more they are what
    `forward_statistics` left, joined in the order of the parts.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * SPLIT_N
    if SPLITS == 1:
        end = cols
        n, pivot, mean, m2 = row_moments(
            x_ptr + row * x_row_stride,
            residual_ptr if residual_ptr is None else residual_ptr + row * residual_row_stride,
            gate_ptr if gate_ptr is None else gate_ptr + row * gate_row_stride,
            stream_ptr if stream_ptr is None else stream_ptr + row * cols,
            0,
            cols,
            MEAN,
            STREAM_DTYPE,
            GATE,
            BLOCK_N,
        )
    else:
        end = tl.minimum(first + SPLIT_N, cols)
        n = tl.zeros([1], dtype=tl.float32)
        pivot = tl.zeros([1], dtype=tl.float32)
        mean = tl.zeros([1], dtype=tl.float32)
        m2 = tl.zeros([1], dtype=tl.float32)
        for part in range(SPLITS):
            at = (row * SPLITS + part) * 3 + tl.arange(0, 1)
            part_m2 = tl.load(part_ptr + at + 2)
            if MEAN:
                count = tl.minimum(cols - part * SPLIT_N, SPLIT_N).to(tl.float32)
                part_pivot = tl.load(part_ptr + at)
                if part == 0:
                    pivot = part_pivot
                part_mean = (part_pivot - pivot) + tl.load(part_ptr + at + 1)
                n, mean, m2 = joined(n, mean, m2, count, part_mean, part_m2)
            else:
                m2 += part_m2
    mean += pivot
    square = square_of(mean, m2, cols.to(tl.float32), STATISTIC, MEAN, CORRECTION)
    factor = factor_of(square, EPS, EPS_PLACE)
    at = row + tl.arange(0, 1)
    is_first = (split + tl.arange(0, 1)) == 0
    if mean_ptr is not None:
        tl.store(mean_ptr + at, mean, mask=is_first)
    if square_ptr is not None:
        tl.store(square_ptr + at, square, mask=is_first)
    if factor_ptr is not None:
        tl.store(factor_ptr + at, factor * SCALE, mask=is_first)
    if y_ptr is not None:
        row_output(
            x_ptr,
            residual_ptr,
            gate_ptr,
            weight_ptr,
            bias_ptr,
            y_ptr,
            scale_ptr,
            row,
            first,
            end,
            cols,
            x_row_stride,
            residual_row_stride,
            gate_row_stride,
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
            QUANTISE,
            LIMIT,
            BLOCK,
            BLOCK_N,
        )
