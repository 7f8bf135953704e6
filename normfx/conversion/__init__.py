"""Conversion: the norms of a model become layers of another kind, in place, and back.

`convert.py` goes through the model and swaps, `sources.py` says what a module computes (by its type
or, in `proof.py`, by proof), `targets.py` makes the layer that stands in its place, `converted.py`
is the record and the way back, `schedule.py` converts one norm after the other while a model is
trained.
"""
