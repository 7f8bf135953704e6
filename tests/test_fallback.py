"""An exception in a stage costs the rewrite, never the answer."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from assertions import assert_within_contract, compiled
from models import head

import normfx
from normfx import StageError

STAGES = ["capture", "recognise", "fold", "hoist", "lower"]


class BrokenError(Exception):
    pass


def broken(*_, **__):
    raise BrokenError("the stage met\nsomething new")


@pytest.fixture(params=STAGES)
def broken_stage(request, monkeypatch):
    monkeypatch.setattr(f"normfx.pipeline.{request.param}", broken)
    return request.param


@pytest.fixture
def graphs_given_to_inductor(monkeypatch):
    """Stands for Inductor: records the graph it would compile, and runs it."""
    given = []

    def compile_with_inductor(gm, inputs, settings):
        given.append(gm)
        return gm

    monkeypatch.setattr("normfx.backend.compile_with_inductor", compile_with_inductor)
    return given


def test_strict_raises(broken_stage):
    with (
        torch.no_grad(),
        pytest.raises(
            Exception, match=f"normfx stage '{broken_stage}' failed: BrokenError: the stage met"
        ) as caught,
    ):
        compiled(head())(torch.randn(64, 8))
    chain, error = [], caught.value
    while error is not None:
        chain.append(type(error))
        error = getattr(error, "inner_exception", None) or error.__cause__
    assert StageError in chain
    assert BrokenError in chain


def test_falls_back_with_one_warning(broken_stage, graphs_given_to_inductor):
    model, x = head(), torch.randn(64, 8)
    fast = torch.compile(model, backend="normfx")
    with torch.no_grad():
        with pytest.warns(
            UserWarning,
            match=re.escape(f"normfx stage '{broken_stage}' failed: BrokenError: the stage met"),
        ) as warned:
            got = fast(x)
        assert torch.equal(got, model(x))
        assert torch.equal(fast(x), got)
    assert len(warned) == 1
    assert "plain Inductor" in str(warned[0].message)
    (gm,) = graphs_given_to_inductor
    assert not any("normfx" in str(node.target) for node in gm.graph.nodes)
    (graph,) = normfx.report().graphs
    assert broken_stage in graph.fallback
    assert normfx.report().fallbacks == [graph.fallback]


def test_a_fallback_reports_nothing_that_did_not_happen(broken_stage, graphs_given_to_inductor):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(head(), backend="normfx")(torch.randn(64, 8))
    (graph,) = normfx.report().graphs
    assert graph.sites == []
    assert graph.near_misses == []
    assert graph.hoisted == 0
    assert graph.folded_bytes == 0
    assert "left to Inductor" in str(normfx.report())


def test_a_fallback_still_follows_the_weights(broken_stage, graphs_given_to_inductor):
    model, x = head(), torch.randn(64, 8)
    fast = torch.compile(model, backend="normfx")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast(x)
        model[0].weight.mul_(2)
        assert torch.equal(fast(x), model(x))


def test_a_fallback_trains(broken_stage, graphs_given_to_inductor):
    if broken_stage == "hoist":
        return  # does not run where gradients are wanted
    model, x = head(), torch.randn(64, 8)
    with pytest.warns(UserWarning, match=broken_stage):
        torch.compile(model, backend="normfx")(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_explain_names_the_stage(broken_stage):
    with torch.no_grad():
        report = normfx.explain(head())(torch.randn(64, 8))
    assert broken_stage in report.fallbacks[0]
    assert report.sites == []


@pytest.mark.inductor
def test_inductor_compiles_what_is_left_to_it(monkeypatch):
    monkeypatch.setattr("normfx.pipeline.recognise", broken)
    model, x = head(), torch.randn(64, 8)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="recognise"):
            got = torch.compile(model, backend="normfx")(x)
        assert_within_contract(got, model(x), copy.deepcopy(model).double()(x.double()))
