"""The row kernels in plain torch: what runs where no kernel can, on CPU tensors above all.

Same operands, same results, same places where values are rounded. Rows are the first dim, columns
the second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from normfx.kernels.generate import QUANTISED, RowForm, dtype_of

_ACTIVATIONS = {
    "none": lambda h: h,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda h: F.gelu(h, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


class Statistics(NamedTuple):
    """Of each row, (rows,): the mean (zero where it is not needed), S, and 1/root."""

    mean: Tensor
    square: Tensor
    factor: Tensor


def stream_of(x: Tensor, residual: Tensor | None) -> Tensor:
    """The stream: x, or x + residual."""
    return x if residual is None else x + residual


def statistics(h: Tensor, form: RowForm) -> Statistics:
    """Mean, S and 1/root of the rows of a float32 tensor."""
    n = h.shape[1]
    mean = h.mean(1) if form.needs_mean else h.new_zeros(h.shape[0])
    m2 = (h - mean[:, None]).square().sum(1)
    if form.statistic == "variance":
        square = m2 / (n - form.correction)
    elif form.statistic == "compressed":
        square = m2 / (n + 1) + n * mean.square()
    elif form.statistic == "mean-square":
        square = m2 / n + mean.square()
    else:
        square = m2 + n * mean.square()
    return Statistics(mean, square, factor_of(square, form))


def factor_of(square: Tensor, form: RowForm) -> Tensor:
    """1 / root."""
    if form.eps_place == "inside":
        return 1.0 / torch.sqrt(square + form.eps)
    if form.eps_place == "floor-inside":
        return 1.0 / torch.sqrt(square.clamp_min(form.eps))
    if form.eps_place == "outside":
        return 1.0 / (square.sqrt() + form.eps)
    return 1.0 / square.sqrt().clamp_min(form.eps)


def read(x: Tensor, gate: Tensor | None, form: RowForm) -> Tensor:
    """What the statistics are of, in float32."""
    h = x.float()
    if form.gate == "before" and gate is not None:
        h = (h * F.silu(gate.float())).to(x.dtype).float()
    return h


def output(
    h: Tensor,
    mean: Tensor,
    factor: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: RowForm,
) -> Tensor:
    """The result before it is rounded or quantised, in float32 at least."""
    if form.gate == "swish" and gate is not None:
        h = h * torch.sigmoid(gate.float() * h)
    if form.centre:
        h = h - mean[:, None]
    h = (h * factor[:, None] * form.scale).to(dtype_of(form.norm_dtype))
    if weight is not None:
        h = h * (weight if form.weight_offset == 0.0 else weight + form.weight_offset)
    if bias is not None:
        h = h + bias
    h = activated(h.float(), form.activation)
    if form.gate == "after" and gate is not None:
        h = h * F.silu(gate.float())
    return h


def activated(y: Tensor, activation: str) -> Tensor:
    """act(y)."""
    return _ACTIVATIONS[activation](y)


def quantised(y: Tensor, form: RowForm) -> tuple[Tensor, Tensor]:
    """(y / scale in the dtype of the form, scale), with one scale for a row or for each block."""
    rows, cols = y.shape
    block = form.block or cols
    blocks = -(-cols // block)
    limit = QUANTISED[form.quantise]
    padded = F.pad(y, (0, blocks * block - cols)).view(rows, blocks, block)
    largest = padded.abs().amax(2)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / limit)
    q = padded / scale[:, :, None]
    if form.quantise == "int8":
        q = q.round()
    q = q.clamp(-limit, limit).view(rows, blocks * block)[:, :cols]
    return q.to(dtype_of(form.quantise)).contiguous(), scale


def backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    square: Tensor,
    form: RowForm,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """dx, the gradient of the gate, and those of weight and bias in float32.

    The equations are those of `row_backward.py`.
    """
    n = x.shape[1]
    h, z, g = read(x, gate, form), None if gate is None else gate.float(), dy.float()
    factor = factor_of(square, form)[:, None]
    mean = mean[:, None] if form.needs_mean else torch.zeros_like(square)[:, None]
    top = h
    if form.gate == "swish" and z is not None:
        top = top * torch.sigmoid(z * h)
    if form.centre:
        top = top - mean
    normal = top * factor * form.scale
    dgate = None
    if form.activation != "none" or form.gate == "after":
        y = normal.to(dtype_of(form.norm_dtype))
        y = y if weight is None else y * (weight + form.weight_offset)
        y = (y if bias is None else y + bias).float()
        if form.gate == "after" and z is not None:
            dgate = g * activated(y, form.activation) * _silu_slope(z)
            g = g * F.silu(z)
        g = g * activation_slope(y, form.activation)
    dweight = (g * normal.to(dtype_of(form.norm_dtype)).float()).sum(0)
    dbias = g.sum(0)
    g = g * form.scale
    if weight is not None:
        g = g * (weight.float() + form.weight_offset)
    dtop = g * factor
    dh = dtop
    if form.gate == "swish" and z is not None:
        s = torch.sigmoid(z * h)
        curve = h * s * (1 - s)
        dh = dtop * (s + z * curve)
        dgate = (dtop * h * curve).sum(0)
    dot = (g * top).sum(1, keepdim=True)
    direction, k = _half_slope(h, mean, n, form)
    pull = _pull(square[:, None], factor, form)
    dh = dh - (factor * dot * k) * factor * (pull * direction)
    if form.centre:
        dh = dh - g.sum(1, keepdim=True) / n * factor
    if form.gate == "before" and z is not None:
        dgate = dh * x.float() * _silu_slope(z)
        dh = dh * F.silu(z)
    if dstream is not None:
        dh = dh + dstream.float()
    return dh.to(x.dtype), dgate, dweight, dbias


def _half_slope(h: Tensor, mean: Tensor, n: int, form: RowForm) -> tuple[Tensor, float]:
    if form.statistic == "variance":
        return h - mean, 1.0 / (n - form.correction)
    if form.statistic == "compressed":
        return h + n * mean, 1.0 / (n + 1)
    return h, 1.0 / n if form.statistic == "mean-square" else 1.0


def _pull(square: Tensor, factor: Tensor, form: RowForm) -> Tensor:
    zero = torch.zeros_like(square)
    if form.eps_place == "inside":
        return factor
    if form.eps_place == "floor-inside":
        return torch.where(square < form.eps, zero, factor)
    root = square.sqrt()
    pull = torch.where(root == 0, zero, 1.0 / torch.where(root == 0, torch.ones_like(root), root))
    return torch.where(root < form.eps, zero, pull) if form.eps_place == "floor" else pull


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def activation_slope(y: Tensor, activation: str) -> Tensor:
    """D act / d y."""
    if activation == "relu":
        return (y > 0).float()
    if activation == "silu":
        return _silu_slope(y)
    if activation == "sigmoid":
        s = torch.sigmoid(y)
        return s * (1 - s)
    if activation == "gelu":
        density = 0.3989422804014327 * torch.exp(-0.5 * y * y)
        return 0.5 * (1 + torch.erf(y * 0.7071067811865476)) + y * density
    if activation == "gelu-tanh":
        inner = 1.5957691216057308 * (y + 0.044715 * y * y * y)
        slope = 1.5957691216057308 * (1 + 0.134145 * y * y)
        return torch.sigmoid(inner) * (1 + y * torch.sigmoid(-inner) * slope)
    return torch.ones_like(y)
