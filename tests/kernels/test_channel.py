"""The channel kernels in Triton's interpreter, beside the same in float64."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_within_contract

pytest.importorskip("triton")

from normfx.kernels.channel import by_channel, channel_affine, channel_moments, channel_sums

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# shape, dim of the channels, memory format: each has tiles that are not full, and more tiles than programs
LAYOUTS = {
    "tokens": ((3, 61, 70), 2, torch.contiguous_format),
    "rows": ((40, 7), 1, torch.contiguous_format),
    "images": ((5, 11, 17, 19), 1, torch.contiguous_format),
    "channels last": ((4, 5, 7, 7), 1, torch.channels_last),
}


def drawn(layout: str, dtype: torch.dtype = torch.float32, centre: float = 0.0) -> torch.Tensor:
    shape, dim, memory = LAYOUTS[layout]
    x = (torch.randn(shape) + centre).to(dtype).contiguous(memory_format=memory)
    return by_channel(x, dim)


def mask_of(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape[0], x.shape[2]) > 0.3


def moments(x, mask, centred: bool, regions: int) -> torch.Tensor:
    """In the precision of x, from the numbers that count and no others."""
    found = []
    for region in range(regions):
        here = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask
        numbers = x.transpose(1, 2)[~here if region else here]  # (counted, channels)
        n = x.new_full((x.shape[1],), numbers.shape[0])
        mean = numbers.sum(0) / max(numbers.shape[0], 1) * centred
        found.append(torch.stack((n, mean, (numbers - mean).square().sum(0))))
    return torch.stack(found)


# A sum in another order than eager's. Each number passes through the additions of its lane (4 tiles at most, here),
# of the tree over a tile (8 levels) and over the programs (2): each rounds by half an ulp of a partial sum at most.
ROUNDINGS = (4 + 8 + 2) / 2


def check_sums(got, eager, exact, sizes, what="sum") -> None:
    """Holds a sum to the contract, where one ulp is relative to the sum of sizes, for each rounding."""
    sizes = sizes[sizes.isfinite()]
    scale = ROUNDINGS * sizes.max().item() if sizes.numel() else None
    assert_within_contract(got, eager, exact, scale=scale, what=what)


def check_moments(x, mask=None, centred=True, regions=1) -> torch.Tensor:
    got = channel_moments(x, mask, centred, regions)
    eager, exact = (moments(x.to(d), mask, centred, regions) for d in (torch.float, torch.double))
    assert torch.equal(got[:, 0], eager[:, 0])
    check_sums(got[:, 1], eager[:, 1], exact[:, 1], x.double().abs().mean((0, 2)), "mean")
    check_sums(got[:, 2], eager[:, 2], exact[:, 2], exact[:, 2], "m2")
    return got


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((name, torch.float32) for name in LAYOUTS), *(("images", d) for d in DTYPES[1:])],
)
def test_moments(layout, dtype):
    check_moments(drawn(layout, dtype))


@pytest.mark.parametrize("regions", [1, 2])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("layout", ["tokens", "images"])
def test_moments_under_a_mask(layout, centred, regions):
    x = drawn(layout)
    check_moments(x, mask_of(x), centred, regions)


@pytest.mark.parametrize("layout", ["tokens", "images"])
def test_large_mean_and_tiny_variance(layout):
    check_moments(drawn(layout, centre=3000.0), mask_of(drawn(layout)), regions=2)


def test_one_outlier():
    x = drawn("images")
    x[0, :, 0] = 3e4
    check_moments(x)


def test_squares_that_float16_does_not_hold():
    x = (2e4 * drawn("tokens").clamp(-3, 3)).half()
    assert torch.isinf(x * x).any()
    check_moments(x)


def test_zeros_one_position_and_nothing():
    assert (check_moments(0 * drawn("images"))[:, 1:] == 0).all()
    check_moments(drawn("images")[:1, :, :1])
    assert (channel_moments(drawn("images")[:0], None, True, 2) == 0).all()


def test_a_mask_that_leaves_nothing():
    x = drawn("images")
    got = check_moments(x, torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool), regions=2)
    assert (got[0] == 0).all()


def test_what_is_not_finite_stays_in_its_channel():
    x = drawn("images")
    x[1, 3, 5] = float("nan")
    assert torch.isfinite(check_moments(x)[:, :, [0, 1, 2, *range(4, 11)]]).all()
    mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)
    mask[1, 5] = False
    assert torch.isfinite(check_moments(x, mask)).all()


def test_the_same_bits_each_time():
    x = drawn("images")
    assert torch.equal(channel_moments(x, None, True, 1), channel_moments(x, None, True, 1))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((name, torch.float32) for name in LAYOUTS), *(("tokens", d) for d in DTYPES[1:])],
)
def test_sums(layout, dtype):
    u, v, centre = drawn(layout, dtype), drawn(layout, dtype, 50.0), 50 + drawn(layout)[0, :, 0]
    got = channel_sums(u, v, centre, True)

    def composed(u, wide):
        d = v.to(wide) - centre.to(wide)[:, None]
        return (u.to(wide).sum((0, 2)), (u.to(wide) * d).sum((0, 2)), (d * d).sum((0, 2)))

    d = (v.double() - centre.double()[:, None]).abs()
    sizes = (u.double().abs(), u.double().abs() * d, d * d)
    eager, exact = composed(u, torch.float), composed(u, torch.double)
    for mine, theirs, truth, size in zip(got, eager, exact, sizes, strict=True):
        check_sums(mine, theirs, truth, size.sum((0, 2)))
    assert (channel_sums(u, v, None, False)[2] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((name, torch.float32) for name in LAYOUTS), *(("images", d) for d in DTYPES[1:])],
)
def test_affine(layout, dtype, masked):
    u, v = drawn(layout, dtype), drawn(layout, dtype)
    a, b, c, centre = torch.randn(4, 2, v.shape[1]).unbind()
    mask = mask_of(v) if masked else None
    given = (b, c, centre) if masked else (b[0], c[0], centre[0])
    got = channel_affine(u, v, a[0], *given, mask)
    assert got.stride() == v.stride()

    def composed(wide):
        both = torch.ones(v.shape[0], v.shape[2], dtype=torch.bool) if mask is None else mask
        b_, c_, centre_ = (
            torch.where(both[:, None], t[0, :, None], t[1, :, None]).to(wide)
            for t in (b, c, centre)
        )
        return (a[0].to(wide)[:, None] * u.to(wide) + b_ * (v.to(wide) - centre_) + c_).to(
            dtype if wide is torch.float else wide
        )

    assert_within_contract(got, composed(torch.float), composed(torch.double))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["tokens", "images"])
def test_batch_norm_and_its_gradients(layout, masked):
    """Moments and the affine map together, as a layer has them."""
    x = drawn(layout)
    weight, bias = torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])
    mask = mask_of(x) if masked else None
    probe = torch.randn(x.shape)

    def of_kernels(x, weight, bias):
        n, mean, m2 = channel_moments(x, mask, True, 1)[0].unbind()
        scale = weight * torch.rsqrt(m2 / n + 1e-5)
        return channel_affine(None, x, None, scale, bias, mean, None)

    def composed(x, weight, bias):
        n, mean, m2 = moments(x, mask, True, 1)[0].unbind()
        scale = weight * torch.rsqrt(m2 / n + 1e-5)
        return (x - mean[:, None]) * scale[:, None] + bias[:, None]

    def run(function, wide):
        leaves = [t.to(wide).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        return (y, *torch.autograd.grad((y * probe.to(wide)).sum(), leaves))

    got, eager = run(of_kernels, torch.float), run(composed, torch.float)
    exact = run(composed, torch.double)
    sizes = (exact[0].abs(), exact[1].abs(), *2 * [probe.double().abs().sum((0, 2))])
    for what, mine, theirs, truth, size in zip(
        ("y", "x", "weight", "bias"), got, eager, exact, sizes, strict=True
    ):
        check_sums(mine.detach(), theirs.detach(), truth.detach(), size.detach(), what)


@pytest.mark.parametrize("regions", [1, 2])
def test_gradient_of_the_moments_of_regions(regions):
    x, probe = drawn("images"), torch.randn(regions, 3, 11)
    mask = mask_of(x)

    def gradient(function, wide):
        leaf = x.detach().to(wide).requires_grad_()
        return torch.autograd.grad((function(leaf) * probe.to(wide))[:, 1:].sum(), leaf)[0]

    got = gradient(lambda t: channel_moments(t, mask, True, regions), torch.float)
    eager = gradient(lambda t: moments(t, mask, True, regions), torch.float)
    exact = gradient(lambda t: moments(t, mask, True, regions), torch.double)
    check_sums(got, eager, exact, exact.abs())


def test_the_operators_are_well_formed():
    x = drawn("rows").requires_grad_()
    b, c, centre = (torch.randn(7, requires_grad=True) for _ in range(3))
    torch.library.opcheck(channel_moments, (x, None, True, 1))
    torch.library.opcheck(channel_affine, (None, x, None, b, c, centre, None))
    torch.library.opcheck(channel_sums, (x.detach(), x.detach(), centre.detach(), True))


def test_a_gradient_that_there_is_none_of():
    x, b = drawn("rows").requires_grad_(), torch.randn(2, 7)
    with pytest.raises(NotImplementedError, match="neither u nor a mask"):
        channel_affine(None, x, None, b, None, None, mask_of(x))


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_any_dim_may_have_the_channels(dim):
    x = torch.randn(2, 3, 4, 5)
    viewed = by_channel(x, dim % 4)
    assert viewed.shape[1] == x.shape[dim]
    assert viewed.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    others = [d for d in range(4) if d != dim % 4]
    assert_within_contract(viewed.sum((0, 2)), x.sum(others), x.double().sum(others))
