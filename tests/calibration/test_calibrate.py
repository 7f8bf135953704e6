"""Calibrate: what is measured, under masks, interrupts and in parts."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from calibrated_models import NAMES, batches, inputs_of, net
from torch import nn

import normfx
from normfx import Statistics, StatisticsError, calibrate
from normfx.calibration.moments import moments

EPS = np.finfo(np.float64).eps
# What merging in another order may differ by: the issue's own bound, in roundings.
TOGETHER = 4096 * EPS


def assert_same(a: Statistics, b: Statistics, relative: float = 0.0) -> None:
    assert list(a.sites) == list(b.sites)
    assert a.batches == b.batches
    for name, site in a.sites.items():
        for mine, theirs in zip(site.moments, b.sites[name].moments, strict=True):
            scale = theirs.abs().max()
            assert (mine - theirs).abs().max() <= relative * scale, name


def test_sites_are_those_of_the_report():
    model, data = net(), batches()
    report = normfx.explain(model)(data[0])
    measured = calibrate(model, data)
    assert [site.name for site in report.sites] == NAMES == list(measured.sites)
    assert measured.complete
    assert measured.batches == len(data)
    assert normfx.report().graphs == ()


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_of_what_the_norm_reads(name):
    model, data = net(), batches()
    x = inputs_of(model, name, data)
    norm = model.get_submodule(name).double()
    with torch.no_grad():
        y = (norm(x.double()) - getattr(norm, "bias", 0.0)) / norm.weight
    model = net()
    got, expected = calibrate(model, data).sites[name].moments, moments(x, y)
    assert torch.equal(got.rows, expected.rows)
    for mine, theirs in zip(got, expected, strict=True):
        # x is computed by the same operators in eager, up to float32's rounding of one of them
        assert (mine - theirs).abs().max() <= 64 * torch.finfo(
            torch.float32
        ).eps * theirs.abs().max()


def test_several_shapes_are_one_site():
    model = net()
    data = [x for tokens in (4, 7, 1, 9, 12) for x in batches(2, tokens)]
    measured = calibrate(model, data)
    assert list(measured.sites) == NAMES
    for site in measured.sites.values():
        assert site.moments.rows.item() == sum(x.shape[0] * x.shape[1] for x in data)


def test_a_norm_without_a_module_is_named_by_its_kind():
    def function(x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (
            torch.nn.functional.layer_norm(y + 1, (8,))
            + y * torch.rsqrt((y + 2).pow(2).mean(-1, keepdim=True) + 1e-6) * 0
            + torch.nn.functional.layer_norm(y.exp(), (8,))
        )

    # of every number of tokens: the names of nodes differ with the shapes, these do not
    data = [x for tokens in (4, 7, 9) for x in batches(1, tokens)]
    assert list(calibrate(function, data).sites) == ["RMSNorm", "LayerNorm", "LayerNorm#1"]


def test_sites_filter():
    model, data = net(), batches()
    assert list(calibrate(model, data, sites=["blocks.*.norm"]).sites) == [NAMES[0], NAMES[2]]
    with pytest.raises(StatisticsError, match=r"no norm is named 'last'; found none"):
        calibrate(model, data, sites=["last"])


def test_the_number_of_batches():
    model, data = net(), batches(6)
    assert_same(calibrate(model, data, batches=2), calibrate(model, data[:2]))
    assert_same(calibrate(model, iter(data), batches=2), calibrate(model, data[:2]))


def test_nothing_to_measure():
    with pytest.raises(StatisticsError, match="no batch was given"):
        calibrate(net(), [])
    with pytest.raises(StatisticsError, match="has no norm"):
        calibrate(nn.Linear(8, 8), batches(1))


def test_what_is_refused_is_named():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.group, self.norm = nn.GroupNorm(2, 8), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.group(x))

    measured = calibrate(Grouped(), [torch.randn(2, 8, 4)])
    assert list(measured.sites) == ["norm"]
    assert measured.refused["group"].startswith("not-per-channel")
    assert "not-per-channel" in str(measured)


def test_modules_that_share_compiled_code_cannot_be_told_apart():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = net().blocks

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return x

    measured = calibrate(Broken(), batches())
    assert not measured.sites
    assert "several modules" in measured.refused["norm"]


def test_a_module_in_two_graphs_is_measured():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x.exp())

    data = batches(2)
    measured = calibrate(Broken(), data)
    assert list(measured.sites) == ["first", "second"]
    assert torch.equal(
        measured.sites["first"].moments.mean,
        calibrate(nn.LayerNorm(8), data).sites["LayerNorm"].moments.mean,
    )


def test_a_model_that_dynamo_gives_up_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.calls = nn.LayerNorm(8), 0

        def forward(self, x):
            self.calls += 1
            return self.norm(x) * self.calls

    with pytest.raises(StatisticsError, match="compiled the model too often"):
        calibrate(Counts(), batches(20))


def test_a_module_that_is_called_twice_is_two_sites():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.norm(self.linear(self.norm(x)))

    assert list(calibrate(Twice(), batches(2)).sites) == ["norm", "norm#1"]


def test_batchnorm_in_training_is_measured_and_updated_once():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
    twin = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
    data = [x[:, 0] for x in batches(5)]
    measured = calibrate(model, data)
    for x in data:
        twin(x)
    assert torch.equal(model[0].running_var, twin[0].running_var)
    (site,) = measured.sites.values()
    x = torch.cat(data).double()
    scale, shift = site.affine("fitted")
    expected = (x.var(0, correction=0) + 1e-5).rsqrt()
    assert (scale - expected).abs().max() <= 64 * EPS * expected.abs().max()
    assert (shift + x.mean(0) * expected).abs().max() <= 64 * EPS * expected.abs().max()


# ---------------------------------------------------------------------------- masks


class Masked(nn.Module):
    """One norm for each place that tokens are in."""

    def __init__(self):
        super().__init__()
        names = ("tokens", "flat", "heads", "pooled", "other")
        self.norms = nn.ModuleDict({name: nn.LayerNorm(6) for name in names})

    def forward(self, x, mask):
        n = self.norms
        y = n["tokens"](x)
        a = n["flat"](x.flatten(0, 1)).reshape(x.shape)
        b = n["heads"](x.unsqueeze(1).expand(-1, 3, -1, -1) * 2.0).sum(1)
        c = n["pooled"](x[:, 0])
        d = n["other"](x[:, 1:3])
        return y + a + b + c.unsqueeze(1), d


def test_padding_does_not_count():
    torch.manual_seed(2)
    data = []
    for tokens in (5, 7):
        x, mask = torch.randn(4, tokens, 6), torch.ones(4, tokens, dtype=torch.long)
        for row in range(4):
            mask[row, 1 + row :] = 0
        data.append({"x": torch.where(mask.bool().unsqueeze(-1), x, torch.inf), "mask": mask})
    measured = calibrate(Masked(), data, mask="mask")
    real = torch.cat([batch["x"][batch["mask"].bool()] for batch in data])
    for name, times, factor in (("tokens", 1, 1.0), ("flat", 1, 1.0), ("heads", 3, 2.0)):
        found = measured.sites[f"norms.{name}"].moments
        assert found.rows.item() == times * len(real)
        assert (found.mean - factor * real.double().mean(0)).abs().max() <= 64 * EPS
    assert measured.sites["norms.pooled"].moments.rows.item() == 8
    assert "padding mask" in measured.refused["norms.other"]
    by_function = calibrate(Masked(), data, mask=lambda batch: batch["mask"])
    assert_same(by_function, measured)


def test_a_mask_that_is_none():
    data = [{"x": torch.randn(4, 5, 6), "mask": torch.ones(4, 5)}]
    with pytest.raises(StatisticsError, match="no key 'attention_mask'"):
        calibrate(Masked(), data, mask="attention_mask")
    with pytest.raises(StatisticsError, match=r"expected a \(batch, tokens\) tensor, got \(4,\)"):
        calibrate(Masked(), data, mask=lambda batch: batch["mask"][:, 0])


# ---------------------------------------------------------------------------- parts


def interrupted_after(data, count):
    yield from data[:count]
    raise KeyboardInterrupt


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_interrupt_leaves_what_can_be_resumed(count, window, tmp_path):
    model, data, path = net(), batches(6), tmp_path / "partial"
    with pytest.warns(UserWarning, match=f"interrupted: the statistics are of {count} batches"):
        partial = calibrate(model, interrupted_after(data, count), window=window, path=path)
    assert not partial.complete
    assert partial.batches == count
    whole = calibrate(model, data, window=window)
    resumed = calibrate(model, data, window=window, resume=Statistics.load(path))
    assert resumed == whole
    assert resumed.complete


def test_an_interrupt_within_a_batch_takes_none_of_it():
    model, data = net(), batches(4)
    calls = 0

    def interrupt(module, args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    torch._dynamo.reset()
    whole = calibrate(model, data[:2])

    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            y = self.inner(x)
            torch._dynamo.graph_break()
            interrupt(self, x)
            return y

    with pytest.warns(UserWarning, match="interrupted"):
        partial = calibrate(Stops(), data)
    assert partial.batches == 2
    for name, site in partial.sites.items():
        mine, theirs = site.moments, whole.sites[name.removeprefix("inner.")].moments
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_resume_refuses_another_model_and_other_options():
    data = batches(4)
    with pytest.warns(UserWarning, match="interrupted"):
        partial = calibrate(net(), interrupted_after(data, 2))
    with pytest.raises(StatisticsError, match="cannot resume"):
        calibrate(net(width=16), batches(4, width=16), resume=partial)
    with pytest.raises(StatisticsError, match="cannot resume"):
        calibrate(net(), data, resume=partial, window=4)


WORKER = """
import sys
sys.path[:0] = {paths!r}
import torch
import torch.distributed as dist
from calibrated_models import batches, net
from normfx import Statistics, calibrate
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
mine = calibrate(net(), batches(12)[rank::2])
mine.save(f"{{folder}}/part{{rank}}")
parts = [None, None]
dist.all_gather_object(parts, mine)
Statistics.merge(*parts).save(f"{{folder}}/whole{{rank}}")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_are_one(tmp_path):
    here = Path(__file__).resolve().parent
    code = WORKER.format(paths=[str(here), str(here.parent)])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(rank)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    whole = calibrate(net(), batches(12))
    together = Statistics.merge(*(Statistics.load(tmp_path / f"part{rank}") for rank in range(2)))
    assert_same(together, whole, TOGETHER)
    assert together.fingerprint == whole.fingerprint
    for rank in range(2):  # gathered over the process group, it is the same on every rank
        assert Statistics.load(tmp_path / f"whole{rank}") == together


