"""Calibration: statistics of each norm over data, what a static norm costs, and which to take.

`calibrate.py` runs the model once over the data, `observe.py` watches its norms, `moments.py` and
`smoothing.py` add up, `statistics.py` is the result and its file, `affine.py` makes the static norm
of it, `sensitivity.py` measures the damage and chooses. The rule that puts the static norms into a
compiled model is `normfx/passes/calibrated.py`.
"""
