"""The graphs of a model after each stage, compared: what the compiler did, to read.

    snapshot -> matching -> alignment -> repeats -> text, HTML

`snapshot.py` keeps what a stage left as plain values; `matching.py` says which node became which;
`alignment.py` puts two stages side by side; `repeats.py` finds the layers that are alike.
"""

from normfx.graphdiff.result import GraphDiff as GraphDiff
from normfx.graphdiff.result import diff as diff