def test_merge_refuses_what_does_not_belong_together():
    one = calibrate(net(), batches(2))
    with pytest.raises(StatisticsError, match=r"different models: parameter of 'blocks.0"):
        Statistics.merge(one, calibrate(net(width=16), batches(2, width=16)))
    with pytest.raises(StatisticsError, match="other options"):
        Statistics.merge(one, calibrate(net(), batches(2), window=2))
    windowed = calibrate(net(), batches(2), window=2)
    with pytest.raises(StatisticsError, match="with a window"):
        Statistics.merge(windowed, windowed)


def test_ten_times_the_data_in_the_same_memory():
    model = net()
    held = {}

    def is_plain(found):
        """Whether it is a tensor with memory: what other tests left may be a traced or sparse one."""
        plain = type(found) in (torch.Tensor, torch.nn.Parameter)
        plain = plain and found.layout is torch.strided and found.device.type == "cpu"
        return plain and all(isinstance(size, int) for size in found.shape)

    def stream():
        for index in range(60):
            if index in (5, 59):
                gc.collect()
                held[index] = sum(o.nbytes for o in gc.get_objects() if is_plain(o))
            yield torch.randn(2, 4, 8)

    calibrate(model, stream())
    assert held[59] <= held[5]


def test_window_options():
    with pytest.raises(StatisticsError, match="at least 2"):
        calibrate(net(), batches(1), window=1)
    with pytest.raises(StatisticsError, match="give window=4"):
        calibrate(net(), batches(1), filtration=True)


def test_no_bar_where_there_is_no_terminal(capsys):
    calibrate(net(), batches(2))
    assert capsys.readouterr() == ("", "")


def test_weights_do_not_change():
    model, twin = net(), net()
    calibrate(model, batches(2))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is None
