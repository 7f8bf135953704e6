"""What kernels have to move, by paper and pencil, and the page that says so."""

from __future__ import annotations

import pytest

from benchmarks.devices import DEVICES
from benchmarks.roofline import PAGE, kernel_table
from benchmarks.work import KERNELS, norm_linear, row_norm_backward


def test_the_page_has_the_table_of_the_kernels():
    assert kernel_table() in PAGE.read_text(), "run python -m benchmarks.roofline --write"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_moves_and_launches_no_more_than_what_it_replaces(name):
    work, sizes = KERNELS[name]
    for size in sizes:
        pair = work(*size)
        assert pair.after.bytes <= pair.before.bytes
        assert pair.after.launches <= pair.before.launches
        assert pair.after.flops > 0


def test_a_decode_step_reads_the_weights_and_little_else():
    pair = norm_linear(1, 4096, 14336)
    weights = 2 * 4096 * 14336
    assert weights < pair.after.bytes < 1.001 * weights
    assert pair.before.bytes - pair.after.bytes == 2 * 2 * 4096


def test_one_pass_for_the_gradients_of_weight_and_bias_reads_two_tensors_less():
    pair = row_norm_backward(16384, 4096)
    assert pair.before.bytes - pair.after.bytes == 2 * 2 * 16384 * 4096
    assert DEVICES["H200"].floor_us(pair.after.bytes) < DEVICES["H200"].floor_us(pair.before.bytes)
