"""Exports of a stage: the formats that other tools read."""

from __future__ import annotations

import json

import pytest
import torch

import normfx
from normfx.errors import OptionError
from tests.models import Block, roughened


@pytest.fixture(scope="module")
def diff():
    torch._dynamo.reset()
    with torch.no_grad():
        return normfx.diff(roughened(Block()).eval(), options={"strict": True})(torch.ones(2, 8))


def test_model_explorer(diff, tmp_path):
    diff.export(tmp_path / "graph.json", "recognise")
    written = json.loads((tmp_path / "graph.json").read_text())
    (graph,) = written["graphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == len(diff.graphs[0].snapshots["recognise"].nodes)
    (norm,) = [node for node in nodes.values() if node["label"] == "norm"]
    assert norm["namespace"] == "norm"
    assert {"key": "norm", "value": "norm"} in norm["attrs"]
    assert [nodes[edge["sourceNodeId"]]["label"] for edge in norm["incomingEdges"]] == [
        "x",
        "norm.weight",
        "norm.bias",
    ]
    assert norm["outputsMetadata"][0]["attrs"][0]["value"] == "float32[2, 8]"
    for node in nodes.values():
        assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= nodes.keys()


def test_the_drawer_of_fx(diff, tmp_path):
    diff.export(tmp_path / "graph.dot", "recognise")
    text = (tmp_path / "graph.dot").read_text()
    assert text.startswith("digraph")
    assert "norm" in text
    assert "aten.linear" in text


def test_another_ending(diff, tmp_path):
    with pytest.raises(OptionError, match=r"graph.png must end in .json or .dot"):
        diff.export(tmp_path / "graph.png")
