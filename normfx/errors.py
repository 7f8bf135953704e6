"""The exceptions of normfx. A refusal of a rule is none of them: see `record.Refusal`."""

from __future__ import annotations


class NormfxError(Exception):
    """Base of all exceptions that normfx raises itself."""


class OptionError(NormfxError, ValueError):
    """An option has an unknown name or a value of the wrong type."""


class BakeError(NormfxError, RuntimeError):
    """`bake_` cannot bake this model, or cannot undo it. Nothing was changed."""


class ConversionError(NormfxError, ValueError):
    """`convert` was asked for what it cannot do. Nothing was changed."""


class StageError(NormfxError, RuntimeError):
    """A stage failed, under `strict`. Its cause is the exception that the stage raised."""


class StatisticsError(NormfxError, ValueError):
    """Calibrated statistics are of another model, incomplete, not finite, or no such file."""
