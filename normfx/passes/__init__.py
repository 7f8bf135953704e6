"""The stages between capture and Inductor, and the table of rules that may be switched off."""

from __future__ import annotations

# rule -> what it does, in the order the pipeline runs them
RULES: dict[str, str] = {
    "calibrated-norm": (
        "a norm into the static affine map that its statistics over data give, if they are given"
    ),
    "recentre": "a LayerNorm into an RMSNorm, by centring the constants that write its input",
    "fold-statistics-into-previous": (
        "a norm whose statistics are given into the linear operator or convolution before it"
    ),
    "fold-affine-into-linear": (
        "a norm's weight and bias into the linear operators and convolutions after it"
    ),
    "hoist": "computations that read only parameters run once, outside of the graph",
}
