"""Two processes with half of the batch each give what one gives with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_worker import run
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_are_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank_worker.py"), str(tmp_path), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    whole = run(None)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    for name, expected in whole.items():
        parts = [rank[name] for rank in ranks]
        if "/state " in name:
            for part in parts:
                torch.testing.assert_close(part, expected, msg=lambda m, n=name: f"{n}: {m}")
            continue
        got = sum(parts) if "/grad " in name else torch.cat(parts)
        torch.testing.assert_close(got, expected, msg=lambda m, n=name: f"{n}: {m}")
    alone = [load_file(tmp_path / f"alone{rank}.safetensors") for rank in range(2)]
    for name in ("unified/state running_var", "power/state running_phi"):
        assert not torch.allclose(alone[0][name], alone[1][name])
