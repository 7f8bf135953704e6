"""Verdict: what a rule says of one norm, and how that gets into the journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import fx

from normfx import graph as g
from normfx.cost import Cost, saves
from normfx.record import Record, Refusal

if TYPE_CHECKING:
    from normfx.options import Options  # which reads statistics, and these the codes here


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a rule leaves a norm as it is, the node that made it so, and what there is to add."""

    code: Refusal
    node: fx.Node
    detail: str = ""


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
    guilty, code = refused.node, refused.code
    _note(norm, Record(stage, rule, False, code, guilty.name, g.location(guilty), refused.detail))


def not_worth(node: fx.Node, before: Cost, after: Cost, copied_bytes: int = 0) -> Refused | None:
    """The refusal of a rewrite that is legal and does not pay, with its numbers.

    Args:
        node: what would change.
        before: what a call costs, as far as that changes.
        after: the same after the rewrite.
        copied_bytes: of weights that would be held beside the originals.
    """
    if saves(before, after, copied_bytes):
        return None
    copies = f", and {copied_bytes} bytes of copied weights" if copied_bytes else ""
    return Refused(Refusal.NOT_WORTH, node, f"{before} a call; {after} after{copies}")


def change(norm: fx.Node, stage: str, rule: str, detail: str) -> None:
    """Records that a rule changed a canonical norm, and how."""
    site: Any = norm.meta["normfx_site"]
    _note(norm, Record(stage, rule, True, None, norm.name, site.location, detail))


def _note(norm: fx.Node, record: Record) -> None:
    norm.meta["normfx_site"].records.append(record)
