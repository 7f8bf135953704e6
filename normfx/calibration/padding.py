"""Padding: which rows of a norm's input are real, from a mask over the tokens of a batch.

A mask is (batch, tokens), as an attention mask: zero or False is padding. The norms of a model see
the tokens in other shapes: (batch, tokens, channels), with heads beside them, flattened, or pooled
to one row a sequence. The dims are found by their sizes; where two dims have the same size and
could both be the tokens, nothing is decided.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def rows_kept(mask: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """Which rows count, one element a row, or None if the mask does not fit.

    Args:
        mask: (batch, tokens).
        sizes: of the dims of the norm's input, without the channels.
    """
    batch, tokens = mask.shape
    rest = list(sizes[1:])
    real = mask != 0
    if not sizes or sizes[0] not in (batch, batch * tokens):
        return None
    if sizes[0] == batch and rest.count(tokens) == 1:
        at = 1 + rest.index(tokens)
        shape = [size if dim in (0, at) else 1 for dim, size in enumerate(sizes)]
    elif sizes[0] == batch * tokens and tokens not in rest:
        real, shape = real.flatten(), [sizes[0], *[1] * len(rest)]
    elif list(sizes) == [batch]:  # one row a sequence: real if any of its tokens is
        real, shape = real.any(1), [batch]
    else:
        return None
    return real.reshape(shape).expand(tuple(sizes)).flatten()
