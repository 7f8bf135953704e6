"""Verdict: what a rule says of one norm, and how that gets into the journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import fx

from normfx import graph as g
from normfx.record import Record, Refusal

if TYPE_CHECKING:
    from normfx.options import Options  # which reads statistics, and these the codes here


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a rule leaves a norm as it is, and the node that made it so."""

    code: Refusal
    node: fx.Node


# What may still refuse a plan that a rule holds legal, for a norm: the caller of the rule.
Permit: TypeAlias = Callable[[fx.Node, Any], "Refused | None"]


def not_constant(code: Refusal, guilty: fx.Node, *operands: fx.Node) -> Refused:
    """Refuses operands that are computed, with this code; or that gradients are wanted of."""
    return Refused(Refusal.NEEDS_GRAD if g.is_trained(*operands) else code, guilty)


def allows(options: Options, rule: str, norm: fx.Node) -> bool:
    """Whether a rule may run at all, and on this canonical norm."""
    return options.allows(rule, norm.meta["normfx_site"].key)


def refuse(norm: fx.Node, stage: str, rule: str, refused: Refused) -> None:
    """Records that a rule left a canonical norm as it is, and the user's line that is guilty."""
    guilty = refused.node
    _note(norm, Record(stage, rule, False, refused.code, guilty.name, g.location(guilty)))


def change(norm: fx.Node, stage: str, rule: str, detail: str) -> None:
    """Records that a rule changed a canonical norm, and how."""
    site: Any = norm.meta["normfx_site"]
    _note(norm, Record(stage, rule, True, None, norm.name, site.location, detail))


def _note(norm: fx.Node, record: Record) -> None:
    norm.meta["normfx_site"].records.append(record)
