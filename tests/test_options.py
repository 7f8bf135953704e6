"""Options: what is refused, and that torch.compile's own arguments arrive."""

from __future__ import annotations

import pytest
import torch
from assertions import compiled
from models import head

import normfx
from normfx import OptionError, Options


def test_defaults():
    assert Options.parse(None) == Options.parse({}) == Options()
    assert not Options().strict
    assert Options().lowering == "inductor"
    assert Options().weights == "live"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"lowring": "eager"},
            r"unknown option 'lowring'. Did you mean 'lowering'\? Known: .*strict",
        ),
        ({"xyz": 1}, r"unknown option 'xyz'. Known: "),
        (
            {"lowering": "triton"},
            r"option 'lowering': expected one of 'inductor', 'eager', got 'triton'",
        ),
        ({"lowering": None}, r"option 'lowering': expected one of .*, got None"),
        ({"weights": True}, r"option 'weights': expected one of 'live', 'frozen', got True"),
        ({"strict": "yes"}, r"option 'strict': expected True or False, got 'yes'"),
        ({"strict": 1}, r"option 'strict': expected True or False, got 1"),
        (
            {"inductor": ["max_autotune"]},
            r"option 'inductor': expected a mapping of Inductor's options, got \[",
        ),
        ({"rules": "hoist"}, r"option 'rules': expected a list of rule names, got 'hoist'"),
        ({"rules": [1]}, r"option 'rules': expected a list of rule names, got \[1\]"),
        ({"rules": 3}, r"option 'rules': expected a list of rule names, got 3"),
        (
            {"rules": ["hoist", "fold-affine-into-liner"]},
            r"Did you mean 'fold-affine-into-linear'\?",
        ),
        ({"skip": "hoist"}, r"option 'skip': expected a list of RULE@SITE, got 'hoist'"),
        ({"skip": ["recentre"]}, r"option 'skip': expected RULE@SITE, got 'recentre'"),
        ({"skip": ["recenter@0"]}, r"unknown rule 'recenter'. Did you mean 'recentre'\?"),
        (
            {"weights": ["live"]},
            r"option 'weights': expected one of 'live', 'frozen', got \['live'\]",
        ),
    ],
)
def test_refused(given, message):
    with pytest.raises(OptionError, match=message):
        Options.parse(given)


def test_options_are_a_value():
    given = {"strict": True, "rules": ["hoist"], "inductor": {"max_autotune": True}}
    parsed = Options.parse(given)
    given["inductor"]["max_autotune"] = False
    assert parsed.inductor == {"max_autotune": True}
    assert parsed.rules == ("hoist",)
    assert parsed.allows("hoist")
    assert not parsed.allows("fold-affine-into-linear")


def test_a_wrong_option_reaches_the_user_of_torch_compile():
    with pytest.raises(Exception, match="Did you mean 'strict'"):
        torch.compile(head(), backend="normfx", options={"strct": True})(torch.randn(64, 8))


def test_explain_refuses_a_wrong_option():
    with pytest.raises(OptionError, match="Did you mean 'strict'"):
        normfx.explain(head(), options={"strct": True})


@pytest.fixture
def inductor_settings(monkeypatch):
    """What Inductor is called with; the graph itself is run eagerly."""
    import torch._inductor.compile_fx

    seen = []

    def compile_fx(gm, inputs, *args, config_patches=None, **kwargs):
        from torch._inductor import config

        with config.patch(config_patches or {}):
            seen.append(
                {name: getattr(config, name) for name in ("max_autotune", "epilogue_fusion")}
            )
            seen[-1]["cudagraphs"] = config.triton.cudagraphs
        return gm

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    return seen


@pytest.mark.parametrize(
    ("mode", "max_autotune", "cudagraphs"),
    [
        (None, False, False),
        ("default", False, False),
        ("reduce-overhead", False, True),
        ("max-autotune", True, True),
        ("max-autotune-no-cudagraphs", True, False),
    ],
)
def test_mode_reaches_inductor(inductor_settings, mode, max_autotune, cudagraphs):
    with torch.no_grad():
        torch.compile(head(), backend="normfx", mode=mode)(torch.randn(64, 8))
    (seen,) = inductor_settings
    assert seen["max_autotune"] is max_autotune
    assert seen["cudagraphs"] is cudagraphs


def test_an_unknown_mode_is_an_error():
    with pytest.raises(Exception, match="fastest"):
        torch.compile(head(), backend="normfx", mode="fastest")(torch.randn(64, 8))


def test_inductor_options_are_passed_on(inductor_settings):
    options = {"strict": True, "inductor": {"epilogue_fusion": False, "triton.cudagraphs": True}}
    with torch.no_grad():
        torch.compile(head(), backend="normfx", options=options)(torch.randn(64, 8))
    (seen,) = inductor_settings
    assert seen["epilogue_fusion"] is False
    assert seen["cudagraphs"] is True


def test_dynamic_true_compiles_once():
    fast, model = compiled(head(), dynamic=True), head()
    with torch.no_grad():
        for rows in (64, 5, 17):
            assert fast(torch.randn(rows, 8)).shape == model(torch.randn(rows, 8)).shape
    assert len(normfx.report().graphs) == 1


def test_dynamic_false_compiles_for_every_shape():
    fast = compiled(head(), dynamic=False)
    with torch.no_grad():
        for rows in (64, 5, 17):
            fast(torch.randn(rows, 8))
    assert len(normfx.report().graphs) == 3


def test_rules_choose_what_runs():
    model, x = head(), torch.randn(64, 8)
    with torch.no_grad():
        compiled(model, rules=["fold-affine-into-linear"])(x)
        folded = normfx.report().graphs[-1]
        torch._dynamo.reset()
        compiled(model, rules=[])(x)
        plain = normfx.report().graphs[-1]
    assert folded.sites[0].actions == ["fold-affine-into-linear"]
    assert folded.hoisted == 0
    assert plain.sites[0].actions == []
    assert plain.sites[0].refusals == ["rule-off"]


def test_the_backend_is_registered():
    assert "normfx" in torch._dynamo.list_backends(exclude_tags=())
