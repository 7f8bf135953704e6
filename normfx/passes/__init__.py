"""The stages between capture and Inductor, and the table of rules that may be switched off."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Exactness(enum.Enum):
    """What a rule promises; `docs/numerics.md` says how each is tested."""

    BITWISE = "the same bits"
    EXACT = "equal in real arithmetic for all inputs; rounding within the numerics contract"
    CALIBRATED = "equal up to an error that is measured on data; off unless asked for"


class Rule(NamedTuple):
    """What a rule does, promises and rests on.

    Attributes:
        effect: what it does, as half a sentence.
        identity: the equation that makes it right; `tests/test_proofs.py` checks it by machine.
        source: where the identity is from, or "identity" where a line of algebra shows it.
        exactness: what it promises of the result.
    """

    effect: str
    identity: str
    source: str = "identity"
    exactness: Exactness = Exactness.EXACT


# In the order the pipeline runs them. The file of a rule in this folder derives its identity.
RULES: dict[str, Rule] = {
    "calibrated-norm": Rule(
        "a norm into the static affine map that its statistics over data give, if they are given",
        "norm(x; w, b) ~ x (w s) + (w t + b), s and t from data",
        "Unified Normalization, arXiv 2208.01313",
        Exactness.CALIBRATED,
    ),
    "test-time-norm": Rule(
        "a BatchNorm in evaluation into one that adapts, if the option `test_time` asks for it",
        "mean = (1 - a) running + a batch, var likewise; or a mixture of components that move",
        "alpha-BN, arXiv 2110.04065; UnMix-TNS, ICLR 2024",
        Exactness.CALIBRATED,
    ),
    "drop-unread": Rule(
        "a norm whose result nothing reads is left out",
        "what nothing reads changes no result",
        exactness=Exactness.BITWISE,
    ),
    "drop-open-clamp": Rule(
        "a clamp whose bounds are infinite leaves the graph, for as long as they are",
        "clamp(x, -inf, inf) = x",
        exactness=Exactness.BITWISE,
    ),
    "norm-of-norm": Rule(
        "a norm of the result of a norm into one",
        "RMS(RMS(x; e1); e2) = (1 + e2)^(-1/2) RMS(x; e1 e2 / (1 + e2))",
    ),
    "identity-norm": Rule(
        "a norm whose eps outweighs every statistic it can have into a scale",
        "x / sqrt(S + eps) = x / sqrt(eps), where S / eps is below half of the last digit",
    ),
    "recentre": Rule(
        "a LayerNorm into an RMSNorm, by centring the constants that write its input",
        "LN(x) = RMSNorm(x - mean(x)), LN(x + c 1) = LN(x)",
        "Pre-RMSNorm, arXiv 2305.14858",
    ),
    "drop-baked": Rule(
        "what `normfx.bake_` made neutral leaves the norm, for as long as it is so",
        "norm(x; 1, 0) = norm(x), (x - 0) / sqrt((1 - eps) + eps) = x",
    ),
    "fold-statistics-into-previous": Rule(
        "a norm whose statistics are given into the linear operator or convolution before it",
        "s (V x + c) + t = (diag(s) V) x + (s c + t)",
    ),
    "telescope": Rule(
        "a norm whose statistics are given into all that comes after it, through residual adds",
        "y + B z + c = s (x + diag(1/s) B z + (c + b) / s) for y = s x + b",
    ),
    "fold-statistics-into-next": Rule(
        "a norm whose statistics are given into the linear operators and convolutions after it",
        "V (s x + t) + c = (V diag(s)) x + (c + V t)",
    ),
    "fold-affine-into-linear": Rule(
        "a norm's weight and bias into the linear operators and convolutions after it",
        "norm(x; w, b) V^T + c = norm(x; 1, 0) (V diag(w))^T + (c + V b)",
        "FlashNorm, arXiv 2407.09577",
    ),
    "compress": Rule(
        "a stream of mean zero to one channel less, its RMSNorms to CRMSNorms; only if named",
        "u = x[:-1]: RMSNorm(x)[:-1] = u / sqrt((sum(u^2) + sum(u)^2) / d + eps), if sum(x) = 0",
        "Pre-CRMSNorm, arXiv 2305.14858",
    ),
    "defer-scale": Rule(
        "the division by a root to the other side of the linear operators after it",
        "(x r) W^T + c = (x W^T) r + c",
        "FlashNorm, arXiv 2407.09577",
    ),
    "hoist": Rule(
        "computations that read only parameters run once, outside of the graph",
        "the same operators on the same numbers, at another time",
        exactness=Exactness.BITWISE,
    ),
}
