"""Kernels run in Triton's interpreter on CPU tensors (see tests/conftest.py), on a machine without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normfx.kernels import has_triton, launch


@pytest.fixture
def interpreter(monkeypatch):
    """Triton's interpreter, with conversions that round to the nearest, as devices do; its own cut bits off."""
    if not has_triton():
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the same runs on the device: pytest -m gpu")
    from triton.runtime import interpreter as module

    torch_dtypes = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp8e4nv": torch.float8_e4m3fn,
    }

    def nearest(numbers, source, target, mode):
        bits = torch.from_numpy(np.ascontiguousarray(numbers))
        wide = bits.view(torch_dtypes[source.name]).float()
        unsigned = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}
        converted = wide.to(torch_dtypes[target.name])
        return converted.view(unsigned[target.primitive_bitwidth]).numpy()

    monkeypatch.setattr(module, "_convert_float", nearest)
    with np.errstate(all="ignore"):  # infinities come without a warning on a device
        yield


@pytest.fixture
def short_rows(monkeypatch):
    """Sets where rows are looped and split so low that small tensors reach every path."""

    def choose(path):
        limits = {
            "persistent": {},
            "looped": {"PERSISTENT_COLS": 4, "PERSISTENT_BACKWARD_COLS": 4},
            "split": {"PERSISTENT_COLS": 4, "PERSISTENT_BACKWARD_COLS": 4, "LOOPED_COLS": 8},
        }[path]
        for name, limit in {**limits, "CHUNK_COLS": 32, "SPLIT_COLS": 32}.items():
            monkeypatch.setattr(launch, name, limit)

    return choose
