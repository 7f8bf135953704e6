"""The gradual schedule: when which norm goes, and how an interrupted run goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from models import roughened
from torch import nn

import normfx
from normfx import ConversionError, GradualConversion, calibrate
from normfx.nn import UnifiedNorm


def model() -> nn.Sequential:
    torch.manual_seed(4)
    parts = [part for _ in range(3) for part in (nn.RMSNorm(6), nn.Linear(6, 6), nn.Tanh())]
    return roughened(nn.Sequential(*parts)).double().eval()


def data(count: int = 30) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05)


def train(net, schedule, optimizer, batches) -> list[tuple[str, ...]]:
    """A plain loop; what was converted in each step."""
    net.train()
    found = []
    for x in batches:
        optimizer.zero_grad()
        (net(x) - x).square().mean().backward()
        optimizer.step()
        record = schedule.step()
        found.append(() if record is None else tuple(s.names[0] for s in record.swapped))
        if record is not None:
            optimizer.add_param_group({"params": list(record.new_parameters.values())})
    return found


def test_one_norm_after_the_other():
    net, batches = model(), data()
    schedule = GradualConversion(net, "unified", statistics=calibrate(net, batches), every=4)
    assert str(schedule) == "step 0: 0 of 3 norms are unified, next 0"
    found = train(net, schedule, optimizer_of(net), batches[:14])
    assert {step + 1: names for step, names in enumerate(found) if names} == {
        4: ("0",),
        8: ("3",),
        12: ("6",),
    }
    assert schedule.done
    assert schedule.converted == schedule.order == ("0", "3", "6")
    assert str(schedule) == "step 14: 3 of 3 norms are unified"
    assert [type(part) for part in net][::3] == [UnifiedNorm] * 3
    schedule.undo()
    assert [type(part) for part in net][::3] == [nn.RMSNorm] * 3
    assert schedule.converted == ()


def test_several_at_once_and_a_last_one():
    net = model()
    schedule = GradualConversion(net, "unified", every=1, at_once=2)
    assert [len(schedule.step().swapped), len(schedule.step().swapped)] == [2, 1]
    assert schedule.step() is None


def test_orders():
    net, batches = model(), data(6)
    statistics = calibrate(net, batches)
    shares = {
        swap.names[0]: swap.explained
        for swap in normfx.convert(copy.deepcopy(net), "unified", statistics=statistics).swapped
    }
    by_share = tuple(sorted(shares, key=lambda name: -shares[name]))
    assert GradualConversion(net, "unified", statistics=statistics, order="damage").order == (
        by_share
    )
    measured = normfx.sensitivity(net, batches, statistics, progress=False)
    damage = {row.name: 1 - row.damage.cosine for row in measured.rows}
    schedule = GradualConversion(net, "unified", statistics=statistics, order=measured)
    assert schedule.order == tuple(sorted(damage, key=lambda name: damage[name]))
    assert GradualConversion(net, "unified", order=["6", "0"]).order == ("6", "0")
    assert GradualConversion(net, "unified", filter=["3"]).order == ("3",)
    assert [type(part) for part in net][::3] == [nn.RMSNorm] * 3


def test_statistics_of_the_moment():
    net, batches = model(), data()
    calls = []

    def now():
        calls.append(net.training)
        return calibrate(net, batches[:4])

    schedule = GradualConversion(net, "unified", statistics=now, every=2)
    net[4].eval()
    net[0].train()
    train(net, schedule, optimizer_of(net), batches[:3])
    assert calls == [False]
    assert net[0].training
    inputs = []
    handle = net[3].register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        net.eval()
        for x in batches[:4]:
            net(x)
    handle.remove()
    schedule.step()
    square = torch.cat(inputs).square().mean(0)
    assert (net[3].running_var - square).abs().max() <= 1e-13 * square.max()


@pytest.mark.parametrize("stop", [3, 5, 9])
def test_an_interrupted_run_resumed_is_the_same_run(stop, tmp_path):
    batches = data(16)
    whole = model()
    statistics = calibrate(whole, batches)
    schedule = GradualConversion(whole, "unified", statistics=statistics, every=4, order="damage")
    train(whole, schedule, optimizer_of(whole), batches)

    first = model()
    schedule = GradualConversion(first, "unified", statistics=statistics, every=4, order="damage")
    train(first, schedule, optimizer_of(first), batches[:stop])
    torch.save({"model": first.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "saved")

    second = model()
    saved = torch.load(tmp_path / "saved", weights_only=True)
    schedule = GradualConversion(second, "unified", statistics=statistics, every=4, order="damage")
    schedule.load_state_dict(saved["schedule"])
    second.load_state_dict(saved["model"], strict=True)
    train(second, schedule, optimizer_of(second), batches[stop:])
    state = whole.state_dict()
    assert list(second.state_dict()) == list(state)
    assert all(torch.equal(state[k], held) for k, held in second.state_dict().items())


def test_refusals():
    net = model()
    with pytest.raises(ConversionError, match="got every=0, at_once=1"):
        GradualConversion(net, "unified", every=0)
    with pytest.raises(ConversionError, match="the order 'damage' needs statistics"):
        GradualConversion(net, "unified", order="damage")
    with pytest.raises(ConversionError, match="expected 'model', 'damage' or names, got 'reverse'"):
        GradualConversion(net, "unified", order="reverse")
    with pytest.raises(ConversionError, match=r"order: \['1'\]; the norms .* are 0, 3, 6"):
        GradualConversion(net, "unified", order=["0", "1"])
    with pytest.raises(ConversionError, match="order: names twice"):
        GradualConversion(net, "unified", order=["0", "0"])
    schedule = GradualConversion(net, "unified", every=1)
    state = schedule.state_dict()
    with pytest.raises(ConversionError, match=r"another schedule: it differs in \['6'\]"):
        schedule.load_state_dict({**state, "order": ("0", "3")})
    schedule.step()
    with pytest.raises(ConversionError, match=r"\['0'\] are already: give a schedule of a fresh"):
        schedule.load_state_dict(state)
    net[3] = nn.Tanh()
    with pytest.raises(ConversionError, match="no norm is named '3'"):
        schedule.step()
