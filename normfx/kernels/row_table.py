"""The rows of the table for the row kernels: what they support, and what is compiled offline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from normfx.kernels import Kernel, interpreted
from normfx.kernels.generate import QUANTISED, RowForm, dtype_name
from normfx.kernels.launch import MAX_COLS, backward_launch, forward_launch
from normfx.kernels.offline import TARGETS, Build
from normfx.kernels.row_backward import backward_persistent, backward_sums, backward_wide
from normfx.kernels.row_forward import forward_looped, forward_persistent, forward_statistics
from normfx.ops import NormSpec

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

FORMS = {
    "layer-norm": RowForm(),
    "rms-norm": RowForm("mean-square", centre=False, norm_dtype="bfloat16"),
    "rms-norm(1+w)": RowForm("mean-square", centre=False, weight_offset=1.0),
    "crms-norm": RowForm("compressed", centre=False),
    "l2-norm": RowForm("sum-square", centre=False, eps_place="floor"),
    "gated": RowForm("mean-square", centre=False, gate="after", activation="silu"),
    "swish": RowForm("variance", gate="swish"),
}
COLS = (64, 768, 4096, 8192, 16384, 32768, 131072)
# e4m3fn is no type of sm_80, and gfx942 has another one
FLOAT8_TARGETS = ("sm_90", "sm_100")


def supports(spec: NormSpec, cols: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why a norm over rows of this size is not supported, or ""."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"no kernel for {device.type}"
    if dtype not in FLOATS:
        return f"no kernel for {dtype_name(dtype)}"
    if not 1 <= cols <= MAX_COLS:
        return f"rows of {cols} columns"
    return "" if RowForm.of(spec) is not None else f"no kernel for {spec.kind}"


def _arguments(kernel: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of a kernel; the pointers that are not given are None, and strides are integers."""
    return {
        name: given.get(name, "i32" if name.endswith("_stride") else None)
        for name in kernel.arg_names
    }


def forward_builds(
    *, residual: bool = False, y: bool = True, quantise: str = "none", block: int = 0
) -> Iterator[Build]:
    """The forward configurations in bfloat16, for each path and form.

    With something around the norm, for the two forms that are all over transformers, and one size
    of each path that there is.
    """
    bf16 = torch.bfloat16
    targets = FLOAT8_TARGETS if quantise == "float8_e4m3fn" else tuple(TARGETS)
    plain = y and not residual and quantise == "none"
    for name in FORMS if plain else ("layer-norm", "rms-norm"):
        form = FORMS[name]
        for cols in COLS if plain else (4096, 32768) if quantise != "none" else (768, 4096, 131072):
            launch = forward_launch(cols)
            given: dict[str, Any] = {
                **form.constants(),
                "x_ptr": bf16,
                "residual_ptr": bf16 if residual else None,
                "gate_ptr": None if form.gate == "none" else bf16,
                "weight_ptr": bf16,
                "bias_ptr": bf16 if form.centre else None,
                "y_ptr": (bf16 if quantise == "none" else getattr(torch, quantise)) if y else None,
                "scale_ptr": None if quantise == "none" else torch.float32,
                "stream_ptr": bf16 if residual else None,
                "mean_ptr": torch.float32 if form.needs_mean and y else None,
                "square_ptr": torch.float32 if y else None,
                "factor_ptr": None if y else torch.float32,
                "rows": "i32",
                "cols": "i32",
                "WEIGHT_DTYPE": form.norm_dtype,
                "BIAS_DTYPE": form.norm_dtype,
                "STREAM_DTYPE": "bfloat16",
                "QUANTISE": quantise,
                "LIMIT": QUANTISED[quantise],
                "BLOCK": block,
                "BLOCK_M": launch.block_rows,
                "BLOCK_N": launch.block_cols,
                "SPLITS": launch.splits,
                "SPLIT_N": launch.split_cols,
            }
            label = f"{name} {cols}" if quantise == "none" else f"{name} {cols} {quantise}"
            if launch.path == "persistent":
                found = [forward_persistent]
            elif launch.splits == 1:
                found = [forward_looped]
            else:
                found = [forward_statistics, forward_looped]
            for kernel in found:
                part = kernel is forward_statistics or (launch.splits > 1)
                arguments = _arguments(
                    kernel, {**given, "part_ptr": torch.float32 if part else None}
                )
                yield Build(
                    f"{kernel.__name__} {label}", kernel, arguments, launch.num_warps, 3, targets
                )


