"""The stages between capture and Inductor, and the table of rules that may be switched off."""

from __future__ import annotations

# rule -> what it does, in the order the pipeline runs them
RULES: dict[str, str] = {
    "calibrated-norm": (
        "a norm into the static affine map that its statistics over data give, if they are given"
    ),
    "norm-of-norm": "a norm of the result of a norm into one",
    "identity-norm": "a norm whose eps outweighs every statistic it can have into a scale",
    "recentre": "a LayerNorm into an RMSNorm, by centring the constants that write its input",
    "drop-baked": "what `normfx.bake_` made neutral leaves the norm, for as long as it is so",
    "fold-statistics-into-previous": (
        "a norm whose statistics are given into the linear operator or convolution before it"
    ),
    "telescope": (
        "a norm whose statistics are given into all that comes after it, through residual adds"
    ),
    "fold-statistics-into-next": (
        "a norm whose statistics are given into the linear operators and convolutions after it"
    ),
    "fold-affine-into-linear": (
        "a norm's weight and bias into the linear operators and convolutions after it"
    ),
    "compress": (
        "a stream of mean zero to one channel less, its RMSNorms to CRMSNorms; only if named"
    ),
    "defer-scale": "the division by a root to the other side of the linear operators after it",
    "hoist": "computations that read only parameters run once, outside of the graph",
}
