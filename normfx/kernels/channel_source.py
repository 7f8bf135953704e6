"""The channel kernels: statistics of each channel of a batch, and what is computed from them.

Three kernels serve the layers that train on batch statistics. With x as (batch, channels,
positions) and a mask over (batch, positions):

    moments    count, mean, sum of squares about it (or about zero), of the mask and of the rest
    sums       sum of u, of u * (v - centre) and of (v - centre)^2: the gradients of an affine map
    affine     a*u + b*(v - centre) + c, with other b, centre and c where the mask is zero

A forward pass of a layer is moments and affine, a backward pass is sums and affine.

The reductions are deterministic, in two stages: a program takes tiles of positions at a fixed
distance, in order, and leaves what it has in a small tensor that is added up, in order. There are
no atomics.

m2 is the sum of (x - k)^2 less n (mean - k)^2, where the shift k is the mean of the first tile
(Chan, Golub and LeVeque 1979). It cancels by 1 + (mean - k)^2 / variance, which is about one for a
k among the numbers; and programs are joined by n, mean and m2.
"""

from __future__ import annotations

# Triton takes plain values for tl.constexpr, and settles at compile time which branches there are.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false
import triton
import triton.language as tl


@triton.jit
def shift_of(h, counts):
    """The mean of what counts in a tile, for each channel: near to theirs, and taken off first.

    Zero where it is not finite, so that what is computed from it is not finite as the sum would be.
    """
    n = tl.sum(tl.where(counts, 1.0, 0.0), axis=0)
    shift = tl.sum(tl.where(counts, h, 0.0), axis=0) / tl.maximum(n, 1.0)
    return tl.where(shift - shift == 0.0, shift, 0.0)


@triton.jit
def shifted_sums(n, s1, s2, h, counts, shift):
    """Adds to n and the sums of d and d^2 of each lane, with d = h - shift, where h counts."""
    d = tl.where(counts, h - shift[None, :], 0.0)
    return n + tl.where(counts, 1.0, 0.0), s1 + d, s2 + d * d


@triton.jit
def store_part(part_ptr, at, channels, n, shift, s1, s2, inside):
    """The sums of all lanes of a program, one after the other."""
    tl.store(part_ptr + at, tl.sum(n, axis=0), mask=inside)
    tl.store(part_ptr + at + channels, shift, mask=inside)
    tl.store(part_ptr + at + 2 * channels, tl.sum(s1, axis=0), mask=inside)
    tl.store(part_ptr + at + 3 * channels, tl.sum(s2, axis=0), mask=inside)


