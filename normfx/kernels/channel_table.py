"""The rows of the table for the channel kernels, and what of them is compiled offline.

No canonical norm asks for them: the layers of `normfx.nn` do, by `channel.serves`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from normfx.kernels import Kernel, channel_source
from normfx.kernels.channel import tile_of
from normfx.kernels.launch import power_of_two
from normfx.kernels.offline import Build
from normfx.ops import NormSpec

# (channels, positions, whether channels are neighbours): tokens of a transformer, images, the last
# images of a ResNet.
LAYOUTS = {
    "tokens": (768, 8192, True),
    "images": (64, 3136, False),
    "small images": (512, 49, False),
}
# Programs of an H100, and as many as there are at most.
PROGRAMS = 256


def supports(spec: NormSpec, cols: int, dtype: torch.dtype, device: torch.device) -> str:
    """These kernels serve layers, and no norm of a graph."""
    return f"no norm of a graph: normfx.nn calls it, not {spec.kind}"


def _layouts(regions: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    for label, (channels, positions, adjoin) in LAYOUTS.items():
        tile = tile_of(channels, positions, channels_adjoin=adjoin, regions=regions)
        sizes = dict.fromkeys(("batch", "channels", "positions"), "i32")
        strides: dict[str, Any] = {}
        for name in "xuvy":
            strides[f"{name}_batch_stride"] = "i32"
            strides[f"{name}_channel_stride"] = 1 if adjoin else "i32"
            strides[f"{name}_position_stride"] = "i32" if adjoin else 1
        blocks = {"BLOCK_P": tile.positions, "BLOCK_C": tile.channels}
        yield label, {**sizes, **strides, **blocks}


def _build(label: str, kernel: Any, given: dict[str, Any]) -> Build:
    arguments = {name: given.get(name) for name in kernel.arg_names}
    return Build(f"{kernel.__name__} {label}", kernel, arguments, 4)


def moments_builds() -> Iterator[Build]:
    """One and two regions, with and without a mean."""
    f32 = torch.float32
    for regions in (1, 2):
        for layout, given in _layouts(regions):
            given |= {"x_ptr": torch.bfloat16, "mask_ptr": torch.bool, "part_ptr": f32}
            given |= {"MEAN": True, "REGIONS": regions}
            label = f"{layout}, {regions} region{'s' * (regions > 1)}"
            yield _build(label, channel_source.channel_moments, given)
        join: dict[str, Any] = {"part_ptr": f32, "total_ptr": f32, "programs": "i32"}
        join |= {"channels": "i32", "MEAN": True, "REGIONS": regions}
        join |= {"BLOCK_P": power_of_two(PROGRAMS), "BLOCK_C": 16}
        yield _build(f"{regions}", channel_source.channel_join, join)


def sums_builds() -> Iterator[Build]:
    """With all three sums."""
    for layout, given in _layouts():
        given |= {"u_ptr": torch.bfloat16, "v_ptr": torch.bfloat16, "centre_ptr": torch.float32}
        given |= {"part_ptr": torch.float32, "SQUARES": True}
        yield _build(layout, channel_source.channel_sums, given)


def affine_builds() -> Iterator[Build]:
    """With every operand, as a masked backward pass has them, and with those of a forward pass."""
    for layout, given in _layouts():
        given |= dict.fromkeys(("v_ptr", "y_ptr"), torch.bfloat16)
        given |= dict.fromkeys(("b_ptr", "c_ptr", "centre_ptr"), torch.float32)
        yield _build(f"{layout}, forward", channel_source.channel_affine, given)
        given |= {"u_ptr": torch.bfloat16, "a_ptr": torch.float32, "mask_ptr": torch.bool}
        yield _build(f"{layout}, backward", channel_source.channel_affine, given)


_LIMITS = "called by normfx.nn; any layout; float16, bfloat16, float32"

CHANNEL_KERNELS = (
    Kernel(
        "channel_moments",
        "n, mean and sum of squares about it, of each channel, where a mask is set and is not",
        _LIMITS,
        supports,
        moments_builds,
    ),
    Kernel(
        "channel_sums",
        "sum of u, of u * (v - centre) and of (v - centre)^2, of each channel",
        f"{_LIMITS}; no gradient",
        supports,
        sums_builds,
    ),
    Kernel(
        "channel_affine",
        "a*u + b*(v - centre) + c, with other values where a mask is not set",
        f"{_LIMITS}; no gradient with u or a mask",
        supports,
        affine_builds,
    ),
)
