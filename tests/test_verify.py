"""verify: nothing to blame where all is right, and the right rule and norm where one is broken."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from assertions import STRICT
from models import Block, roughened
from torch import nn
from torch.utils.checkpoint import checkpoint

import normfx
from normfx import OptionError
from normfx import graph as g
from normfx.live import LiveWeights
from normfx.passes import fold, lower, readers, recentre, recognise, telescope
from normfx.passes.values import Values
from normfx.torch_internals import source_name
from normfx.verification.variants import variants


def stream(*head: nn.Module) -> nn.Sequential:
    """A residual stream: its norms are 1.norm, 2.norm, 3.norm and 4, with or without more before."""
    blocks = [Block() for _ in range(3)]
    return roughened(nn.Sequential(*head, *blocks, nn.LayerNorm(8), nn.Linear(8, 4))).eval()


def verified(model, *args, grad: bool = False, **settings):
    options = {**STRICT, **settings.pop("options", {})}
    with torch.set_grad_enabled(grad):
        return normfx.verify(model, options=options, **settings)(*args)


def blame(model, *args, **settings):
    """Whom verify blames, and that the option it names makes all well again."""
    found = verified(model, *args, **settings)
    assert not found.ok
    (blamed,) = found.blamed
    if blamed.skip:
        options = {**settings.pop("options", {}), "skip": [blamed.skip]}
        torch._dynamo.reset()
        assert verified(model, *args, options=options, **settings).ok
    return blamed.stage, blamed.rule, blamed.site


def site_of(node) -> str:
    return node.meta["normfx_site"].key


# ---------------------------------------------------------------------------- nothing to blame


def test_every_stage_is_within_the_contract():
    found = verified(stream(nn.Linear(8, 8)), torch.randn(16, 8))
    assert found.ok
    (graph,) = found.graphs
    assert [s.stage for s in graph.stages] == ["capture", "recognise", "rewrite", "fold", "hoist", "lower"]  # fmt: skip
    assert {s.site for s in graph.sites} == {"1.norm", "2.norm", "3.norm", "4"}
    assert all(s.relative < 1e-5 for s in graph.sites)
    # up to the rewrites, each norm has its own value; then what reads it has the one that is kept
    assert {s.at for s in graph.sites if s.stage == "rewrite"} == {"norm", "norm_1", "norm_2", "norm_3"}  # fmt: skip
    assert {s.site for s in graph.sites if s.stage == "lower"} == {"1.norm", "2.norm", "3.norm", "4"}  # fmt: skip
    assert {s.measured.tensor for s in graph.stages} == {"output 0"}


def test_a_norm_that_is_returned_is_compared_as_the_output():
    model = roughened(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    (graph,) = verified(model, torch.randn(4, 8)).graphs
    assert {s.stage for s in graph.sites} == {"recognise", "rewrite", "hoist", "lower"}


def test_hard_inputs_and_changed_weights():
    found = verified(stream(nn.Linear(8, 8)), torch.randn(16, 8), inputs="hard")
    assert found.ok
    names = dict.fromkeys(s.variant for s in found.graphs[0].stages)
    assert list(names) == ["given", "scaled rows", "large means", "changed weights"]


def test_gradients_of_inputs_and_parameters():
    model = stream(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    x = torch.randn(16, 8, requires_grad=True)
    found = verified(model, x, grad=True, options={"rules": ["recentre", "norm-of-norm"]})
    assert found.ok
    assert found.graphs[0].training
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_compiled_code_is_a_stage():
    found = verified(stream(), torch.randn(16, 8), options={"lowering": "eager"})
    assert "inductor" not in {s.stage for s in found.graphs[0].stages}


@pytest.mark.inductor
def test_inductor_is_the_last_stage():
    found = verified(stream(nn.Linear(8, 8)), torch.randn(16, 8), compiled=True)
    assert found.ok
    assert found.graphs[0].stages[-1].stage == "inductor"


class Broken(nn.Module):
    """Two graphs; the second is called twice, with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def test_each_graph_is_verified_on_what_it_is_called_with():
    found = verified(roughened(Broken()), torch.randn(4, 8))
    assert found.ok
    assert sum(graph.calls for graph in found.graphs) >= 2
    assert sum(graph.norms for graph in found.graphs) >= 1


