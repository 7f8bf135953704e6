"""The row kernels against float64: the same checks in the interpreter and on a device."""

from __future__ import annotations

from dataclasses import replace

import torch
from assertions import assert_within_contract
from reference import ACTIVATIONS, row_norm
from torch import Tensor

from normfx.kernels.generate import RowForm, dtype_of
from normfx.ops import NormSpec, norm

FORMS = {
    "layer-norm": RowForm(),
    "unbiased": RowForm(correction=1, eps_place="outside"),
    "rms-norm": RowForm("mean-square", centre=False),
    "rms-norm-floor": RowForm("mean-square", centre=False, eps_place="floor-inside", eps=1e-3),
    "crms-norm": RowForm("compressed", centre=False),
    "srms-norm": RowForm("mean-square", centre=False, scale=0.5, eps_place="floor", eps=1e-8),
    "l2-norm": RowForm("sum-square", centre=False, eps_place="floor", eps=1e-12),
    "centred-mean-square": RowForm("mean-square", centre=True),
    "offset": RowForm("mean-square", centre=False, weight_offset=1.0),
    "gelu": RowForm(activation="gelu"),
    "gelu-tanh": RowForm(activation="gelu-tanh"),
    "relu": RowForm("mean-square", centre=False, activation="relu"),
    "sigmoid": RowForm("mean-square", centre=False, activation="sigmoid"),
    "gate-before": RowForm("mean-square", centre=False, gate="before"),
    "gate-after": RowForm("mean-square", centre=False, gate="after", activation="silu"),
    "swish": RowForm(gate="swish"),
}

# Rows that a careless kernel gets wrong: each kind alone, so that one does not hide in the size of another.
KINDS = {
    "plain": lambda x: x,
    "large-mean": lambda x: 1000 + x,  # a variance of one, a millionth of the mean's square
    "zero": lambda x: 0 * x,
    "constant": lambda x: 0 * x + 3,
    "below-eps": lambda x: 1e-4 * x,
    "overflowing": lambda x: 2e4 * x.clamp(-3, 3),  # its square is no float16
}


def operands(form: RowForm, kind: str, rows: int, cols: int, dtype: torch.dtype, device: str):
    """(x, gate, weight, bias), by a seed of their own."""
    generator = torch.Generator().manual_seed(rows + cols)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = KINDS[kind](numbers(rows, cols))
    gates = {"none": None, "swish": numbers(cols)}
    gate = gates.get(form.gate, numbers(rows, cols))
    weight, bias = 1 + 0.3 * numbers(cols), 0.3 * numbers(cols)
    return [t if t is None else t.to(device, dtype) for t in (x, gate, weight, bias)]


def exactly(form: RowForm, x, gate, weight, bias) -> Tensor:
    """The float64 result."""
    weight = None if weight is None else weight.double() + form.weight_offset
    return row_norm(
        x,
        weight,
        bias,
        gate,
        statistic=form.statistic,
        centre=form.centre,
        correction=form.correction,
        eps=form.eps,
        eps_place=form.eps_place,
        scale=form.scale,
        activation=form.activation,
        gate_place=form.gate,
    )


def eagerly(form: RowForm, x, gate, weight, bias) -> Tensor:
    """What a model with the canonical operation computes in the dtype of x."""
    out_dtype = dtype_of(form.out_dtype) if form.out_dtype else x.dtype
    spec = NormSpec(
        "",
        dims=(1,),
        statistic=form.statistic,
        centre=form.centre,
        correction=form.correction,
        eps=form.eps,
        eps_place=form.eps_place,
        scale=form.scale,
        norm_dtype=dtype_of(form.norm_dtype),
        out_dtype=out_dtype,
    )
    if form.gate == "before":
        x = x * torch.nn.functional.silu(gate)
    if weight is not None and form.weight_offset:
        weight = weight.float() + form.weight_offset
    swish = gate if form.gate == "swish" else None
    y = ACTIVATIONS[form.activation](norm(x, weight, bias, gate=swish, spec=spec, rank=2))
    return y * torch.nn.functional.silu(gate) if form.gate == "after" else y


