"""The linear with a norm inside, in Triton's interpreter, beside the same in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import reference
from assertions import assert_within_contract

from normfx.kernels.generate import RowForm
from normfx.kernels.linear import DECODE_ROWS, norm_linear, tiling

pytestmark = pytest.mark.usefixtures("interpreter")

FLOAT32, HALVES = (torch.float32,), (torch.float16, torch.bfloat16)
RMS = RowForm("mean-square", centre=False)
LAYER = RowForm()
L2 = RowForm("sum-square", centre=False, eps_place="floor", eps=1e-12)
ACTIVATIONS = {
    "none": lambda h: h,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda h: F.gelu(h, approximate="tanh"),
}


def normalized(x: torch.Tensor, form: RowForm) -> torch.Tensor:
    """In the precision of x, whose statistics are taken in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if form.statistic == "variance":
        h = F.layer_norm(wide, wide.shape[-1:], eps=form.eps)
    elif form.statistic == "mean-square":
        h = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + form.eps)
    else:
        h = F.normalize(wide, dim=-1, eps=form.eps)
    return h.to(x.dtype)


def exactly(x: torch.Tensor, form: RowForm) -> torch.Tensor:
    if form.statistic == "variance":
        return reference.layer_norm(x, None, None, form.eps)
    if form.statistic == "mean-square":
        return reference.rms_norm(x, None, form.eps)
    return reference.l2_norm(x, form.eps)


def check(form: RowForm, x, weight, bias=None, residual=None) -> torch.Tensor:
    """Holds the kernel to the contract; gives its result.

    Products of float32 are summed in another order than eager's, which moves a result by rounding errors of the partial
    sums: one ulp is relative to the largest that these can be, the sum of sizes. In the halves the one rounding at the
    end is larger than all of that, and one ulp is that of the result.
    """
    got = norm_linear(x, weight, bias, residual, form.text)
    act = ACTIVATIONS[form.activation]
    eager = act(F.linear(normalized(x, form), weight, bias))
    exact = act(
        F.linear(exactly(x, form), weight.double(), None if bias is None else bias.double())
    )
    if residual is not None:
        eager, exact = eager + residual, exact + residual.double()
    sizes = F.linear(exactly(x, form).abs(), weight.double().abs())
    sizes = sizes[sizes.isfinite()]
    scale = sizes.max().item() if x.dtype is torch.float32 else None
    assert_within_contract(got, eager, exact, scale=scale)
    return got


def operands(rows: int, dtype: torch.dtype, cols: int = 200, outs: int = 50):
    weight = (torch.randn(outs, cols) / cols**0.5).to(dtype)
    return (
        torch.randn(rows, cols).to(dtype),
        weight,
        torch.randn(outs).to(dtype),
        torch.randn(rows, outs).to(dtype),
    )


@pytest.mark.parametrize("dtype", FLOAT32 + HALVES)
@pytest.mark.parametrize("form", [RMS, LAYER, L2], ids=["rms", "layer", "l2"])
@pytest.mark.parametrize("rows", [1, DECODE_ROWS, DECODE_ROWS + 3])
def test_agrees_with_float64(form, dtype, rows):
    x, weight, bias, residual = operands(rows, dtype)
    check(form, x, weight, bias, residual)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_come_before_the_residual(activation):
    x, weight, bias, residual = operands(3, torch.float32)
    check(RowForm("mean-square", centre=False, activation=activation), x, weight, bias, residual)


@pytest.mark.parametrize("form", [RMS, LAYER], ids=["rms", "layer"])
def test_more_tiles_than_one_group(form):
    """More rows than GROUP_M tiles hold, and a last group that is lower."""
    tile = tiling(1000, 4)
    x, weight, bias, _ = operands(tile.block_m * tile.group_m + 5, torch.float32, 40, 70)
    check(form, x, weight, bias)


@pytest.mark.parametrize("dtype", FLOAT32 + HALVES)
@pytest.mark.parametrize("form", [RMS, LAYER], ids=["rms", "layer"])
def test_large_mean_and_tiny_variance(form, dtype):
    x, weight, bias, _ = operands(4, dtype)
    x = (100 + 0.5 * x.float()).to(dtype)
    check(form, x, weight, bias)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", [RMS, LAYER, L2], ids=["rms", "layer", "l2"])
def test_one_outlier_in_a_row(form, dtype):
    """Its first element: a mean that is estimated from it would cancel."""
    x, weight, bias, _ = operands(3, dtype)
    x[:, 0] = 500.0
    check(form, x, weight, bias)