def test_state_is_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).train()
    x = torch.randn(16, 8)
    before = {name: held.clone() for name, held in model.state_dict().items()}
    given, random = x.clone(), torch.get_rng_state()
    found = verified(model, x, grad=True)
    assert found.ok
    written = {s.measured.tensor for s in found.graphs[0].stages}
    assert written  # running statistics are among what is compared
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], held) for name, held in model.state_dict().items())


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x.add_(1)
        return self.norm(x)


def test_a_model_that_writes_to_its_input_does_not_write_to_ours():
    x = torch.zeros(2, 8)
    found = verified(roughened(Writes()), x)
    assert found.ok
    assert torch.equal(x, torch.zeros(2, 8))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), Block()

    def forward(self, x):
        return checkpoint(self.block, self.first(x), use_reentrant=False)


def test_bodies_of_checkpoints_are_verified():
    found = verified(roughened(Checkpointed()), torch.randn(4, 8), grad=True)
    assert found.ok
    assert found.graphs[0].norms == 1
    assert found.graphs[0].stages[1].measured.meaning < 1e-12


def test_an_rms_norm_without_eps_has_that_of_its_own_dtype():
    """In float64 the default would be another number: the reference keeps the model's."""
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4))
    x = 1e-4 * torch.randn(4, 8)
    assert verified(model, x).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = stream(nn.Linear(8, 8)).to(dtype)
    assert verified(model, torch.randn(16, 8, dtype=dtype), inputs="hard").ok


def test_dynamic_shapes():
    assert verified(stream(nn.Linear(8, 8)), torch.randn(16, 8), dynamic=True).ok


def test_embeddings_are_hardened_where_no_activation_comes_in():
    model = roughened(nn.Sequential(nn.Embedding(32, 8), nn.LayerNorm(8), nn.Linear(8, 4))).eval()
    found = verified(model, torch.arange(32).reshape(2, 16), inputs="hard")
    assert found.ok
    assert "scaled rows" in {s.variant for s in found.graphs[0].stages}


def test_inputs_keep_their_layout():
    x = torch.randn(8, 16).t()
    graph = torch.fx.Graph()
    graph.placeholder("x")
    for variant in variants(graph, [], [x], "hard"):
        assert variant.args[0].stride() == x.stride()


def test_statistics_are_approximate_and_no_violation():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    data = [torch.randn(64, 8) for _ in range(2)]
    statistics = normfx.calibrate(model, data, progress=False)
    torch._dynamo.reset()
    found = verified(model, data[0], options={"statistics": statistics})
    (graph,) = found.graphs
    assert found.ok
    assert graph.approximate == ["1"]
    (stage,) = [s for s in graph.stages if s.verdict == "approximate"]
    assert stage.stage == "calibrate"
    assert stage.measured.relative > 1e-3
    assert graph.stages[-1].measured.meaning < 1e-12  # and what comes after is exact


def test_norms_that_adapt_are_approximate():
    model = roughened(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))).eval()
    found = verified(model, torch.randn(16, 8), options={"test_time": "alpha-bn"})
    (graph,) = found.graphs
    assert found.ok
    assert graph.approximate == ["1"]
    assert [s.stage for s in graph.stages if s.verdict == "approximate"] == ["test-time"]


def test_a_model_without_tensors_has_no_graph():
    assert str(verified(lambda x: x, 3)) == "dynamo made no graph of this model: there is nothing to verify.\n"  # fmt: skip


def test_a_wrong_setting_is_refused():
    with pytest.raises(OptionError, match="inputs: expected 'given' or 'hard', got 'easy'"):
        normfx.verify(stream(), inputs="easy")


# ---------------------------------------------------------------------------- seeded faults


def broken(monkeypatch, module, name, change, site: str) -> None:
    """Makes a function of a rule do something else for one norm, its first node argument."""
    original = getattr(module, name)

    def changed(*args, **kwargs):
        node = next(a for a in args if isinstance(a, torch.fx.Node))
        if node.meta.get("normfx_site") is not None and site_of(node) == site:
            return change(original, *args, **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, changed)


def test_wrong_eps(monkeypatch):
    def change(original, node):
        return original(node)._replace(eps=1e-4)

    broken(monkeypatch, recentre, "_biased", change, "2.norm")
    assert blame(stream(nn.Linear(8, 8)), torch.randn(16, 8)) == ("rewrite", "recentre", "2.norm")


def test_wrong_eps_that_only_hard_inputs_show(monkeypatch):
    """Beside a variance of one, 1e-8 more or less is nothing that float32 can tell."""

    def change(original, node):
        return original(node)._replace(eps=node.kwargs["spec"].eps + 1e-8)

    broken(monkeypatch, recentre, "_biased", change, "1")
    model = roughened(nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 4)))
    x = torch.randn(16, 8)
    assert verified(model, x).ok
    torch._dynamo.reset()
    assert blame(model, x, inputs="hard") == ("rewrite", "recentre", "1")


