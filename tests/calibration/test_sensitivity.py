"""Sensitivity: the damage of each site and of several, and the choice under a budget."""

from __future__ import annotations

import pytest
import torch
from calibrated_models import NAMES, batches, net
from models import roughened
from torch import nn

import normfx
from normfx import StatisticsError, calibrate, sensitivity
from normfx.calibration.affine import explained
from normfx.calibration.sensitivity import Damage, Sensitivity, SiteSensitivity


def loss(output, batch):
    return output.square().mean()


def test_damage_is_that_of_the_compiled_model():
    model, data = net(), batches(4)
    statistics = calibrate(model, data)
    found = sensitivity(model, data, statistics, loss=loss)
    assert sorted(row.name for row in found.rows) == sorted(NAMES)
    for row in found.rows:
        options = {"lowering": "eager", "strict": True, "statistics": statistics, "rules": RULE}
        torch._dynamo.reset()
        fast = torch.compile(model, backend="normfx", options={**options, "sites": [row.name]})
        with torch.no_grad():
            mine = torch.cat([fast(x) for x in data]).double()
            theirs = torch.cat([model(x) for x in data]).double()
        relative = ((mine - theirs).norm() / theirs.norm()).item()
        cosines = torch.cosine_similarity(mine, theirs, dim=-1)
        change = mine.square().mean() - theirs.square().mean()
        ulp = 64 * torch.finfo(torch.float32).eps
        assert abs(row.damage.relative_l2 - relative) <= ulp
        assert abs(row.damage.cosine - cosines.mean().item()) <= ulp
        assert abs(row.damage.worst - cosines.min().item()) <= ulp
        assert abs(row.damage.loss - change.item()) <= ulp * theirs.square().mean().item()
        assert row.saved == 2 * data[0].numel() * 4


RULE = ["calibrated-norm"]


def test_a_choice_is_measured_together():
    model, data = net(), batches(4)
    found = sensitivity(model, data, calibrate(model, data))
    alone = sorted(row.damage.of("cosine") for row in found.rows)
    assert found.choose(alone[0] / 2).sites == ()
    assert found.choose(1.0).sites == tuple(row.name for row in found.order())
    budget = alone[2]
    choice = found.choose(budget)
    assert 1 <= len(choice.sites) <= 3
    assert choice.damage == found.damage(choice.sites)
    assert choice.damage.of("cosine") <= budget
    assert choice.saved == sum(r.saved for r in found.rows if r.name in choice.sites)


def test_damages_that_do_not_add_up_are_seen():
    """Two sites that are harmless alone and ruinous together: only one of them is taken."""
    together = {("a",): 0.01, ("b",): 0.02, ("a", "b"): 0.5, ("a", "c"): 0.04, ("c",): 0.03}
    damages = {sites: Damage(d, 1 - d, 1 - d) for sites, d in together.items()}
    rows = tuple(SiteSensitivity(n, "LayerNorm", damages[(n,)], 1024.0) for n in "abc")
    found = Sensitivity(rows, lambda sites: damages[tuple(sites)])
    assert found.choose(0.1).sites == ("a", "c")
    assert found.choose(0.1, "relative_l2").sites == ("a", "c")
    with pytest.raises(StatisticsError, match="needs a loss"):
        found.choose(0.1, "loss")


def test_a_budget_chooses_while_calibrating(tmp_path):
    model, data = net(), batches(4)
    path = tmp_path / "statistics"
    statistics = calibrate(model, data, budget=0.05, path=path)
    choice = sensitivity(model, data, calibrate(model, data)).choose(0.05)
    assert statistics.chosen == choice.sites
    assert normfx.Statistics.load(path) == statistics
    by_loss = calibrate(model, data, budget=0.05, loss=loss)
    found = sensitivity(model, data, calibrate(model, data), loss=loss)
    assert by_loss.chosen == found.choose(0.05, "loss").sites
    with pytest.raises(StatisticsError, match="no iterator"):
        calibrate(model, iter(data), budget=0.05)
    with pytest.raises(StatisticsError, match="no iterator"):
        sensitivity(model, iter(data), statistics)


def test_an_exact_static_norm_does_no_damage():
    """Rows of one size and mean zero: the norm is the same affine map for each of them."""
    x = torch.randn(64, 8, dtype=torch.float64)
    x = torch.nn.functional.layer_norm(x, (8,), eps=0.0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).double()
    statistics = calibrate(model, [x])
    (row,) = sensitivity(model, [x], statistics).rows
    assert row.damage.relative_l2 <= 64 * torch.finfo(torch.float64).eps
    (site,) = statistics.sites.values()
    assert abs(1 - explained(site.moments)) <= 64 * torch.finfo(torch.float64).eps


def test_masked_results_do_not_count():
    model = net()
    data = [{"x": x, "mask": torch.ones(2, 4)} for x in batches(3)]
    for batch in data:
        batch["mask"][:, 2:] = 0
    statistics = calibrate(model, data, mask="mask")
    (row,) = sensitivity(model, data, statistics, sites=["final"], mask="mask").rows
    short = [x[:, :2] for x in batches(3)]
    (alone,) = sensitivity(model, short, calibrate(model, short), sites=["final"]).rows
    ulp = 64 * torch.finfo(torch.float32).eps
    assert abs(row.damage.relative_l2 - alone.damage.relative_l2) <= ulp


def test_the_table():
    model, data = net(), batches(2)
    found = sensitivity(model, data, calibrate(model, data), loss=loss)
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["site", "kind"]
    assert lines[0].endswith("loss")
    assert len(lines) == 1 + len(NAMES)
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(NAMES)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot(ending, tmp_path):
    pytest.importorskip("matplotlib")
    model, data = net(), batches(2)
    path = tmp_path / f"plot.{ending}"
    sensitivity(model, data, calibrate(model, data)).plot(path)
    assert path.stat().st_size > 1000


class Encoder(nn.Module):
    """A sentence encoder as MiniLM is one, small and untrained."""

    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=99, num_attention_heads=2, **sizes)
        self.bert = roughened(BertModel(config, add_pooling_layer=False))

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_an_encoder_with_chosen_sites_keeps_its_budget():
    generator = torch.Generator().manual_seed(0)
    model, data = Encoder().eval(), []
    for tokens in (9, 12, 7):
        mask = torch.ones(6, tokens, dtype=torch.long)
        for row in range(6):
            mask[row, 2 + row :] = 0
        ids = torch.randint(99, (6, tokens), generator=generator)
        data.append({"input_ids": ids, "attention_mask": mask})
    statistics = calibrate(model, data, mask="attention_mask")
    assert len(statistics.sites) == 6
    real = sum(int(batch["attention_mask"].sum()) for batch in data)
    assert statistics.sites["bert.embeddings.LayerNorm"].moments.rows.item() == real
    found = sensitivity(model, data, statistics)
    counts = []
    for budget in (0.0, 1e-3, 1e-2, 1.0):
        choice = found.choose(budget)
        counts.append(len(choice.sites))
        options = {
            "statistics": statistics.using(choice.sites),
            "lowering": "eager",
            "strict": True,
        }
        torch._dynamo.reset()
        fast = torch.compile(model, backend="normfx", options=options)
        with torch.no_grad():
            pairs = [(fast(**batch), model(**batch)) for batch in data]
        cosine = torch.cat([torch.cosine_similarity(a, b) for a, b in pairs]).double().mean().item()
        ulp = 64 * torch.finfo(torch.float32).eps
        assert abs(cosine - choice.damage.cosine) <= ulp
        assert 1 - cosine <= budget + ulp
    assert counts == sorted(counts)
    assert counts[-1] == 6
