"""Mix-LN: the first blocks of a transformer with their norms behind, the others in front.

Li et al., "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN", ICLR
2025, arXiv 2412.13795. Of L blocks the first floor(alpha * L) are Post-LN:

    post    h = norm(h + branch(h))
    pre     h = h + branch(norm(h))

The released settings have alpha 0.25 and, after the last block, a norm in any case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

from torch import Tensor


class Placement(Enum):
    """Where a block has its norms."""

    POST = "post"
    PRE = "pre"

    def residual(
        self,
        h: Tensor,
        branch: Callable[[Tensor], Tensor],
        norm: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """One residual step of such a block."""
        return norm(h + branch(h)) if self is Placement.POST else h + branch(norm(h))


def mix_ln(blocks: int | Sequence[Any], alpha: float = 0.25) -> list[Placement]:
    """The placement of each block.

    Args:
        blocks: how many there are, or the list of them.
        alpha: the part of them, from the first on, that is Post-LN.
    """
    count = blocks if isinstance(blocks, int) else len(blocks)
    if count < 0 or not 0 <= alpha <= 1:
        raise ValueError(
            f"mix_ln: expected a number of blocks and alpha from 0 (all Pre-LN) to 1 (all "
            f"Post-LN), got {count} and {alpha}"
        )
    # A product such as 0.29 * 100 that should be whole may lie just below.
    first = math.floor(alpha * count + 1e-9)
    return [Placement.POST] * first + [Placement.PRE] * (count - first)


def placements_of(names: Iterable[str]) -> list[Placement]:
    """The placement of each block of a released checkpoint, whose configuration does not say it.

    A Post-LN block has a `post_feedforward_layernorm`, a Pre-LN block an `input_layernorm`. (Both
    have a `post_attention_layernorm`, in different roles.)

    Args:
        names: the keys of its state dict.
    """
    found: dict[int, Placement] = {}
    for name in names:
        match = re.search(r"layers\.(\d+)\.(post_feedforward|input)_layernorm\.", name)
        if match is not None:
            post = match[2] == "post_feedforward"
            placement = Placement.POST if post else Placement.PRE
            if found.setdefault(int(match[1]), placement) is not placement:
                raise ValueError(
                    f"placements_of: expected one placement for block {match[1]}, got keys of "
                    f"both; this is no Mix-LN checkpoint"
                )
    if sorted(found) != list(range(len(found))):
        raise ValueError(
            f"placements_of: expected a norm in every block from 0 on, got blocks {sorted(found)}"
        )
    return [found[i] for i in range(len(found))]