def test_wrong_axis(monkeypatch):
    original = recognise.composite

    def changed(node):
        core = original(node)
        if core is not None and g.module_path(node) == "3.norm":
            return replace(core, spec=core.spec._replace(dims=(1,)))
        return core

    monkeypatch.setattr(recognise, "composite", changed)
    found = blame(stream(nn.Linear(8, 8)), torch.randn(2, 8, 8))
    assert found == ("recognise", "recognise-layer-norm", "3.norm")


def test_missing_bias(monkeypatch):
    def change(original, graph, node, plan):
        node.args = (*node.args[:2], None, *node.args[3:])
        return original(graph, node, plan)

    broken(monkeypatch, fold, "_replace", change, "2.norm")
    found = blame(stream(nn.Linear(8, 8)), torch.randn(16, 8))
    assert found == ("fold", "fold-affine-into-linear", "2.norm")


def test_unshared_weight(monkeypatch):
    """A weight that two layers share is folded for one of them, and the other reads it too."""

    def change(original, graph, node, plan):
        others = [u for r in plan.readers for u in r.weight.users if u is not r.node]
        before = {r.node: r.weight for r in plan.readers}
        original(graph, node, plan)
        for reader in plan.readers:
            for other in others:
                if g.is_call(other, torch.ops.aten.linear.default):
                    other.replace_input_with(before[reader.node], reader.node.args[1])

    broken(monkeypatch, fold, "_replace", change, "2.norm")
    model = stream(nn.Linear(8, 8))
    model[3].up.weight = model[2].up.weight
    found = blame(model, torch.randn(16, 8), options={"skip": ["fold-affine-into-linear@3.norm"]})
    assert found == ("fold", "fold-affine-into-linear", "2.norm")


def test_border_of_a_zero_padded_convolution(monkeypatch):
    monkeypatch.setattr(readers, "_pads", lambda convolution, weight: False)
    layers = [nn.Sigmoid(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)]
    padded = [nn.Sigmoid(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)]
    model = roughened(nn.Sequential(*layers, *padded)).eval()
    found = blame(model, torch.randn(2, 3, 6, 6))
    assert found == ("fold", "fold-statistics-into-next", "4")


def test_swapped_operands(monkeypatch):
    def change(original, graph, node):
        made = original(graph, node)
        x, sizes, weight, bias, eps = made.args
        made.args = (x, sizes, bias, weight, eps)
        return made

    broken(monkeypatch, lower, "_as_operator", change, "2")
    layers = [nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8)]
    model = roughened(nn.Sequential(*layers))
    assert blame(model, torch.randn(16, 8)) == ("lower", "lower", "2")


def test_stale_fold(monkeypatch):
    """A weight is folded with the numbers of now: right until one of them changes."""
    state = {}
    original = fold.fold

    def watched(gm, *args, values=None, **kwargs):
        state.update(gm=gm, values=values)
        return original(gm, *args, values=values, **kwargs)

    def change(replaced, graph, node, plan):
        replaced(graph, node, plan)
        gm, values = state["gm"], state["values"]
        assert isinstance(values, Values)
        for reader in plan.readers:
            made = reader.node.args[1]
            name = f"stale_{len(list(gm.buffers()))}"
            gm.register_buffer(name, values.of(made))
            with graph.inserting_before(made):
                constant = graph.get_attr(name)
            constant.meta.update(made.meta)
            reader.node.replace_input_with(made, constant)

    monkeypatch.setattr("normfx.pipeline.fold", watched)
    broken(monkeypatch, fold, "_replace", change, "3.norm")
    model, x = stream(nn.Linear(8, 8)), torch.randn(16, 8)
    assert verified(model, x).ok
    torch._dynamo.reset()
    assert blame(model, x, inputs="hard") == ("fold", "fold-affine-into-linear", "3.norm")


def test_hoisted_weights_that_do_not_follow(monkeypatch):
    made = LiveWeights._refreshed

    def stale(self, args):
        return self._last if self._last.hoisted else made(self, args)

    monkeypatch.setattr(LiveWeights, "_refreshed", stale)
    model, x = stream(nn.Linear(8, 8)), torch.randn(16, 8)
    assert verified(model, x).ok
    torch._dynamo.reset()
    assert blame(model, x, inputs="hard") == ("hoist", "hoist", "")


