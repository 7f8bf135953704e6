"""The operators of the row kernels, as torch sees them.

Each is a `torch.library.triton_op`: Inductor looks into it and sees the launches, CUDA graphs and
`torch.export` work. Every one has a fake body, and a body in plain torch for tensors that no kernel
runs on. x is (rows, cols); other shapes are viewed so before.

| operator | gives |
| --- | --- |
| row_norm | y, mean, S |
| add_row_norm | y, x + residual, mean, S |
| row_norm_quantised | q, scale |
| add_row_norm_quantised | q, scale, x + residual |
| add_row_scale | x + residual, scale / root |
| row_norm_backward | dx, d(gate), d(weight), d(bias) |

The mean, S, and what a backward pass does not have, are empty tensors where they are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import CustomOpDef, triton_op, wrap_triton

from normfx.kernels import row_eager, runs_on
from normfx.kernels.generate import QUANTISED, RowForm, dtype_name, dtype_of
from normfx.kernels.launch import backward_launch, forward_launch
from normfx.kernels.row_backward import backward_persistent, backward_sums, backward_wide
from normfx.kernels.row_forward import forward_looped, forward_persistent, forward_statistics


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """`triton_op` of a function that writes to none of its arguments."""
    return cast(Any, triton_op(name, mutates_args=()))


@operator("normfx::row_norm")
def row_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of each row: y, and what its backward pass needs.

    Shapes:
        x: (rows, cols). gate: as x, or (cols,) for "swish". weight, bias: (cols,).

    Dtypes:
        float16, bfloat16 or float32; statistics in float32.

    Args:
        x: what is normalized; its columns are neighbours in memory.
        gate: see `RowForm`.
        weight: factor, or None.
        bias: summand, or None.
        form: `RowForm.text`.
    """
    parsed = RowForm.parse(form)
    if not runs_on(x):
        h = row_eager.read(x, gate, parsed)
        mean, square, factor = row_eager.statistics(h, parsed)
        y = row_eager.output(h, mean, factor, gate, weight, bias, parsed)
        return y.to(_out(x, parsed)), _kept(mean, parsed), square
    y = torch.empty(x.shape, dtype=_out(x, parsed), device=x.device)
    mean, square = _statistics(x, parsed)
    _forward(x, None, gate, weight, bias, parsed, y=y, mean=mean, square=square)
    return y, mean, square


@operator("normfx::add_row_norm")
def add_row_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm of each row of x + residual, and that sum. A gate stands after the norm."""
    parsed = RowForm.parse(form)
    if not runs_on(x):
        stream = row_eager.stream_of(x, residual)
        h = row_eager.read(stream, gate, parsed)
        mean, square, factor = row_eager.statistics(h, parsed)
        y = row_eager.output(h, mean, factor, gate, weight, bias, parsed)
        return y.to(_out(stream, parsed)), stream, _kept(mean, parsed), square
    stream = torch.empty(x.shape, dtype=_sum(x, residual), device=x.device)
    y = torch.empty(x.shape, dtype=_out(stream, parsed), device=x.device)
    mean, square = _statistics(x, parsed)
    _forward(x, residual, gate, weight, bias, parsed, y=y, stream=stream, mean=mean, square=square)
    return y, stream, mean, square


@operator("normfx::row_norm_quantised")
def row_norm_quantised(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, form: str
) -> tuple[Tensor, Tensor]:
    """The norm of each row in eight bits, and the scales (rows, blocks) that it is divided by."""
    parsed = RowForm.parse(form)
    if not runs_on(x):
        h = row_eager.read(x, gate, parsed)
        mean, _, factor = row_eager.statistics(h, parsed)
        return row_eager.quantised(
            row_eager.output(h, mean, factor, gate, weight, bias, parsed), parsed
        )
    q, scale = _quantised(x, parsed)
    _forward(x, None, gate, weight, bias, parsed, y=q, scale=scale)
    return q, scale


@operator("normfx::add_row_norm_quantised")
def add_row_norm_quantised(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `row_norm_quantised` of x + residual, and that sum."""
    parsed = RowForm.parse(form)
    if not runs_on(x):
        stream = row_eager.stream_of(x, residual)
        h = row_eager.read(stream, gate, parsed)
        mean, _, factor = row_eager.statistics(h, parsed)
        y = row_eager.output(h, mean, factor, gate, weight, bias, parsed)
        return *row_eager.quantised(y, parsed), stream
    q, scale = _quantised(x, parsed)
    stream = torch.empty(x.shape, dtype=_sum(x, residual), device=x.device)
    _forward(x, residual, gate, weight, bias, parsed, y=q, scale=scale, stream=stream)
    return q, scale, stream