def gradients(function, form: RowForm, given, probe: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The result, and the gradients of sum(result * probe) at what is given."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in given]
    y = function(form, *leaves)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, wanted, probe.to(y.dtype), allow_unused=True))
    return y.detach(), [None if t is None else next(found) for t in leaves]


def by_kernel(form: RowForm, x, gate, weight, bias) -> Tensor:
    return torch.ops.normfx.row_norm(x, gate, weight, bias, form.text)[0]


def check(
    form: RowForm, kind: str, rows: int, cols: int, dtype=torch.float32, device="cpu"
) -> None:
    """Holds the result and all gradients of a kernel to the contract."""
    given = operands(form, kind, rows, cols, dtype, device)
    probe = torch.randn(rows, cols, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    wide = [t if t is None else t.double() for t in given]
    got, mine = gradients(by_kernel, form, given, probe)
    eager, theirs = gradients(eagerly, form, given, probe)
    exact, truth = gradients(exactly, form, wide, probe)
    assert_within_contract(got, eager, exact, what="y")
    if kind == "zero" and form.eps_place in ("floor", "outside"):
        # the square root that eager takes has no slope at zero; the kernel has the gradient of F.normalize there
        theirs[0] = theirs[0].nan_to_num(0.0)
    scale = sizes_of_terms(form, given, probe)
    for name, a, b, c, size in zip(
        ("x", "gate", "weight", "bias"), mine, theirs, truth, scale, strict=True
    ):
        if a is not None:
            assert_within_contract(a, b, c, scale=size, what=f"d{name}")


def sizes_of_terms(form: RowForm, given, probe: Tensor) -> list[float | None]:
    """What one ulp of each gradient is relative to.

    Gradients are sums, whose terms cancel: rounding leaves an error relative to the terms. At x a term is
    g * weight * scale / root, at the weight there are as many as rows, g * normal.
    """
    x, gate, weight, bias = given
    n = x.shape[1]
    h = x.double()
    spread = h - h.mean(1, keepdim=True) if form.statistic == "variance" else h
    square = spread.square().sum(1) / (1 if form.statistic == "sum-square" else n)
    root = (square + form.eps).sqrt() if "inside" in form.eps_place else square.sqrt() + form.eps
    largest = 1.0 if weight is None else (weight.double().abs().max().item() + form.weight_offset)
    at_x = (form.scale / root).max().item() * largest * probe.abs().max().item()
    swish = form.gate == "swish"
    plain = replace(form, activation="none", gate="swish" if swish else "none")
    normal = exactly(plain, x, gate if swish else None, None, None)
    at_weight = (probe.double() * normal).abs().sum(0).max().item()
    at_bias = probe.double().abs().sum(0).max().item()
    y = exactly(replace(form, gate="none"), x, None, weight, bias)
    at_gate = at_weight if swish else (probe.abs().max() * y.abs().max()).item()
    if form.gate == "before":
        at_gate = at_x * x.abs().max().item()
    return [at_x, at_gate, at_weight, at_bias]


def check_quantised(form: RowForm, rows: int, cols: int, device: str = "cpu") -> None:
    """Holds q * scale to half a step of the eight-bit dtype, and scales to the largest value of their block.

    int8: a step is one scale. e4m3 has three bits of fraction: half a step is 2^-4 of the value, and not less than
    2^-10 of a scale, where it is subnormal. To that comes what float32 rounds before: q was nearly between two values.
    """
    x, gate, weight, bias = operands(form, "plain", rows, cols, torch.float32, device)
    q, scale = torch.ops.normfx.row_norm_quantised(x, gate, weight, bias, form.text)
    assert q.dtype == dtype_of(form.quantise)
    exact = exactly(form, x, gate, weight, bias)
    block = form.block or cols
    assert scale.shape == (rows, -(-cols // block))
    each = scale.double().repeat_interleave(block, 1)[:, :cols]
    largest = torch.stack([part.abs().amax(1) for part in exact.split(block, 1)], 1)
    limit = 127.0 if form.quantise == "int8" else 448.0
    slack = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert ((scale.double() * limit - largest).abs() <= slack).all()
    half_step = each / 2 if form.quantise == "int8" else (exact.abs() / 16).clamp_min(each / 2**10)
    assert ((q.double() * each - exact).abs() <= half_step + slack).all()
