"""The benchmark of a GPU, as it runs without one: every section, tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.devices import DEVICES, device_of
from benchmarks.gpu.__main__ import SECTIONS
from benchmarks.gpu.rows import Table

pytest.importorskip("transformers")
pytest.importorskip("triton")


@pytest.mark.slow
def test_every_section_runs_and_the_table_comes_last(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--json", str(path)]
    # not in the interpreter, which takes minutes: the operators' bodies in plain torch run
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())
    rows = found["rows"]
    assert {row["section"] for row in rows} == set(SECTIONS)
    wrong = [row for row in rows if "failed" in row["note"] or "WRONG" in row["note"]]
    assert not wrong
    assert found["facts"]["torch"]
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.split()[0] == "autotuned"
    assert "section" in done.stdout.splitlines()[-1 - len(rows)]


def test_a_failure_is_a_row_and_the_rest_goes_on():
    table = Table(60)
    with table.part("one", 10):
        assert table.attempt("case", "who", lambda: 1 / 0) is None
        table.add("case", "other", us=2.0, floor_us=1.0)
        table.add("case", "best", us=1.0)
    with table.part("two", 10):
        raise RuntimeError("a whole section")
    notes = [row.note for row in table.rows]
    assert notes[0].startswith(
        "failed: ZeroDivisionError: division by zero (test_gpu_benchmark.py:"
    )
    assert notes[3].startswith("failed: RuntimeError: a whole section")
    line = table.text().splitlines()[2]
    assert line.split()[-3:] == ["2.0", "2.00", "2.00"]


def test_what_there_is_no_time_for_is_named():
    table = Table(0)
    with table.part("one", 10):
        assert table.attempt("case", "who", lambda: 1) is None
    assert table.rows[0].note == "not run: out of time"


def test_a_device_is_told_by_its_name():
    assert device_of("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert device_of("NVIDIA GeForce RTX 4090") is None
    h200 = DEVICES["H200"]
    assert h200.floor_us(4.8e6) == pytest.approx(1.0, rel=1e-12)
    assert h200.floor_us(4.8e6, 989e7) == pytest.approx(10.0, rel=1e-12)
