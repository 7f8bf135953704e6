"""ATen's own normalizations (`aten.layer_norm` and its kin) in the terms of `NormSpec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.lift import Lift
from normfx.ops import NormSpec

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Core:
    """A normalization found in a graph: its spec and the nodes it reads.

    Attributes:
        spec, x, weight, bias, eps, mean, square, gate: see `ops.norm`.
        lift: the lift that x was met in, if it may be read in another view too.
        over: the axes that the statistic is taken over, in that lift.
    """

    spec: NormSpec
    x: fx.Node
    weight: Any = None
    bias: Any = None
    eps: Any = None
    mean: Any = None
    square: Any = None
    gate: Any = None
    lift: Lift | None = None
    over: frozenset[int] = frozenset()

    @property
    def operands(self) -> tuple[Any, ...]:
        """What the canonical node reads beside x, in the order of `ops.norm`."""
        return self.weight, self.bias, self.eps, self.mean, self.square, self.gate

    @property
    def inputs(self) -> list[fx.Node]:
        """Every node that the canonical node reads."""
        return [n for n in (self.x, *self.operands) if n is not None]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics of this dtype are computed in: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def composite(node: fx.Node) -> Core | None:
    """The core of a call of one of ATen's normalizations, or None for any other node."""
    packet = g.packet(node)
    reader = _READERS.get(packet) if packet is not None else None
    if reader is None:
        return None
    named = g.arguments(node)
    x: Any = named.get("input", named.get("v"))
    out = g.dtype(node)
    given = g.dtype(x) if isinstance(x, fx.Node) else None
    if given is None or out is None or not out.is_floating_point:
        return None
    wide_dtype = wide(torch.promote_types(given, out))
    spec = reader(named, len(g.shape(x) or ()))
    if spec is None:
        return None
    spec = spec._replace(
        stats_dtype=wide_dtype,
        norm_dtype=wide_dtype,
        out_dtype=out,
        origin=str(packet).removeprefix("aten."),
    )
    return Core(
        spec,
        x,
        named.get("weight", named.get("g")),
        named.get("bias"),
        None,
        named.get("running_mean"),
        named.get("running_var"),
    )


def _layer_norm(named: dict[str, Any], rank: int) -> NormSpec:
    trailing = len(named["normalized_shape"])
    return NormSpec("LayerNorm", tuple(range(rank - trailing, rank)), eps=named["eps"])


def _rms_norm(named: dict[str, Any], rank: int) -> NormSpec:
    trailing = len(named["normalized_shape"])
    eps = named.get("eps")
    if eps is None:  # torch's default: of float32 for half dtypes too
        eps = torch.finfo(wide(g.dtype(named["input"]) or torch.float32)).eps
    return NormSpec(
        "RMSNorm", tuple(range(rank - trailing, rank)), "mean-square", centre=False, eps=eps
    )


def _group_norm(named: dict[str, Any], rank: int) -> NormSpec:
    return NormSpec(
        "GroupNorm",
        tuple(range(2, rank + 1)),
        eps=named["eps"],
        groups=named["num_groups"],
        affine_dim=1,
    )


def _instance_norm(named: dict[str, Any], rank: int) -> NormSpec | None:
    if not named["use_input_stats"]:
        return _static(named, "InstanceNorm")
    if named["running_mean"] is not None:
        return None  # updates running statistics per instance: left as it is
    return NormSpec("InstanceNorm", tuple(range(2, rank)), eps=named["eps"], affine_dim=1)


def _batch_norm(named: dict[str, Any], rank: int) -> NormSpec:
    if not named["training"]:
        return _static(named, "BatchNorm")
    if named["running_mean"] is None:
        return NormSpec(
            "BatchNorm", tuple(d for d in range(rank) if d != 1), eps=named["eps"], affine_dim=1
        )
    return NormSpec(
        "BatchNorm",
        tuple(d for d in range(rank) if d != 1),
        "batch",
        eps=named["eps"],
        momentum=named["momentum"],
        affine_dim=1,
    )


def _weight_norm(named: dict[str, Any], rank: int) -> NormSpec:
    """W = g * v / ||v||, the norm over all dims but one."""
    dim = named["dim"]
    over = tuple(d for d in range(rank) if dim == -1 or d != dim % rank)
    return NormSpec("L2Norm", over, "sum-square", centre=False, eps=0.0, eps_place="outside")


def _static(named: dict[str, Any], kind: str) -> NormSpec:
    return NormSpec(kind, (), "running", eps=named["eps"], affine_dim=1)


_READERS = {
    aten.layer_norm: _layer_norm,
    aten.rms_norm: _rms_norm,
    aten.group_norm: _group_norm,
    aten.instance_norm: _instance_norm,
    aten.batch_norm: _batch_norm,
    aten._weight_norm: _weight_norm,
}
