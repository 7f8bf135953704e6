"""The row kernels in Triton's interpreter: forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
from row_cases import FORMS, KINDS, by_kernel, check, check_quantised, operands

from normfx.kernels import kernels
from normfx.kernels.generate import RowForm

pytestmark = pytest.mark.usefixtures("interpreter", "operators")


# The interpreter takes a millisecond for each line of a chunk: of the forms, one of each code path.
LONG = ["layer-norm", "crms-norm", "l2-norm", "gelu", "gate-before", "gate-after", "swish"]


@pytest.fixture
def operators(interpreter):
    kernels()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
def test_rows_in_registers(name, kind):
    check(FORMS[name], kind, rows=37, cols=24)


@pytest.mark.parametrize("path", ["looped", "split"])
@pytest.mark.parametrize("name", LONG)
def test_long_rows(name, path, short_rows):
    """60 columns: chunks of 32 with a part of one at the end, and splits of 32."""
    short_rows(path)
    check(FORMS[name], "large-mean" if FORMS[name].centre else "plain", rows=6, cols=60)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, kind):
    check(FORMS["layer-norm"], kind, rows=37, cols=24, dtype=dtype)


@pytest.mark.parametrize("path", ["looped", "split"])
def test_long_rows_of_sixteen_bits(path, short_rows):
    short_rows(path)
    check(FORMS["layer-norm"], "large-mean", rows=6, cols=60, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_dtype", ["float32", "own"])
def test_where_the_normalized_value_is_rounded(norm_dtype, dtype):
    """As the model does: before the weight, or once at the end."""
    name = str(dtype).removeprefix("torch.") if norm_dtype == "own" else norm_dtype
    check(RowForm("mean-square", centre=False, norm_dtype=name), "plain", 9, 24, dtype)


@pytest.mark.parametrize("path", ["persistent", "looped"])
@pytest.mark.parametrize("name", ["rms-norm", "l2-norm", "layer-norm"])
def test_one_column(name, path, short_rows):
    short_rows(path)
    check(FORMS[name], "plain", rows=5, cols=1)


@pytest.mark.parametrize("path", ["persistent", "looped", "split"])
def test_no_rows(path, short_rows):
    short_rows(path)
    x = torch.randn(0, 24, requires_grad=True)
    weight = torch.randn(24, requires_grad=True)
    y = torch.ops.normfx.row_norm(x, None, weight, None, "{}")[0]
    assert y.shape == (0, 24)
    y.sum().backward()
    assert x.grad.shape == (0, 24)
    assert torch.equal(weight.grad, torch.zeros(24))


@pytest.mark.parametrize("path", ["persistent", "looped", "split"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.repeat(1, 2)[:, : x.shape[1]],
        lambda x: x.t().contiguous().t(),
        lambda x: x[:, :1].expand(x.shape),
    ],
    ids=["rows apart", "transposed", "expanded"],
)
def test_rows_that_are_not_dense(view, path, short_rows):
    """The result is dense, and the bits are those of a dense input."""
    short_rows(path)
    x, _, weight, bias = operands(RowForm(), "plain", 5, 60, torch.float32, "cpu")
    x = view(x)
    dense = x.contiguous()
    got = torch.ops.normfx.row_norm(x, None, weight, bias, "{}")
    expected = torch.ops.normfx.row_norm(dense, None, weight, bias, "{}")
    assert got[0].is_contiguous()
    dy = view(torch.randn(5, 60))
    back = [
        torch.ops.normfx.row_norm_backward(d, d, t, None, weight, bias, *out[1:], "{}")
        for t, d, out in ((x, dy, got), (dense, dy.contiguous(), expected))
    ]
    for mine, theirs in zip((*got, *back[0]), (*expected, *back[1]), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(special):
    x, _, weight, bias = operands(RowForm(), "plain", 4, 24, torch.float32, "cpu")
    clean = by_kernel(RowForm(), x, None, weight, bias)
    x[1, 3] = special
    y = by_kernel(RowForm(), x, None, weight, bias)
    assert torch.isnan(y[1]).all()  # as eager has it: the mean of the row is not finite
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("path", ["persistent", "looped", "split"])
def test_a_row_does_not_depend_on_its_batch(path, short_rows):
    """The same bits alone, and in any place of any batch, forward and backward."""
    short_rows(path)
    x, _, weight, bias = operands(RowForm(), "large-mean", 7, 60, torch.float32, "cpu")
    dy = torch.randn(7, 60)

    def run(part):
        y, mean, square = torch.ops.normfx.row_norm(x[part], None, weight, bias, "{}")
        dx = torch.ops.normfx.row_norm_backward(
            dy[part], None, x[part], None, weight, bias, mean, square, "{}"
        )[0]
        return y, dx

    whole = run(slice(None))
    for part in (slice(0, 1), slice(4, 5), slice(1, 6)):
        for mine, theirs in zip(run(part), whole, strict=True):
            assert torch.equal(mine, theirs[part])


def test_gradients_of_weights_are_the_same_bits_each_run():
    given = operands(RowForm(), "plain", 67, 24, torch.float32, "cpu")
    x, _, weight, bias = given
    _, mean, square = torch.ops.normfx.row_norm(x, None, weight, bias, "{}")
    runs = [
        torch.ops.normfx.row_norm_backward(x, None, x, None, weight, bias, mean, square, "{}")
        for _ in range(2)
    ]
    for mine, theirs in zip(*runs, strict=True):
        assert torch.equal(mine, theirs)


# -- residual ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["persistent", "looped", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual(dtype, path, short_rows):
    """The sum has the bits of eager's, and the norm those of the norm of that sum; so do the gradients."""
    short_rows(path)
    x, _, weight, bias = operands(RowForm(), "large-mean", 3, 60, dtype, "cpu")
    residual = torch.randn(3, 60).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    y, stream, *_ = torch.ops.normfx.add_row_norm(*leaves[:2], None, *leaves[2:], "{}")
    assert torch.equal(stream, x + residual)
    dy, dstream = torch.randn(2, 3, 60).to(dtype)
    got = torch.autograd.grad((y, stream), leaves, (dy, dstream))
    total = (x + residual).requires_grad_()
    others = [t.clone().requires_grad_() for t in (weight, bias)]
    expected = torch.ops.normfx.row_norm(total, None, *others, "{}")[0]
    assert torch.equal(y, expected)
    dx, *rest = torch.autograd.grad(expected, [total, *others], dy)
    if dtype == torch.float32:  # in sixteen bits the kernel rounds their sum once, this one twice
        assert torch.equal(got[0], dx + dstream)
    assert torch.equal(got[0], got[1])
    for mine, theirs in zip(got[2:], rest, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_of_the_two_results_is_used(used):
    x = torch.randn(3, 8, requires_grad=True)
    residual = torch.randn(3, 8, requires_grad=True)
    results = torch.ops.normfx.add_row_norm(x, residual, None, None, None, "{}")
    results[used].square().sum().backward()
    total = (x + residual).detach().requires_grad_()
    other = total if used else torch.ops.normfx.row_norm(total, None, None, None, "{}")[0]
    other.square().sum().backward()
    assert torch.equal(x.grad, residual.grad)
    assert torch.equal(x.grad, total.grad)


def test_a_gate_before_the_norm_and_a_residual_is_an_error():
    x = torch.randn(2, 8)
    form = RowForm(gate="before").text
    with pytest.raises(ValueError, match="a gate before the norm does not go with a residual"):
        torch.ops.normfx.add_row_norm(x, x, x, None, None, form)


@pytest.mark.parametrize("path", ["persistent", "looped", "split"])
@pytest.mark.parametrize("name", ["rms-norm", "l2-norm", "crms-norm", "srms-norm"])
def test_the_scale_of_a_row_alone(name, path, short_rows):
    """What `defer-scale` takes: with it, stream * factor has the bits of the norm, but for one rounding."""
    short_rows(path)
    x, residual = torch.randn(2, 3, 60)
    stream, factor = torch.ops.normfx.add_row_scale(x, residual, FORMS[name].text)
    assert torch.equal(stream, x + residual)
    assert factor.dtype == torch.float32
    y = torch.ops.normfx.row_norm(x + residual, None, None, None, FORMS[name].text)[0]
    assert ((stream * factor[:, None] - y).abs() <= torch.finfo(torch.float32).eps * y.abs()).all()


# -- quantised -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("path", "block"),
    [("persistent", 0), ("persistent", 8), ("looped", 0), ("looped", 8), ("split", 8)],
)
def test_quantised(dtype, path, block, short_rows):
    short_rows(path)
    check_quantised(RowForm(quantise=dtype, block=block), 3, 60)


def test_a_split_row_with_one_scale_is_an_error(short_rows):
    short_rows("split")
    form = RowForm(quantise="int8").text
    with pytest.raises(ValueError, match="one scale for a row of 100 columns"):
        torch.ops.normfx.row_norm_quantised(torch.randn(2, 100), None, None, None, form)


def test_quantised_rows_of_zeros_have_a_scale():
    form = RowForm(quantise="int8").text
    q, scale = torch.ops.normfx.row_norm_quantised(torch.zeros(2, 24), None, None, None, form)
    assert not q.any()
    assert torch.equal(scale, torch.ones(2, 1))


def test_quantised_sum():
    x, residual = torch.randn(2, 5, 24)
    form = RowForm(quantise="int8", block=8).text
    q, scale, stream = torch.ops.normfx.add_row_norm_quantised(x, residual, None, None, None, form)
    expected = torch.ops.normfx.row_norm_quantised(x + residual, None, None, None, form)
    assert torch.equal(stream, x + residual)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
