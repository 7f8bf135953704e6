"""Benchmarks: `python -m benchmarks.NAME`. Each prints its table last and says what it was run on."""
