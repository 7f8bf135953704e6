"""Normalization layers that train, and become cheap (most of them: nothing at all) at inference.

Each is one file with its equation, shapes, defaults and source. State-dict names, shapes and dtypes
are those of the released implementations. No layer branches on the value of a tensor, so each
compiles into one graph, in training and in evaluation.

    | layer | training statistic | at inference |
    | --- | --- | --- |
    | `UnifiedNorm` | smoothed mean square of each channel | a constant affine: folds away |
    | `PowerNorm` | running mean square of each channel | as UnifiedNorm, behind group scaling |
    | `MaskedBatchNorm` | mean and variance of each channel, without padding | folds away |
    | `EvoNorm` | with the activation, B (batch) and S (sample) | its affine folds |
    | `FilterResponseNorm`, `GlobalResponseNorm` | of each channel of each image | |
    | `RegionNormBinary`, `RegionNormBasic`, `RegionNormLearnable` | of each region | |
    | `RMSNorm`, `SimpleNorm`; `LayerNorm2d`, `RMSNorm2d`, `SimpleNorm2d` | of each token; pixel | |
    | `SimpleRMSNorm`, `CRMSNorm` | of each token, without parameters | |
    | `AlphaBatchNorm`, `UnMixTNS` | test-time adaptation of a trained BatchNorm | |
    | `StdConv2d`, `ScaledStdConv2d`, `ScaledStdLinear` | of the weight | a plain layer |
    | `ZeroMeanOutputLinear` | centres its weight | a plain layer |
    | `WeightCompander` | none: a parametrization | a plain weight |

`mix_ln` places norms in a list of blocks. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfx.nn.alpha_batch_norm import AlphaBatchNorm as AlphaBatchNorm
    from normfx.nn.compander import WeightCompander as WeightCompander
    from normfx.nn.compander import compand as compand
    from normfx.nn.compressed import CRMSNorm as CRMSNorm
    from normfx.nn.evonorm import EvoNorm as EvoNorm
    from normfx.nn.filter_response import FilterResponseNorm as FilterResponseNorm
    from normfx.nn.global_response import GlobalResponseNorm as GlobalResponseNorm
    from normfx.nn.masked_batch_norm import GraphBatchNorm as GraphBatchNorm
    from normfx.nn.masked_batch_norm import MaskedBatchNorm as MaskedBatchNorm
    from normfx.nn.placement import Placement as Placement
    from normfx.nn.placement import mix_ln as mix_ln
    from normfx.nn.placement import placements_of as placements_of
    from normfx.nn.power import PowerNorm as PowerNorm
    from normfx.nn.recentred import ZeroMeanOutputLinear as ZeroMeanOutputLinear
    from normfx.nn.region import RegionNormBasic as RegionNormBasic
    from normfx.nn.region import RegionNormBinary as RegionNormBinary
    from normfx.nn.region import RegionNormLearnable as RegionNormLearnable
    from normfx.nn.rows import LayerNorm2d as LayerNorm2d
    from normfx.nn.rows import RMSNorm as RMSNorm
    from normfx.nn.rows import RMSNorm2d as RMSNorm2d
    from normfx.nn.rows import SimpleNorm as SimpleNorm
    from normfx.nn.rows import SimpleNorm2d as SimpleNorm2d
    from normfx.nn.simple_rms import SimpleRMSNorm as SimpleRMSNorm
    from normfx.nn.standardized import ScaledStdConv2d as ScaledStdConv2d
    from normfx.nn.standardized import ScaledStdLinear as ScaledStdLinear
    from normfx.nn.standardized import StdConv2d as StdConv2d
    from normfx.nn.unified import UnifiedNorm as UnifiedNorm
    from normfx.nn.unmix import UnMixTNS as UnMixTNS

_HOMES = {
    "AlphaBatchNorm": "alpha_batch_norm",
    "CRMSNorm": "compressed",
    "EvoNorm": "evonorm",
    "FilterResponseNorm": "filter_response",
    "GlobalResponseNorm": "global_response",
    "GraphBatchNorm": "masked_batch_norm",
    "LayerNorm2d": "rows",
    "MaskedBatchNorm": "masked_batch_norm",
    "Placement": "placement",
    "PowerNorm": "power",
    "RMSNorm": "rows",
    "RMSNorm2d": "rows",
    "RegionNormBasic": "region",
    "RegionNormBinary": "region",
    "RegionNormLearnable": "region",
    "ScaledStdConv2d": "standardized",
    "ScaledStdLinear": "standardized",
    "SimpleNorm": "rows",
    "SimpleNorm2d": "rows",
    "SimpleRMSNorm": "simple_rms",
    "StdConv2d": "standardized",
    "UnMixTNS": "unmix",
    "UnifiedNorm": "unified",
    "WeightCompander": "compander",
    "ZeroMeanOutputLinear": "recentred",
    "compand": "compander",
    "mix_ln": "placement",
    "placements_of": "placement",
}

__all__ = [
    "AlphaBatchNorm",
    "CRMSNorm",
    "EvoNorm",
    "FilterResponseNorm",
    "GlobalResponseNorm",
    "GraphBatchNorm",
    "LayerNorm2d",
    "MaskedBatchNorm",
    "Placement",
    "PowerNorm",
    "RMSNorm",
    "RMSNorm2d",
    "RegionNormBasic",
    "RegionNormBinary",
    "RegionNormLearnable",
    "ScaledStdConv2d",
    "ScaledStdLinear",
    "SimpleNorm",
    "SimpleNorm2d",
    "SimpleRMSNorm",
    "StdConv2d",
    "UnMixTNS",
    "UnifiedNorm",
    "WeightCompander",
    "ZeroMeanOutputLinear",
    "compand",
    "mix_ln",
    "placements_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normfx.nn' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"normfx.nn.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