@operator("normfx::add_row_scale")
def add_row_scale(x: Tensor, residual: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The sum x + residual, and scale / root of each row: (rows, cols) and (rows,) in float32."""
    parsed = RowForm.parse(form)
    if not runs_on(x):
        stream = row_eager.stream_of(x, residual)
        factor = row_eager.statistics(stream.float(), parsed).factor
        return stream, factor * parsed.scale
    stream = torch.empty(x.shape, dtype=_sum(x, residual), device=x.device)
    factor = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    _forward(x, residual, None, None, None, parsed, stream=stream, factor=factor)
    return stream, factor


@operator("normfx::row_norm_backward")
def row_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    square: Tensor,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `row_norm` at x, gate, weight and bias.

    Args:
        dy: the gradient at y.
        dstream: what is added to dx: the gradient at x by another way, or None.
        x: what the forward pass normalized (the sum, where there was a residual).
        gate: as in the forward pass.
        weight: as in the forward pass.
        bias: as in the forward pass.
        mean: as the forward pass gave it.
        square: as the forward pass gave it.
        form: as in the forward pass.
    """
    parsed = RowForm.parse(form)
    if not runs_on(x):
        dx, dgate, dweight, dbias = row_eager.backward(
            dy, dstream, x, gate, weight, bias, mean, square, parsed
        )
        return (
            dx,
            x.new_empty(0) if gate is None or dgate is None else dgate.to(gate.dtype),
            x.new_empty(0) if weight is None else dweight.to(weight.dtype),
            x.new_empty(0) if bias is None else dbias.to(bias.dtype),
        )
    return _backward(dy, dstream, x, gate, weight, bias, mean, square, parsed)


# -- launches ------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: RowForm,
    *,
    y: Tensor | None = None,
    scale: Tensor | None = None,
    stream: Tensor | None = None,
    mean: Tensor | None = None,
    square: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """Writes the outputs that are given."""
    if form.gate == "before" and residual is not None:
        raise ValueError("row kernels: a gate before the norm does not go with a residual.")
    rows, cols = x.shape
    if rows == 0 or cols == 0:
        return
    launch = forward_launch(cols)
    if launch.splits > 1 and form.quantise != "none" and form.block == 0:
        raise ValueError(
            f"row kernels: one scale for a row of {cols} columns: choose a block of columns."
        )
    x, residual, gate = _lined_up(x), _lined_up(residual), _lined_up(gate)
    mean = mean if form.needs_mean else None
    constants = {
        **form.constants(),
        **_roundings(x, residual, weight, bias, form),
        "QUANTISE": form.quantise,
        "LIMIT": QUANTISED[form.quantise],
        "BLOCK": form.block,
        "BLOCK_N": launch.block_cols,
    }
    strides = (_row_stride(x), _row_stride(residual), _row_stride(gate))
    if launch.path == "persistent":
        wrap_triton(forward_persistent)[(-(-rows // launch.block_rows),)](
            x,
            residual,
            gate,
            weight,
            bias,
            y,
            scale,
            stream,
            mean,
            square,
            factor,
            rows,
            cols,
            *strides,
            **constants,
            BLOCK_M=launch.block_rows,
            num_warps=launch.num_warps,
        )
        return
    part = None
    if launch.splits > 1:
        part = torch.empty((rows, launch.splits, 3), dtype=torch.float32, device=x.device)
        wrap_triton(forward_statistics)[(rows, launch.splits)](
            x,
            residual,
            gate,
            stream,
            part,
            cols,
            *strides,
            MEAN=form.needs_mean,
            STREAM_DTYPE=constants["STREAM_DTYPE"],
            GATE=form.gate,
            SPLIT_N=launch.split_cols,
            BLOCK_N=launch.block_cols,
            num_warps=launch.num_warps,
        )
    wrap_triton(forward_looped)[(rows, launch.splits)](
        x,
        residual,
        gate,
        weight,
        bias,
        y,
        scale,
        stream if launch.splits == 1 else None,
        mean,
        square,
        factor,
        part,
        cols,
        *strides,
        **constants,
        SPLITS=launch.splits,
        SPLIT_N=launch.split_cols,
        num_warps=launch.num_warps,
    )


def _backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    square: Tensor,
    form: RowForm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    launch = backward_launch(cols, gated=form.gate != "none")
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    swish = form.gate == "swish"
    dgate = None
    if gate is not None and not swish:
        dgate = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    programs = programs_of(x.device, launch.num_warps)
    if isinstance(rows, int):
        programs = max(1, min(programs, -(-rows // launch.block_rows)))

    def sums(wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        return torch.empty((programs, cols), dtype=torch.float32, device=x.device)

    dweight, dbias, dswish = sums(weight is not None), sums(bias is not None), sums(swish)
    if rows == 0 or cols == 0:
        for given in (dweight, dbias, dswish):
            if given is not None:
                given.zero_()
    else:
        dy, x, gate, dstream = _lined_up(dy), _lined_up(x), _lined_up(gate), _dense(dstream)
        constants = {**form.constants(), **_roundings(x, None, weight, bias, form)}
        strides = (_row_stride(x), _row_stride(gate), _row_stride(dy))
        kept = mean if form.needs_mean else None
        if launch.path == "persistent":
            wrap_triton(backward_persistent)[(programs,)](
                x,
                gate,
                weight,
                bias,
                dy,
                dstream,
                kept,
                square,
                dx,
                dgate,
                dweight,
                dbias,
                dswish,
                rows,
                cols,
                *strides,
                **constants,
                BLOCK_M=launch.block_rows,
                BLOCK_N=launch.block_cols,
                num_warps=launch.num_warps,
            )
        else:
            shared = {
                name: constants[name]
                for name in constants
                if name not in ("STATISTIC", "CORRECTION")
            }
            part = torch.empty((rows, launch.splits, 2), dtype=torch.float32, device=x.device)
            wrap_triton(backward_sums)[(rows, launch.splits)](
                x,
                gate,
                weight,
                bias,
                dy,
                kept,
                square,
                dgate,
                part,
                cols,
                *strides,
                **shared,
                SPLIT_N=launch.split_cols,
                BLOCK_N=launch.block_cols,
                num_warps=launch.num_warps,
            )
            chunks = -(-cols // launch.block_cols)
            wrap_triton(backward_wide)[(programs, chunks)](
                x,
                gate,
                weight,
                bias,
                dy,
                dstream,
                kept,
                square,
                part,
                dx,
                dgate,
                dweight,
                dbias,
                dswish,
                rows,
                cols,
                *strides,
                **constants,
                SPLITS=launch.splits,
                BLOCK_N=launch.block_cols,
                num_warps=launch.num_warps,
            )
    if dswish is not None and gate is not None:
        dgate = dswish.sum(0).to(gate.dtype)
    return (
        dx,
        x.new_empty(0) if dgate is None else dgate,
        x.new_empty(0) if dweight is None or weight is None else dweight.sum(0).to(weight.dtype),
        x.new_empty(0) if dbias is None or bias is None else dbias.sum(0).to(bias.dtype),
    )


def programs_of(device: torch.device, num_warps: int) -> int:
    """How many programs of a backward pass share the rows: 16 warps for each multiprocessor."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 4  # the interpreter runs them one after the other
    return _multiprocessors(device.index or 0) * max(1, 16 // num_warps)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _roundings(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, form: RowForm
) -> dict[str, str]:
    """The dtypes that values are rounded to on the way, by torch's promotion."""
    dtype = dtype_of(form.norm_dtype)
    names = {"STREAM_DTYPE": dtype_name(x.dtype if residual is None else _sum(x, residual))}
    for name, operand in (("WEIGHT_DTYPE", weight), ("BIAS_DTYPE", bias)):
        dtype = dtype if operand is None else torch.promote_types(dtype, operand.dtype)
        names[name] = dtype_name(dtype)
    return names


def _sum(x: Tensor, residual: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, residual.dtype)


def _out(x: Tensor, form: RowForm) -> torch.dtype:
    return dtype_of(form.out_dtype) if form.out_dtype else x.dtype


def _kept(mean: Tensor, form: RowForm) -> Tensor:
    return mean if form.needs_mean else mean.new_empty(0)


def _statistics(x: Tensor, form: RowForm) -> tuple[Tensor, Tensor]:
    """Room for the mean, empty where there is none, and for S."""
    mean = torch.empty(
        x.shape[:1] if form.needs_mean else (0,), dtype=torch.float32, device=x.device
    )
    return mean, torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)


def _quantised(x: Tensor, form: RowForm) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    q = torch.empty(x.shape, dtype=dtype_of(form.quantise), device=x.device)
    blocks = 1 if form.block == 0 else -(-cols // form.block)
    return q, torch.empty((rows, blocks), dtype=torch.float32, device=x.device)


def _lined_up(x: Any) -> Any:
    """A tensor whose columns are neighbours in memory."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _row_stride(x: Any) -> Any:
    return 0 if x is None or x.dim() < 2 else x.stride(0)


# -- fake bodies and gradients -------------------------------------------------------------------


def _empty(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@row_norm.register_fake
def _(x: Tensor, gate: Any, weight: Any, bias: Any, form: str) -> tuple[Tensor, ...]:
    parsed = RowForm.parse(form)
    return _empty(x, x.shape, _out(x, parsed)), *_statistics(x, parsed)


@add_row_norm.register_fake
def _(
    x: Tensor, residual: Tensor, gate: Any, weight: Any, bias: Any, form: str
) -> tuple[Tensor, ...]:
    parsed = RowForm.parse(form)
    stream = _empty(x, x.shape, _sum(x, residual))
    return _empty(x, x.shape, _out(stream, parsed)), stream, *_statistics(x, parsed)


@row_norm_quantised.register_fake
def _(x: Tensor, gate: Any, weight: Any, bias: Any, form: str) -> tuple[Tensor, ...]:
    return _quantised(x, RowForm.parse(form))


@add_row_norm_quantised.register_fake
def _(
    x: Tensor, residual: Tensor, gate: Any, weight: Any, bias: Any, form: str
) -> tuple[Tensor, ...]:
    return *_quantised(x, RowForm.parse(form)), _empty(x, x.shape, _sum(x, residual))


@add_row_scale.register_fake
def _(x: Tensor, residual: Tensor, form: str) -> tuple[Tensor, ...]:
    return _empty(x, x.shape, _sum(x, residual)), _empty(x, x.shape[:1], torch.float32)


@row_norm_backward.register_fake
def _(
    dy: Tensor,
    dstream: Any,
    x: Tensor,
    gate: Any,
    weight: Any,
    bias: Any,
    mean: Tensor,
    square: Tensor,
    form: str,
) -> tuple[Tensor, ...]:
    given = (gate, weight, bias)
    grads = [x.new_empty(0) if t is None else _empty(x, t.shape, t.dtype) for t in given]
    return _empty(x, x.shape, x.dtype), *grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, form = inputs
    x, gate, weight, bias = operands[0], *operands[-3:]
    if len(operands) == 5:  # there is a residual: the sum was normalized
        x = output[1]
    ctx.save_for_backward(x, gate, weight, bias, *output[-2:])
    ctx.form = form
    ctx.dtypes = [None if t is None else t.dtype for t in operands]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[-2:])


def _gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    x, gate, weight, bias, mean, square = ctx.saved_tensors
    added = len(ctx.dtypes) == 5
    dy, dstream = grads[0], grads[1] if added else None
    if dy is None:
        dy = torch.zeros(x.shape, dtype=_out(x, RowForm.parse(ctx.form)), device=x.device)
    dx, *rest = torch.ops.normfx.row_norm_backward(
        dy, dstream, x, gate, weight, bias, mean, square, ctx.form
    )
    operands = (gate, weight, bias)
    others = [None if t is None else d for t, d in zip(operands, rest, strict=True)]
    streams = [dx.to(dtype) for dtype in ctx.dtypes[: 2 if added else 1]]
    return *streams, *others, None


row_norm.register_autograd(_gradients, setup_context=_keep)
add_row_norm.register_autograd(_gradients, setup_context=_keep)