@triton.jit
def channel_moments(
    x_ptr,
    mask_ptr,
    part_ptr,
    batch,
    channels,
    positions,
    x_batch_stride,
    x_channel_stride,
    x_position_stride,
    MEAN: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Part (programs, REGIONS, 4, channels): n, shift and sums of d and d^2 of a program's tiles.

    Region 0 is where the mask is set, region 1 the rest. The shift is the mean of the first tile
    that has a position of the region; without MEAN it is zero.
    """
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    x_at = channel.to(tl.int64)[None, :] * x_channel_stride
    n = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    shift = tl.zeros([BLOCK_C], dtype=tl.float32)
    seen = 0
    rest_n = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    rest_s1 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    rest_s2 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    rest_shift = tl.zeros([BLOCK_C], dtype=tl.float32)
    rest_seen = 0
    tiles = tl.cdiv(positions, BLOCK_P)
    for step in range(tl.program_id(0), batch * tiles, tl.num_programs(0)):
        image = (step // tiles).to(tl.int64)
        position = (step % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        here = position < positions
        valid = here[:, None] & inside[None, :]
        at = image * x_batch_stride + position.to(tl.int64)[:, None] * x_position_stride
        h = tl.load(x_ptr + at + x_at, mask=valid, other=0.0).to(tl.float32)
        counted = here
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + image * positions + position, mask=here, other=0) != 0
            if REGIONS == 2:
                left = here & (counted == 0)
                counts = valid & left[:, None]
                if MEAN:
                    number = tl.sum(left.to(tl.int32), axis=0)
                    if (rest_seen == 0) & (number > 0):
                        rest_shift = shift_of(h, counts)
                    rest_seen += number
                rest_n, rest_s1, rest_s2 = shifted_sums(
                    rest_n, rest_s1, rest_s2, h, counts, rest_shift
                )
        counts = valid & counted[:, None]
        if MEAN:
            number = tl.sum(counted.to(tl.int32), axis=0)
            if (seen == 0) & (number > 0):
                shift = shift_of(h, counts)
            seen += number
        n, s1, s2 = shifted_sums(n, s1, s2, h, counts, shift)
    at = tl.program_id(0).to(tl.int64) * REGIONS * 4 * channels + channel
    store_part(part_ptr, at, channels, n, shift, s1, s2, inside)
    if REGIONS == 2:
        at += 4 * channels
        store_part(part_ptr, at, channels, rest_n, rest_shift, rest_s1, rest_s2, inside)


@triton.jit
def channel_join(
    part_ptr,
    total_ptr,
    programs,
    channels,
    MEAN: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The parts of all programs as n, mean and m2: (REGIONS, 3, channels). BLOCK_P holds them all.

    Means are taken relative to the shift of the first program that has one, as their differences
    would be lost beside a large mean.
    """
    region = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.arange(0, BLOCK_P)[:, None]
    inside = channel < channels
    at = (program * REGIONS + region) * 4 * channels + channel[None, :]
    mask = (program < programs) & inside[None, :]
    n = tl.load(part_ptr + at, mask=mask, other=0.0)
    shift = tl.load(part_ptr + at + channels, mask=mask, other=0.0)
    s1 = tl.load(part_ptr + at + 2 * channels, mask=mask, other=0.0)
    s2 = tl.load(part_ptr + at + 3 * channels, mask=mask, other=0.0)
    total = tl.sum(n, axis=0)
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    m2 = s2
    if MEAN:
        first = tl.min(tl.where(n > 0.0, program, BLOCK_P), axis=0)[None, :]
        origin = tl.sum(tl.where(program == first, shift, 0.0), axis=0)
        own = s1 / tl.maximum(n, 1.0)
        apart = tl.where(n > 0.0, shift - origin[None, :] + own, 0.0)
        common = tl.sum(n * apart, axis=0) / tl.maximum(total, 1.0)
        apart = tl.where(n > 0.0, apart - common[None, :], 0.0)
        m2 = s2 - s1 * own + n * apart * apart
        mean = origin + common
    at = region * 3 * channels + channel
    tl.store(total_ptr + at, total, mask=inside)
    tl.store(total_ptr + at + channels, mean, mask=inside)
    tl.store(total_ptr + at + 2 * channels, tl.sum(m2, axis=0), mask=inside)


@triton.jit
def channel_sums(
    u_ptr,
    v_ptr,
    centre_ptr,
    part_ptr,
    batch,
    channels,
    positions,
    u_batch_stride,
    u_channel_stride,
    u_position_stride,
    v_batch_stride,
    v_channel_stride,
    v_position_stride,
    SQUARES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Part (programs, 3, channels): the sums of u, of u * d and of d^2, with d = v - centre."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    u_at = channel.to(tl.int64)[None, :] * u_channel_stride
    v_at = channel.to(tl.int64)[None, :] * v_channel_stride
    if centre_ptr is not None:
        centre = tl.load(centre_ptr + channel, mask=inside, other=0.0)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    product = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    tiles = tl.cdiv(positions, BLOCK_P)
    for step in range(tl.program_id(0), batch * tiles, tl.num_programs(0)):
        image = (step // tiles).to(tl.int64)
        position = ((step % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        valid = (position < positions) & inside[None, :]
        at = image * u_batch_stride + position * u_position_stride + u_at
        u = tl.load(u_ptr + at, mask=valid, other=0.0).to(tl.float32)
        at = image * v_batch_stride + position * v_position_stride + v_at
        d = tl.load(v_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if centre_ptr is not None:
            d = tl.where(valid, d - centre, 0.0)
        total += u
        product += u * d
        if SQUARES:
            square += d * d
    at = tl.program_id(0).to(tl.int64) * 3 * channels + channel
    tl.store(part_ptr + at, tl.sum(total, axis=0), mask=inside)
    tl.store(part_ptr + at + channels, tl.sum(product, axis=0), mask=inside)
    tl.store(part_ptr + at + 2 * channels, tl.sum(square, axis=0), mask=inside)


@triton.jit
def of_region(values_ptr, channel, channels, inside, marked, MASKED: tl.constexpr):
    """Values (channels,), or with MASKED (2, channels), of which the mask chooses."""
    value = tl.load(values_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        rest = tl.load(values_ptr + channels + channel, mask=inside, other=0.0)
        value = tl.where(marked, value, rest.to(tl.float32)[None, :])
    return value


@triton.jit
def channel_affine(
    u_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    centre_ptr,
    mask_ptr,
    y_ptr,
    channels,
    positions,
    u_batch_stride,
    u_channel_stride,
    u_position_stride,
    v_batch_stride,
    v_channel_stride,
    v_position_stride,
    y_batch_stride,
    y_channel_stride,
    y_position_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """a*u + b*(v - centre) + c for one tile; b, c and centre are (2, channels) with a mask."""
    MASKED: tl.constexpr = mask_ptr is not None
    tiles = tl.cdiv(positions, BLOCK_P)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    position = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = position < positions
    inside = channel < channels
    valid = here[:, None] & inside[None, :]
    marked = valid
    if MASKED:
        flags = tl.load(mask_ptr + image * positions + position, mask=here, other=0) != 0
        marked = flags[:, None] & inside[None, :]
    p = position.to(tl.int64)[:, None]
    c = channel.to(tl.int64)[None, :]
    at = image * v_batch_stride + p * v_position_stride + c * v_channel_stride
    h = tl.load(v_ptr + at, mask=valid, other=0.0).to(tl.float32)
    if centre_ptr is not None:
        h -= of_region(centre_ptr, channel, channels, inside, marked, MASKED)
    h *= of_region(b_ptr, channel, channels, inside, marked, MASKED)
    if c_ptr is not None:
        h += of_region(c_ptr, channel, channels, inside, marked, MASKED)
    if u_ptr is not None:
        at = image * u_batch_stride + p * u_position_stride + c * u_channel_stride
        u = tl.load(u_ptr + at, mask=valid, other=0.0).to(tl.float32)
        h += u * of_region(a_ptr, channel, channels, inside, marked, False)
    at = image * y_batch_stride + p * y_position_stride + c * y_channel_stride
    tl.store(y_ptr + at, h.to(y_ptr.dtype.element_ty), mask=valid)