def backward_builds() -> Iterator[Build]:
    """The backward configurations in bfloat16, for each form and path."""
    bf16, f32 = torch.bfloat16, torch.float32
    for name, form in FORMS.items():
        for cols in COLS:
            launch = backward_launch(cols, gated=form.gate != "none")
            swish = form.gate == "swish"
            given: dict[str, Any] = {
                **form.constants(),
                "x_ptr": bf16,
                "gate_ptr": None if form.gate == "none" else bf16,
                "weight_ptr": bf16,
                "bias_ptr": bf16 if form.centre else None,
                "dy_ptr": bf16,
                "mean_ptr": f32 if form.needs_mean else None,
                "square_ptr": f32,
                "sum_ptr": f32,
                "dx_ptr": bf16,
                "dgate_ptr": None if form.gate == "none" or swish else bf16,
                "dweight_ptr": f32,
                "dbias_ptr": f32 if form.centre else None,
                "dswish_ptr": f32 if swish else None,
                "rows": "i32",
                "cols": "i32",
                "WEIGHT_DTYPE": form.norm_dtype,
                "BIAS_DTYPE": form.norm_dtype,
                "STREAM_DTYPE": "bfloat16",
                "BLOCK_M": launch.block_rows,
                "BLOCK_N": launch.block_cols,
                "SPLITS": launch.splits,
                "SPLIT_N": launch.split_cols,
            }
            persistent = launch.path == "persistent"
            for kernel in [backward_persistent] if persistent else [backward_sums, backward_wide]:
                yield Build(
                    f"{kernel.__name__} {name} {cols}",
                    kernel,
                    _arguments(kernel, given),
                    launch.num_warps,
                )


def _quantised_builds(residual: bool) -> Iterable[Build]:
    yield from forward_builds(residual=residual, quantise="int8")
    yield from forward_builds(residual=residual, quantise="float8_e4m3fn", block=128)


_LIMITS = f"rows of 1 to {MAX_COLS} columns, last dim, float16, bfloat16, float32"

ROW_KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "row_norm",
        "y = act(scale * (t - centre*mean) / root * (weight + offset) + bias), or with a gate",
        _LIMITS,
        supports,
        forward_builds,
    ),
    Kernel(
        "add_row_norm",
        "row_norm of x + residual, and that sum",
        _LIMITS,
        supports,
        lambda: forward_builds(residual=True),
    ),
    Kernel(
        "row_norm_quantised",
        "row_norm in float8_e4m3fn or int8, with one scale for a row or for each block of columns",
        f"{_LIMITS}; no gradient; one scale for a row up to 65536 columns",
        supports,
        lambda: _quantised_builds(False),
    ),
    Kernel(
        "add_row_norm_quantised",
        "row_norm_quantised of x + residual, and that sum",
        f"{_LIMITS}; no gradient; one scale for a row up to 65536 columns",
        supports,
        lambda: _quantised_builds(True),
    ),
    Kernel(
        "add_row_scale",
        "x + residual, and scale / root of each row",
        f"{_LIMITS}; no gradient",
        supports,
        lambda: forward_builds(residual=True, y=False),
    ),
    Kernel(
        "row_norm_backward",
        "dx, d(gate), and in the same pass d(weight) and d(bias)",
        _LIMITS,
        supports,
        backward_builds,
    ),
)
