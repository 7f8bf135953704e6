"""The affine map of a site: its forms, and where eps stands."""

from __future__ import annotations

import pytest
import torch

from normfx import StatisticsError
from normfx.calibration.affine import affine
from normfx.calibration.moments import moments
from normfx.calibration.sites import Form
from normfx.ops import NormSpec, norm

ULP = 64 * torch.finfo(torch.float64).eps
LAYER = Form("LayerNorm", "variance", -1, False, 6, 1e-5, "inside", 1.0)
ROOTS = {
    "inside": lambda s, e: (s + e).sqrt(),
    "outside": lambda s, e: s.sqrt() + e,
    "floor": lambda s, e: s.sqrt().clamp_min(e),
    "floor-inside": lambda s, e: s.clamp_min(e).sqrt(),
}


def data() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(400, 6, dtype=torch.float64) * torch.linspace(0.01, 2.0, 6) + 0.3


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= ULP * expected.abs().max().clamp_min(1.0))


@pytest.mark.parametrize("place", ROOTS)
def test_eps_is_at_its_place(place):
    x = data()
    rms = LAYER._replace(statistic="mean-square", eps=0.5, eps_place=place, scale=3.0)
    scale, shift = affine(rms, moments(x, x), None, "unified")
    assert close(scale, 3.0 / ROOTS[place](x.square().mean(0), 0.5))
    assert not shift.any()
    batch = rms._replace(statistic="variance", over_batch=True)
    for how in ("fitted", "unified"):
        scale, shift = affine(batch, moments(x, x), None, how)
        assert close(scale, 3.0 / ROOTS[place](x.var(0, correction=0), 0.5))
        assert close(shift, -scale * x.mean(0))


def test_a_sum_of_squares_is_a_mean_times_the_channels():
    x = data()
    form = LAYER._replace(statistic="sum-square", eps=0.0, eps_place="floor")
    scale, _ = affine(form, moments(x, x), None, "unified")
    assert close(scale, 1.0 / (6 * x.square().mean(0)).sqrt())


def test_fitted_is_the_least_squares_solution():
    x = data()
    spec = NormSpec(
        "LayerNorm",
        (1,),
        **dict.fromkeys(("stats_dtype", "norm_dtype", "out_dtype"), torch.float64),
    )
    y = norm(x, spec=spec, rank=2)
    scale, shift = affine(LAYER, moments(x, y), None, "fitted")
    for channel in range(6):
        design = torch.stack([x[:, channel], torch.ones(400, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(design, y[:, channel : channel + 1]).solution.flatten()
        # the solver is worse than the closed form where a channel hardly varies
        bound = ULP * torch.linalg.cond(design).square()
        assert (
            torch.stack([scale[channel], shift[channel]]) - best
        ).abs().max() <= bound * best.abs().max()


def test_an_eps_that_is_not_known():
    x = data()
    form = LAYER._replace(eps=None)
    affine(form, moments(x, x), None, "fitted")
    with pytest.raises(StatisticsError, match="it is a tensor"):
        affine(form, moments(x, x), None, "unified")
