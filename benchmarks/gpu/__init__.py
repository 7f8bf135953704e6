"""The benchmark of a GPU: see `benchmarks/gpu/__main__.py`."""
