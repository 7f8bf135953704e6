"""The operator of a linear with a norm inside, as torch sees it, and its launch.

| operator | gives |
| --- | --- |
| norm_linear | act(norm(x) W^T + bias) + residual |

x is (rows, cols) and W is (outs, cols), as of `torch.nn.functional.linear`, with the norm's weight
folded into it. Nothing is kept for the backward pass, which norms x again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from normfx.kernels import interpreted, row, row_eager, runs_on
from normfx.kernels.generate import RowForm, dtype_name
from normfx.kernels.linear_source import linear_with_norm

# Up to so many rows a product reads its weights for one tile of rows alone: the tensor cores take
# no fewer, and memory is what it waits for.
DECODE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the product is launched.

    Attributes:
        block_m: rows of a tile.
        block_n: outputs of a tile.
        block_k: columns of a step.
        block_s: columns of a step of the moments, where the norm is centred.
        group_m: tiles of rows that are walked through before the next outputs.
        num_warps: warps of a program.
        num_stages: steps whose loads are in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    block_s: int
    group_m: int
    num_warps: int
    num_stages: int


# Decode: many narrow tiles, since the weights are all the traffic and every multiprocessor should
# have some of them; a step of 128 columns is 256 bytes of each row of the weight.
_DECODE = {2: Tiling(16, 32, 128, 256, 1, 4, 4), 4: Tiling(16, 32, 64, 256, 1, 4, 3)}
# Otherwise: a square tile, as in any product. float32 has no tensor core that keeps its bits: a
# quarter of the tile, since each thread holds its sums.
_GENERAL = {2: Tiling(128, 128, 64, 64, 8, 8, 3), 4: Tiling(64, 64, 32, 64, 8, 8, 2)}


def tiling(rows: Any, itemsize: int) -> Tiling:
    """Of a product with this many rows; of one whose rows are a symbol, the general one."""
    few = isinstance(rows, int) and rows <= DECODE_ROWS
    return (_DECODE if few else _GENERAL)[itemsize]


def unsupported(form: RowForm) -> str:
    """Why a form of a row norm is none that the product takes inside, or ""."""
    if form.statistic == "compressed":
        return "the compressed statistic needs a sum beside its squares"
    if form.centre != (form.statistic == "variance"):
        return "centred by a mean that the statistic does not have"
    if form.gate != "none" or form.quantise != "none" or form.weight_offset != 0.0:
        return "a gate, a quantised result or a weight of its own"
    return ""


@row.operator("normfx::norm_linear")
def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, form: str
) -> Tensor:
    """act(norm(x) W^T + bias) + residual, where `form` is that of the norm and has the activation.

    Shapes:
        x: (rows, cols). weight: (outs, cols). bias: (outs,). residual: (rows, outs). Returns
        (rows, outs).

    Dtypes:
        float16, bfloat16 or float32, one for all; sums in float32, rounded once to it.

    Raises:
        ValueError: the form is none that the product takes inside.
    """
    parsed = _parse(form)
    if not runs_on(x):
        return _eager(x, weight, bias, residual, parsed)
    rows, cols = x.shape
    outs = weight.shape[0]
    y = torch.empty((rows, outs), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    tile = tiling(rows, x.element_size())
    constants = parsed.constants()
    wrap_triton(linear_with_norm)[(-(-rows // tile.block_m) * -(-outs // tile.block_n),)](
        x,
        weight,
        bias,
        residual,
        y,
        rows,
        outs,
        cols,
        x.stride(0),
        *weight.stride(),
        0 if residual is None else residual.stride(0),
        **{name: constants[name] for name in CONSTANTS},
        WIDEN=interpreted(),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_S=tile.block_s,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


CONSTANTS = ("STATISTIC", "CENTRE", "CORRECTION", "EPS", "EPS_PLACE", "SCALE", "ACTIVATION")


def _parse(form: str) -> RowForm:
    parsed = RowForm.parse(form)
    if reason := unsupported(parsed):
        raise ValueError(f"normfx::norm_linear: {reason}; got the form {form}.")
    return parsed


def _eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, form: RowForm
) -> Tensor:
    """The same in plain torch."""
    h = _normalized(x, form)
    y = row_eager.activated(torch.nn.functional.linear(h, weight, bias).float(), form.activation)
    y = y if residual is None else y + residual
    return y.to(x.dtype)


def _normalized(x: Tensor, form: RowForm) -> Tensor:
    h = x.float()
    mean, _, factor = row_eager.statistics(h, form)
    h = h - mean[:, None] if form.centre else h
    return (h * factor[:, None] * form.scale).to(x.dtype)


@norm_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, form: str) -> Tensor:
    _parse(form)
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, form = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.has_residual, ctx.form = residual is not None, form


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    form = RowForm.parse(ctx.form)
    plain = replace(form, activation="none", norm_dtype=dtype_name(x.dtype), out_dtype="").text
    h, mean, square = row.row_norm(x, None, None, None, plain)
    g = dy
    if form.activation != "none":
        before = torch.nn.functional.linear(h, weight, bias).float()
        g = (dy.float() * row_eager.activation_slope(before, form.activation)).to(dy.dtype)
    dx = row.row_norm_backward(g @ weight, None, x, None, None, None, mean, square, plain)[0]
    dbias = None if bias is None else g.sum(0)
    return dx, g.t() @ h, dbias, dy if ctx.has_residual else None, None


norm_linear.register_autograd(_gradients, setup_context=_keep)
