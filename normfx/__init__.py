"""normfx: a backend for torch.compile that makes normalizations cheaper and keeps the answer.

    fast = torch.compile(model, backend="normfx")        # no import needed

Names are imported on first use: dynamo lists every backend's entry point, and `import normfx`
should cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfx import nn as nn
    from normfx.bake import Baked as Baked
    from normfx.bake import bake_ as bake_
    from normfx.calibration.calibrate import calibrate as calibrate
    from normfx.calibration.sensitivity import Sensitivity as Sensitivity
    from normfx.calibration.sensitivity import sensitivity as sensitivity
    from normfx.calibration.statistics import Statistics as Statistics
    from normfx.conversion.convert import convert as convert
    from normfx.conversion.converted import Converted as Converted
    from normfx.conversion.schedule import GradualConversion as GradualConversion
    from normfx.errors import BakeError as BakeError
    from normfx.errors import ConversionError as ConversionError
    from normfx.errors import NormfxError as NormfxError
    from normfx.errors import OptionError as OptionError
    from normfx.errors import StageError as StageError
    from normfx.errors import StatisticsError as StatisticsError
    from normfx.explanation import explain as explain
    from normfx.graphdiff.result import GraphDiff as GraphDiff
    from normfx.graphdiff.result import diff as diff
    from normfx.live import refold as refold
    from normfx.options import Options as Options
    from normfx.record import Refusal as Refusal
    from normfx.record import Site as Site
    from normfx.reports import Report as Report
    from normfx.reports import report as report
    from normfx.reports import reset as reset
    from normfx.scale_invariance import Invariance as Invariance
    from normfx.scale_invariance import ScaleInvariance as ScaleInvariance
    from normfx.scale_invariance import scale_invariant_parameters as scale_invariant_parameters
    from normfx.verification import verify as verify
    from normfx.verification.result import Verification as Verification

__version__ = "0.1.0"

_HOMES = {
    "Baked": "bake",
    "bake_": "bake",
    "BakeError": "errors",
    "calibrate": "calibration.calibrate",
    "Sensitivity": "calibration.sensitivity",
    "sensitivity": "calibration.sensitivity",
    "Statistics": "calibration.statistics",
    "convert": "conversion.convert",
    "Converted": "conversion.converted",
    "GradualConversion": "conversion.schedule",
    "ConversionError": "errors",
    "NormfxError": "errors",
    "OptionError": "errors",
    "StageError": "errors",
    "StatisticsError": "errors",
    "explain": "explanation",
    "GraphDiff": "graphdiff.result",
    "diff": "graphdiff.result",
    "refold": "live",
    "Options": "options",
    "Refusal": "record",
    "Site": "record",
    "Report": "reports",
    "report": "reports",
    "reset": "reports",
    "Invariance": "scale_invariance",
    "ScaleInvariance": "scale_invariance",
    "scale_invariant_parameters": "scale_invariance",
    "verify": "verification",
    "Verification": "verification.result",
}

__all__ = [
    "BakeError",
    "Baked",
    "ConversionError",
    "Converted",
    "GradualConversion",
    "GraphDiff",
    "Invariance",
    "NormfxError",
    "OptionError",
    "Options",
    "Refusal",
    "Report",
    "ScaleInvariance",
    "Sensitivity",
    "Site",
    "StageError",
    "Statistics",
    "StatisticsError",
    "Verification",
    "__version__",
    "bake_",
    "calibrate",
    "convert",
    "diff",
    "explain",
    "refold",
    "report",
    "reset",
    "scale_invariant_parameters",
    "sensitivity",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("normfx.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'normfx' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"normfx.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
