"""Gaps: spellings that recognition does not know, which are therefore not drawn.

Each has a function for the smallest case. A test asserts that these are still not recognised: one that is has to be
taken out of here, and from then on it is drawn.
"""

from __future__ import annotations

_HEAD = "def f(x):\n    "

GAPS: dict[str, str] = {
    # x and one more number
    "compressed-cat": _HEAD
    + "h = torch.cat([x, -x.sum(-1, True)], -1)\n"
    + "    return x * torch.rsqrt(h.square().mean(-1, True) + 1e-5)",
    # what is expanded before it meets x counts as laid out as x is, where sizes allow that
    "equal-sizes": _HEAD
    + "h = x[:, :4].reshape(2, 2, 2, 2).transpose(2, 3)\n"
    + "    r = torch.rsqrt(h.square().mean((2, 3), True) + 1e-5)\n"
    + "    return x[:, :4].reshape(2, 4, 2) * r.expand(2, 2, 2, 2).transpose(2, 3).reshape(2, 4, 2)",
}
