"""The row of the table for the linear with a norm inside, and what of it is compiled offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from normfx.kernels import Kernel
from normfx.kernels.generate import RowForm, dtype_name
from normfx.kernels.linear import CONSTANTS, DECODE_ROWS, tiling, unsupported
from normfx.kernels.linear_source import linear_with_norm
from normfx.kernels.offline import Build
from normfx.kernels.row_table import FLOATS
from normfx.ops import NormSpec

FORMS = {
    "rms-norm": RowForm("mean-square", centre=False),
    "layer-norm": RowForm(activation="gelu"),
}


def supports(spec: NormSpec, cols: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why a norm of rows of this size, read by a linear, is not supported, or ""."""
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    if dtype not in FLOATS:
        return f"no kernel for {dtype_name(dtype)}"
    form = RowForm.of(spec)
    if form is None or cols < 1:
        return f"no kernel for {spec.kind}"
    return unsupported(form)


def builds() -> Iterator[Build]:
    """Both tilings, in bfloat16 and float32, with everything that the epilogue has."""
    for name, form in FORMS.items():
        for dtype in (torch.bfloat16, torch.float32):
            for label, rows in (("decode", DECODE_ROWS), ("general", DECODE_ROWS + 1)):
                tile = tiling(rows, dtype.itemsize)
                constants = form.constants()
                arguments: dict[str, Any] = {
                    "x_ptr": dtype,
                    "weight_ptr": dtype,
                    "bias_ptr": dtype,
                    "residual_ptr": dtype,
                    "y_ptr": dtype,
                    "rows": "i32",
                    "outs": "i32",
                    "cols": "i32",
                    "x_row_stride": "i32",
                    "weight_out_stride": "i32",
                    "weight_col_stride": 1,
                    "residual_row_stride": "i32",
                    **{known: constants[known] for known in CONSTANTS},
                    "WIDEN": False,
                    "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n,
                    "BLOCK_K": tile.block_k,
                    "BLOCK_S": tile.block_s,
                    "GROUP_M": tile.group_m,
                }
                yield Build(
                    f"linear_with_norm {name} {dtype_name(dtype)} {label}",
                    linear_with_norm,
                    arguments,
                    tile.num_warps,
                    tile.num_stages,
                )


LINEAR_KERNELS = (
    Kernel(
        "norm_linear",
        "act(norm(x) W^T + bias) + residual, where the norm has no weight of its own",
        "last dim; mean-square, sum-square or variance; no gate; float16, bfloat16, float32",
        supports,
        builds,
    ),
)
