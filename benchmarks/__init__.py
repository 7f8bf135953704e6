"""Benchmarks: `python -m benchmarks.NAME`. Each prints its table last, under its machine."""
