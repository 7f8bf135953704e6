"""Unread: a norm that nothing reads is left out; one that does more than compute, or is read, stays."""

from __future__ import annotations

import torch
from assertions import assert_agrees
from expecttest import assert_expected_inline
from graph_text import graph_text
from torch import fx, nn

import normfx
from normfx.capture import capture
from normfx.options import Options
from normfx.passes.recognise import recognise
from normfx.passes.unread import unread
from normfx.record import Journal

RULE = "drop-unread"


def left_of(model, x, rules=None, detach=True):
    """The journal and the text of a graph in which nothing reads the norm: dynamo leaves none."""
    journal, texts = Journal(), []

    def backend(gm: fx.GraphModule, example_inputs):
        captured = capture(gm)
        recognise(captured, journal, grad=False)
        (read,) = captured.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)
        if detach:
            read.replace_all_uses_with(read.args[0])
            captured.graph.erase_node(read)
        unread(captured, Options(rules=rules))
        captured.graph.lint()
        texts.append(graph_text(captured.graph))
        return gm

    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    return journal, texts[0]


class Beside(nn.Module):
    """A norm whose result is moved, and subtracted from another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x * 2 - self.norm(x).mT.contiguous()


def test_golden():
    journal, text = left_of(Beside(), torch.randn(8, 8))
    assert_expected_inline(
        text,
        """\
v0 = mul(in0, 2)
return [v0]
""",
    )
    assert journal.sites[0].actions == [RULE]


def test_the_rule_can_be_switched_off():
    journal, text = left_of(Beside(), torch.randn(8, 8), rules=("hoist",))
    assert journal.sites[0].actions == []
    assert "norm" in text


def test_what_is_read_stays():
    journal, text = left_of(Beside(), torch.randn(8, 8), detach=False)
    assert journal.sites[0].actions == []
    assert "norm" in text


def test_what_updates_its_statistics_stays():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            self.norm(x)
            return x * 2

    assert_agrees(Counts().train(), torch.randn(4, 8))
    assert not any(RULE in site.actions for site in normfx.report().sites)
