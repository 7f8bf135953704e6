"""Inductor's caches hash the rewritten graph, and never what the weights hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.inductor

SCRIPT = """
import copy, json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters

seed, options = int(sys.argv[1]), json.loads(sys.argv[2])
torch.manual_seed(seed)
model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU(), nn.RMSNorm(8), nn.Linear(8, 4))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
    x = torch.randn(64, 16)
    got = torch.compile(model, backend="normfx", options={"strict": True, **options})(x)
    eager, exact = model(x), copy.deepcopy(model).double()(x.double())
print(json.dumps({
    "error": (got - exact).abs().max().item(),
    "eager_error": (eager - exact).abs().max().item(),
    "ulp": (exact.abs().max() * torch.finfo(torch.float32).eps).item(),
    "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
    "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
    "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
    "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
    "bypass": counters["inductor"]["fxgraph_cache_bypass"] + counters["aot_autograd"]["autograd_cache_bypass"],
}))
"""


def run(cache, seed, **options):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(seed), json.dumps(options)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["error"] <= max(2 * result["eager_error"], result["ulp"])
    assert result["bypass"] == 0
    return result


def test_a_second_process_with_other_weights_hits_and_a_changed_option_misses(tmp_path):
    first = run(tmp_path, seed=1)
    assert first["fx_hit"] == first["aot_hit"] == 0
    second = run(tmp_path, seed=2)
    assert second["aot_hit"] == 1
    assert second["aot_miss"] == 0
    assert second["fx_hit"] >= 1
    assert second["fx_miss"] == 0
    changed = run(tmp_path, seed=1, rules=[])
    assert changed["aot_hit"] == 0
    assert changed["fx_hit"] == 0