def test_cast_order(monkeypatch):
    """Statistics after the cast to float16 in place of before it: squares overflow there."""
    original = recognise.composite

    def changed(node):
        core = original(node)
        if core is not None and g.module_path(node) == "1":
            return replace(core, spec=core.spec._replace(stats_dtype=torch.float16))
        return core

    monkeypatch.setattr(recognise, "composite", changed)
    model = roughened(nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 4)))
    found = blame(model.half(), torch.randn(16, 8).half() * 400)
    assert found == ("recognise", "recognise-rms-norm", "1")


def test_missing_centring_of_one_writer(monkeypatch):
    original = recentre._centre_all

    def changed(graph, uses, blind, dtype):
        weight = [use for use in uses if g.clean_path(source_name(use.value)) == "2.down.weight"]
        return original(graph, [use for use in uses if use not in weight], blind, dtype)

    monkeypatch.setattr(recentre, "_centre_all", changed)
    (blamed,) = verified(stream(nn.Linear(8, 8)), torch.randn(16, 8)).blamed
    # the first that reads what 2.down writes; the one after it is wrong as well
    assert (blamed.stage, blamed.rule, blamed.site) == ("rewrite", "recentre", "3.norm")


class Post(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def test_wrong_residual(monkeypatch):
    """What is added to a stream that lost its scale keeps its own."""
    original = telescope._Telescope._replace

    def changed(self, node, plan):
        if site_of(node) == "1.norm":
            plan.branches.clear()
        return original(self, node, plan)

    monkeypatch.setattr(telescope._Telescope, "_replace", changed)
    model = roughened(nn.Sequential(Post(), Post(), Post(), nn.Linear(8, 4))).eval()
    found = blame(model, torch.randn(16, 8))
    assert found == ("fold", "telescope", "1.norm")


def test_a_gradient_that_is_lost(monkeypatch):
    """The outputs are right to the last bit."""

    def change(original, graph, node):
        made = original(graph, node)
        with graph.inserting_before(made):
            detached = graph.call_function(torch.ops.aten.detach.default, (made.args[0],))
        detached.meta.update(made.args[0].meta)
        made.replace_input_with(made.args[0], detached)
        return made

    broken(monkeypatch, lower, "_as_operator", change, "3.norm")
    found = blame(stream(nn.Linear(8, 8)), torch.randn(16, 8), grad=True)
    assert found == ("lower", "lower", "3.norm")


def test_a_rule_in_the_body_of_a_checkpoint(monkeypatch):
    def change(original, graph, node):
        made = original(graph, node)
        x, sizes, weight, bias, eps = made.args
        made.args = (x, sizes, bias, weight, eps)
        return made

    broken(monkeypatch, lower, "_as_operator", change, "block.norm")
    found = blame(roughened(Checkpointed()), torch.randn(4, 8), grad=True)
    assert found == ("recognise", "lower", "block.norm")  # the stage in which bodies are rewritten


# ---------------------------------------------------------------------------- what is shown


@pytest.fixture
def violation(monkeypatch):
    def change(original, node):
        return original(node)._replace(eps=1e-2)

    broken(monkeypatch, recentre, "_biased", change, "2.norm")
    return verified(stream(nn.Linear(8, 8)), torch.randn(16, 8))


def test_table(violation):
    text = str(violation)
    assert "violation: recentre at 2.norm (" in text
    assert "models.py:" in text
    assert 'options={"skip": ["recentre@2.norm"]}' in text


def test_json(violation):
    held = json.loads(violation.to_json())
    assert held["ok"] is False
    (graph,) = held["graphs"]
    assert graph["blamed"]["rule"] == "recentre"
    assert graph["stages"][0]["measured"]["tensor"] == "output 0"


def test_json_has_no_number_that_json_has_not(violation):
    stage = violation.graphs[0].stages[0]
    bad = replace(stage, measured=replace(stage.measured, ulp=float("nan")))
    violation.graphs[0].stages[0] = bad
    held = json.loads(violation.to_json(), parse_constant=pytest.fail)
    assert held["graphs"][0]["stages"][0]["measured"]["ulp"] == "nan"


def test_html(violation, tmp_path):
    blamed = replace(violation.graphs[0].blamed, site="<script>alert(1)</script>")
    violation.graphs[0].blamed = blamed
    text = violation.to_html(tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "http" not in text
    assert "recentre" in text