@pytest.mark.parametrize("form", [RMS, LAYER], ids=["rms", "layer"])
def test_squares_that_float16_does_not_hold(form):
    x, weight, bias, _ = operands(3, torch.float16)
    x = (x.float().clamp(-3, 3) * 2e4).half()
    assert torch.isinf(x * x).any()
    check(form, x, weight, bias)


@pytest.mark.parametrize("form", [RMS, LAYER, L2], ids=["rms", "layer", "l2"])
def test_rows_of_zeros_and_rows_that_eps_dominates(form):
    x, weight, bias, _ = operands(4, torch.float32)
    x[0] = 0.0
    x[1] *= 1e-12
    check(form, x, weight, bias)


@pytest.mark.parametrize("form", [RMS, LAYER], ids=["rms", "layer"])
def test_one_column_and_one_output(form):
    x, weight, bias, _ = operands(3, torch.float32, 1, 1)
    check(form, x, weight, bias)


@pytest.mark.parametrize("form", [RMS, LAYER], ids=["rms", "layer"])
def test_strides(form):
    x, weight, bias, residual = operands(5, torch.float32)
    wide = torch.randn(5, 2 * x.shape[1])
    assert not wide[:, ::2].is_contiguous()
    check(form, wide[:, ::2], weight, bias)
    check(form, wide[:, 7 : 7 + x.shape[1]], weight, bias)
    check(form, x, weight.t().contiguous().t(), bias, residual.t().contiguous().t())


def test_no_rows_and_no_outputs():
    x, weight, bias, _ = operands(3, torch.float32)
    assert norm_linear(x[:0], weight, bias, None, RMS.text).shape == (0, 50)
    assert norm_linear(x, weight[:0], bias[:0], None, RMS.text).shape == (3, 0)


@pytest.mark.parametrize("form", [RMS, LAYER], ids=["rms", "layer"])
def test_what_is_not_finite_stays_in_its_row(form):
    x, weight, bias, _ = operands(3, torch.float32)
    x[0, 3], x[2, 5] = float("nan"), float("inf")
    got = check(form, x, weight, bias)
    assert torch.isfinite(got[1]).all()


@pytest.mark.parametrize("form", [RMS, LAYER], ids=["rms", "layer"])
def test_a_row_does_not_depend_on_the_others(form):
    """Within a tiling, and for both of its ends."""
    for first, last in ((1, DECODE_ROWS), (DECODE_ROWS + 1, 2 * DECODE_ROWS)):
        x, weight, bias, _ = operands(last, torch.float32)
        few = norm_linear(x[:first], weight, bias, None, form.text)
        assert torch.equal(few, norm_linear(x, weight, bias, None, form.text)[:first])


@pytest.mark.parametrize(
    "form",
    [RMS, RowForm(activation="gelu"), L2],
    ids=["rms", "layer, gelu", "l2"],
)
def test_gradients(form):
    given = operands(5, torch.float32, 60, 20)
    probe = torch.randn(5, 20)

    def gradients(function, widen):
        leaves = [t.to(torch.float64 if widen else t.dtype).requires_grad_() for t in given]
        out = function(*leaves)
        return torch.autograd.grad((out * probe.to(out.dtype)).sum(), leaves)

    act = ACTIVATIONS[form.activation]

    def composed(x, weight, bias, residual):
        return act(F.linear(normalized(x, form), weight, bias)) + residual

    got = gradients(lambda *leaves: norm_linear(*leaves, form.text), False)
    eager, exact = gradients(composed, False), gradients(composed, True)
    for name, mine, theirs, truth in zip(
        ("x", "weight", "bias", "residual"), got, eager, exact, strict=True
    ):
        # sums of products in another order: see `check`; here at most 20 of them, of numbers of size one
        assert_within_contract(mine, theirs, truth, scale=20.0, what=f"gradient at {name}")


def test_the_operator_is_well_formed():
    x, weight, bias, residual = (t.requires_grad_() for t in operands(3, torch.float32, 20, 6))
    torch.library.opcheck(norm_linear, (x, weight, bias, residual, RMS.text))


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (RowForm("compressed", centre=False), "a sum beside its squares"),
        (RowForm("mean-square", centre=True), "a mean that the statistic does not have"),
        (RowForm(gate="after"), "a gate"),
        (RowForm(quantise="int8"), "a quantised result"),
    ],
)
def test_forms_that_are_refused(form, reason):
    x, weight, _, _ = operands(2, torch.float32)
    with pytest.raises(ValueError, match=reason):
        norm_linear(x, weight, None, None, form.text)
