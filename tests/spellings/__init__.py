"""How random spellings of a normalization are drawn and written: see `strategies.py`."""
