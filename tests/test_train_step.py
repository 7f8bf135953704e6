"""What benchmarks/train_step.py counts: bytes, which are exact."""

from __future__ import annotations

import pytest
import torch

from benchmarks.train_step import BATCH, SHAPE, TOKENS, alone, peak_bytes, saved_bytes
from examples.small_transformer import norm_layers

FLOAT = torch.float32.itemsize
X_BYTES = BATCH * TOKENS * SHAPE.width * FLOAT


def saved(norm: str) -> int:
    return saved_bytes(alone(norm_layers(SHAPE, 4)[norm], "eager"))


def test_layer_norm_saves_two_numbers_for_each_token():
    assert saved("LN") == 2 * BATCH * TOKENS * FLOAT


def test_unified_norm_saves_four_numbers_for_each_channel():
    """And whether the batch is an outlier, one byte; none of it grows with the batch."""
    assert saved("UN") == 4 * SHAPE.width * FLOAT + 1


def test_what_is_written_out_saves_values_of_each_position():
    assert saved("BN") >= X_BYTES


@pytest.mark.parametrize("norm", ["LN", "UN"])
def test_peak_holds_the_output_and_the_gradient(norm):
    assert peak_bytes(alone(norm_layers(SHAPE, 4)[norm], "eager")) >= 2 * X_BYTES
