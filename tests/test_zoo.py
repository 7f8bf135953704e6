"""Real model families: each canonical node against the region it replaced, and none missed.

A sample of the zoo, two or three families of each kind of norm; `python -m benchmarks.zoo --check` runs all of them.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks.zoo import check_family, missed

ZOO = Path(__file__).parents[2] / "shared" / "zoo"
FAMILIES = [
    "gpt2",
    "t5gemma2",
    "llama",
    "cohere",
    "bit",
    "convnext",
    "rt_detr_resnet",
    "segformer",
    "rwkv",
    "timesfm",
    "gemma3n_audio",
    "wav2vec2-conformer",
]

pytestmark = [
    pytest.mark.skipif(not ZOO.is_dir(), reason="the zoo is a folder beside the repository"),
    # dynamo's, about caches in transformers that it traces into
    pytest.mark.filterwarnings(
        "ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning"
    ),
]


@pytest.fixture(scope="module")
def truth():
    sys.path.insert(0, str(ZOO))
    importlib.import_module("run_zoo").warm_up()
    yield json.loads((ZOO / "zoo_truth.json").read_text())
    sys.path.remove(str(ZOO))


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_equal_what_they_replaced(family, truth):
    row = check_family(family)
    assert row["status"] == "ok", row
    assert not row["not run"]
    assert row["regions"] == row["recognised"] > 0
    assert not missed({family: row}, truth)
