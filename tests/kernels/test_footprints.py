"""Every kernel compiled for GPUs that are not here: nothing spilled, and what it takes is as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.footprints import GOLDEN, SAMPLE, difference
from normfx.kernels import has_triton, kernels

pytestmark = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())["kernels"]


def test_nothing_spills(golden):
    spilled = [
        f"{kernel}: {label}, {target}"
        for kernel, rows in golden.items()
        for label, targets in rows.items()
        for target, (_, spills, _) in targets.items()
        if spills
    ]
    assert not spilled


def test_every_configuration_of_the_table_is_there(golden):
    assert set(golden) == {kernel.name for kernel in kernels()} == set(SAMPLE)
    for kernel in kernels():
        built = {build.label: set(build.targets) for build in kernel.builds()}
        listed = {label: set(targets) for label, targets in golden[kernel.name].items()}
        assert listed == built, f"{kernel.name}: run python -m benchmarks.footprints"


@pytest.mark.slow
def test_a_configuration_of_each_kernel_is_as_in_the_table():
    """In a process of its own: this one runs Triton's interpreter."""
    command = [sys.executable, "-m", "benchmarks.footprints", "--check", "--sample"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "all as in the table, nothing spilled" in done.stdout


@pytest.mark.parametrize(
    ("found", "known", "said"),
    [
        ([100, 0, 4096], [100, 0, 4096], ""),
        ([120, 0, 5000], [100, 0, 4096], ""),
        ([126, 0, 4096], [100, 0, 4096], "126 registers, 100 in the table"),
        ([100, 8, 4096], [100, 8, 4096], "spills 8 bytes"),
        ([100, 0, 9000], [100, 0, 4096], "9000 bytes of shared memory, 4096 in the table"),
        ([100, 0, 4096], None, "not in the table"),
    ],
)
def test_what_counts_as_different(found, known, said):
    assert (said in difference("k", found, known)) if said else difference("k", found, known) == ""
