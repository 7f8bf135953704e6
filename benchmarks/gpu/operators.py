"""The operators of normfx, and who else computes the same: correctness, bandwidth, products."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.devices import Device
from benchmarks.gpu.rows import Table
from benchmarks.gpu.timing import Bench
from benchmarks.work import Work, norm_linear, row_norm, row_norm_backward
from normfx.kernels.generate import RowForm

LAYER, RMS = RowForm(eps=1e-5), RowForm("mean-square", centre=False, eps=1e-6)
FORMS = {"LayerNorm": LAYER, "RMSNorm": RMS}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured: shapes, and how long.

    Attributes:
        checked: rows and columns of the correctness section.
        rows: of the bandwidth section.
        cols: of the bandwidth section.
        few: rows of the products.
        widths: (model, columns, outputs) of the products.
        copied_megabytes: of the copy whose bandwidth is the measure.
    """

    checked: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    few: tuple[int, ...]
    widths: tuple[tuple[str, int, int], ...]
    copied_megabytes: int


FULL = Sizes(
    checked=((33, 1), (257, 768), (64, 4096), (8, 40000), (3, 100000)),
    rows=(4096, 16384, 65536),
    cols=(1024, 4096, 8192, 32768),
    few=(1, 4, 16, 64, 512, 4096),
    widths=(
        ("Llama-3-8B qkv", 4096, 6144),
        ("Llama-3-8B gate-up", 4096, 28672),
        ("GPT-2 qkv", 768, 2304),
        ("ViT-B mlp", 768, 3072),
    ),
    copied_megabytes=1024,
)
TINY = Sizes(
    checked=((5, 1), (4, 40)),
    rows=(8,),
    cols=(32, 64),
    few=(1, 20),
    widths=(("tiny", 32, 48),),
    copied_megabytes=1,
)
# No model has a wider product with a norm inside.
WIDEST_PRODUCT = 50000
# Where the rows times the columns are more than this, a tensor would be 4 GB in bfloat16.
MOST_ELEMENTS = 2**31


def normal(x: Tensor, weight: Any, bias: Any, form: RowForm) -> Tensor:
    """The norm in plain torch, with statistics in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if form.centre:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + form.eps)
    wide = wide if weight is None else wide * weight.to(wide.dtype)
    return (wide if bias is None else wide + bias.to(wide.dtype)).to(x.dtype)


# ------------------------------------------------------------------------- correctness


def correctness(table: Table, device: str, sizes: Sizes) -> None:
    """Every operator against float64, on inputs that a careless kernel gets wrong.

    One row for each operator and dtype, and one more for each case that is wrong.
    """
    worst: dict[str, list[float]] = {}

    def check(case: str, candidate: str, judge: Callable[[], Verdict]) -> None:
        found = table.attempt(case, candidate, judge)
        if found is None:
            return
        worst.setdefault(candidate, []).append(found.ratio)
        if found.ratio > 1:
            note = f"WRONG at {found.where}: {found.ratio:.2f} of the allowed error"
            table.add(case, candidate, note=note, more={"ratio": found.ratio})

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for form_name, form in FORMS.items():
            for kind in ("plain", "large mean", "zero rows"):
                for rows, cols in sizes.checked:
                    case = f"{form_name} {rows} x {cols} {kind}"
                    x = _drawn(rows, cols, kind, dtype, device)
                    check(case, f"row_norm {name}", partial(_rows_agree, x, form))
                    check(case, f"add_row_* {name}", partial(_sums_agree, x, form))
                    check(case, f"row_norm_quantised {name}", partial(_eighths_agree, x, form))
                    if cols < WIDEST_PRODUCT:
                        check(case, f"norm_linear {name}", partial(_products_agree, x, form))
        for layout in ("tokens", "images"):
            check(layout, f"channels {name}", partial(_channels_agree, layout, dtype, device))
    for candidate, ratios in worst.items():
        right = sum(ratio <= 1 for ratio in ratios)
        note = f"{right} of {len(ratios)} right, at worst {max(ratios):.2f} of the allowed error"
        table.add("forward and backward", candidate, note=note, more={"ratios": ratios})


def _drawn(rows: int, cols: int, kind: str, dtype: torch.dtype, device: str) -> Tensor:
    torch.manual_seed(rows + cols)
    x = torch.randn(rows, cols, device=device)
    if kind == "large mean":
        x = x + 100
    if kind == "zero rows":
        x[::2] = 0
    return x.to(dtype)


class Verdict(NamedTuple):
    """The largest error over what is allowed: twice eager's, or one ulp; and of which tensor."""

    ratio: float
    where: str


def _verdict(found: list[tuple[str, Tensor, Tensor, Tensor, float]]) -> Verdict:
    """The worst error beside what is allowed, of (name, got, eager, exact, size of an ulp's)."""
    worst, which = 0.0, ""
    for name, got, eager, exact, size in found:
        error, theirs = (
            (t.double() - exact).abs().max().item() if t.numel() else 0.0 for t in (got, eager)
        )
        allowed = max(2 * theirs, torch.finfo(got.dtype).eps * size)
        ratio = error / allowed if allowed else float(error > 0)
        if not ratio <= worst:  # a NaN is the worst
            worst, which = (math.inf if math.isnan(ratio) else ratio), name
    return Verdict(worst, which)


def _rows_agree(x: Tensor, form: RowForm) -> Verdict:
    from normfx.kernels.row import row_norm as operator

    cols, dtype = x.shape[1], x.dtype
    weight, bias = (torch.rand(cols, device=x.device).to(dtype) + 0.5 for _ in range(2))
    probe = torch.randn(x.shape, device=x.device)

    def run(function: Callable[..., Tensor], wide: torch.dtype | None) -> list[Tensor]:
        leaves = [t.to(wide or dtype).detach().requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        gradients = torch.autograd.grad((y * probe.to(y.dtype)).sum(), leaves)
        return [y.detach(), *gradients]

    got = run(lambda *leaves: operator(leaves[0], None, *leaves[1:], form.text)[0], None)
    eager = run(lambda *leaves: normal(*leaves, form), None)
    exact = run(lambda *leaves: normal(*leaves, form), torch.float64)
    names = ("y", "dx", "dweight", "dbias")
    # the gradients of weight and bias are sums over all rows, in another order than eager's
    summed = probe.double().abs().sum(0).max().item() * max(1.0, exact[0].abs().max().item())
    # dx is a difference, of one column even zero: an ulp is that of the gradient before it
    wide = x.double() - x.double().mean(1, keepdim=True) if form.centre else x.double()
    factor = torch.rsqrt(wide.square().mean(1, keepdim=True) + form.eps)
    before = (probe.double() * weight.double() * factor).abs().max().item()
    largest = [exact[0].abs().max().item(), before, summed, summed]
    return _verdict(list(zip(names, got, eager, exact, largest, strict=True)))


def _sums_agree(x: Tensor, form: RowForm) -> Verdict:
    """With a residual: the norm of the sum, the sum, and the factor of its rows."""
    from normfx.kernels.row import add_row_norm, add_row_scale

    residual = torch.randn(x.shape, device=x.device).to(x.dtype)

    def composed(x: Tensor, residual: Tensor) -> list[Tensor]:
        stream = x + residual
        wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
        wide = wide - wide.mean(1, keepdim=True) if form.centre else wide
        factor = torch.rsqrt(wide.square().mean(1) + form.eps)
        return [normal(stream, None, None, form), stream, factor]

    y, stream, *_ = add_row_norm(x, residual, None, None, None, form.text)
    got = [y, stream, add_row_scale(x, residual, form.text)[1]]
    eager, exact = composed(x, residual), composed(x.double(), residual.double())
    sizes = [t.abs().max().item() for t in exact]
    names = ("y", "stream", "factor")
    return _verdict(list(zip(names, got, eager, exact, sizes, strict=True)))


def _eighths_agree(x: Tensor, form: RowForm) -> Verdict:
    """In int8 with a scale a row: half a step from what eager's error allows."""
    from normfx.kernels.row import row_norm_quantised

    q, scale = row_norm_quantised(x, None, None, None, replace(form, quantise="int8").text)
    eager, exact = (normal(t, None, None, form) for t in (x, x.double()))
    theirs = (eager.double() - exact).abs().amax(1)
    ulp = torch.finfo(x.dtype).eps * exact.abs().amax(1)
    step = scale[:, 0].double()
    allowed = torch.maximum(2 * theirs, ulp) + 0.5 * step * (1 + 1e-6)
    error = (q.double() * step[:, None] - exact).abs().amax(1)
    return Verdict((error / allowed).nan_to_num(nan=math.inf).max().item(), "q")


def _products_agree(x: Tensor, form: RowForm) -> Verdict:
    from normfx.kernels.linear import norm_linear as operator

    rows, cols = x.shape
    weight = (torch.randn(72, cols, device=x.device) / cols**0.5).to(x.dtype)
    bias = torch.randn(72, device=x.device).to(x.dtype)
    residual = torch.randn(rows, 72, device=x.device).to(x.dtype)
    given = (weight, bias, residual)

    def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.gelu(F.linear(normal(x, None, None, form), weight, bias)) + residual

    got = operator(x, *given, replace(form, activation="gelu").text)
    exact = composed(x.double(), *(t.double() for t in given))
    sizes = F.linear(normal(x.double(), None, None, form).abs(), weight.double().abs())
    size = sizes.max().item() if x.dtype is torch.float32 else exact.abs().max().item()
    return _verdict([("y", got, composed(x, *given), exact, size)])


def _channels_agree(layout: str, dtype: torch.dtype, device: str) -> Verdict:
    from normfx.kernels.channel import by_channel, channel_affine, channel_moments, channel_sums

    torch.manual_seed(0)
    shape, dim = ((7, 301, 70), 2) if layout == "tokens" else ((5, 33, 17, 19), 1)
    x = by_channel((torch.randn(shape, device=device) + 30).to(dtype), dim)
    u = by_channel(torch.randn(shape, device=device).to(dtype), dim)
    mean = x.double().mean((0, 2))

    def composed(wide: torch.dtype) -> list[Tensor]:
        v, d = x.to(wide), u.to(wide)
        about = (v - mean.to(wide)[:, None]).square().sum((0, 2))
        product = (d * (v - mean.to(wide)[:, None])).sum((0, 2))
        return [v.mean((0, 2)), about, product, (v - mean.to(wide)[:, None]) * 2]

    moments = channel_moments(x, None, True, 1)[0]
    sums = channel_sums(u, x, mean.float(), False)
    two = torch.full_like(mean, 2.0).float()
    y = channel_affine(None, x, None, two, None, mean.float(), None)
    got = [moments[1], moments[2], sums[1], y]
    eager, exact = composed(torch.float32), composed(torch.float64)
    eager[3] = eager[3].to(dtype)
    # sums in another order than eager's: some ten roundings of the sum of sizes, half an ulp each
    sizes = [5 * t.abs().max().item() for t in exact[:2]]
    sizes += [5 * (u.double() * (x.double() - mean[:, None])).abs().sum((0, 2)).max().item()]
    sizes += [exact[3].abs().max().item()]
    names = ("mean", "m2", "sum", "affine")
    return _verdict(list(zip(names, got, eager, exact, sizes, strict=True)))


# ------------------------------------------------------------------------- bandwidth


def bandwidth(
    table: Table, bench: Bench, sizes: Sizes, peak: Device | None, compiler: Callable[..., Any]
) -> None:
    """Forward and backward of a LayerNorm and an RMSNorm, beside a copy of as many bytes."""
    copied = table.attempt("copy", "", lambda: bench.copy_bandwidth(sizes.copied_megabytes))
    if copied:
        table.add("copy", f"{sizes.copied_megabytes} MiB", note=f"{copied / 1e9:.0f} GB/s")
    shapes = [(r, c) for r in sizes.rows for c in sizes.cols if r * c <= MOST_ELEMENTS // 2]
    # the middle of the sizes first: what is cut off by the clock are the ends
    shapes.sort(key=lambda shape: abs(shape[0] * shape[1] - 16384 * 4096))
    for rows, cols in shapes:
        for form_name, form in FORMS.items():
            for backward in (False, True):
                if table.left_s() <= 0:
                    case = f"{form_name} {rows} x {cols}"
                    table.add(case, "", note="not run: out of time")
                    continue
                _bandwidth_of(
                    table, bench, form_name, form, rows, cols, backward, peak, copied, compiler
                )


def _bandwidth_of(
    table: Table,
    bench: Bench,
    form_name: str,
    form: RowForm,
    rows: int,
    cols: int,
    backward: bool,
    peak: Device | None,
    copied: float | None,
    compiler: Callable[..., Any],
) -> None:
    case = f"{form_name} {rows} x {cols} {'backward' if backward else 'forward'}"
    make = {"device": bench.device, "dtype": torch.bfloat16}
    x, weight = torch.randn(rows, cols, **make), torch.rand(cols, **make)
    bias = torch.rand(cols, **make) if form.centre else None
    probe = torch.randn(rows, cols, **make)
    leaves = [t for t in (x, weight, bias) if t is not None]
    if backward:
        leaves = [t.requires_grad_() for t in leaves]

    def call(function: Callable[..., Tensor]) -> Callable[[], object]:
        y = function(*leaves)
        if not backward:
            return lambda: function(*leaves)
        return lambda: torch.autograd.grad(y, leaves, probe, retain_graph=True)

    calls: dict[str, Callable[[], object]] = {}
    for name, maker in _candidates(form_name, form, compiler).items():
        made = table.attempt(case, name, lambda m=maker: call(m()))
        if made is not None and table.attempt(case, name, lambda c=made: (c(), True)[1]):
            calls[name] = made
    pair = (row_norm_backward if backward else row_norm)(rows, cols)
    work: Work = pair.after
    for name, us in bench.medians_us(calls).items() if calls else ():
        rate = work.bytes / us * 1e6
        note = f"{rate / 1e9:.0f} GB/s" + (f", {rate / copied:.2f} of copy" if copied else "")
        floor = None if peak is None else peak.floor_us(work.bytes)
        table.add(case, name, us=us, floor_us=floor, note=note)


def _candidates(
    form_name: str, form: RowForm, compiler: Callable[..., Any]
) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Who computes a norm: each as a function that gives the function, as imports may fail."""

    def ours() -> Callable[..., Tensor]:
        from normfx.kernels.row import row_norm as operator

        return lambda x, w, b=None: operator(x, None, w, b, form.text)[0]

    def eager() -> Callable[..., Tensor]:
        if form_name == "LayerNorm":
            return lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, form.eps)
        return lambda x, w: F.rms_norm(x, x.shape[-1:], w, form.eps)

    def liger() -> Callable[..., Tensor]:
        if form_name == "LayerNorm":
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Layer

            return lambda x, w, b: Layer.apply(x, w, b, form.eps)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Rms

        return lambda x, w: Rms.apply(x, w, form.eps, 0.0, "llama", False)

    def quack() -> Callable[..., Tensor]:
        from quack import rmsnorm

        if form_name == "LayerNorm":
            raise NotImplementedError("quack's LayerNorm has no bias and no backward pass here")
        return lambda x, w: rmsnorm(x, w, eps=form.eps)

    found = {"normfx kernel": ours, "eager": eager, "inductor": lambda: compiler(eager())}
    for name, package, made in (("liger", "liger_kernel", liger), ("quack", "quack", quack)):
        if importlib.util.find_spec(package) is not None:
            found[name] = made
    return found


# ------------------------------------------------------------------------- products


def products(
    table: Table, bench: Bench, sizes: Sizes, peak: Device | None, compiler: Callable[..., Any]
) -> None:
    """A norm and the linear that reads it: in one kernel, and as a norm and a product."""
    from normfx.kernels.linear import norm_linear as operator

    for rows in sizes.few:
        for model, cols, outs in sizes.widths:
            case = f"{model} {rows} x {cols} x {outs}"
            make = {"device": bench.device, "dtype": torch.bfloat16}
            x = torch.randn(rows, cols, **make)
            weight = torch.randn(outs, cols, **make) / cols**0.5
            norm_weight = torch.ones(cols, **make)

            def composed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
                return F.linear(F.rms_norm(x, x.shape[-1:], scale, RMS.eps), weight)

            given = (x, weight, norm_weight)
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                "normfx kernel": lambda a=given: lambda: operator(*a[:2], None, None, RMS.text),
                "eager (norm + cuBLAS)": lambda a=given, f=composed: lambda: f(*a),
                "inductor": lambda a=given, f=composed: _bound(compiler(f), a),
            }
            if rows in (sizes.few[0], sizes.few[-1]):
                makers["inductor max-autotune"] = lambda a=given, f=composed: _bound(
                    compiler(f, mode="max-autotune-no-cudagraphs"), a
                )
            calls = {}
            for name, maker in makers.items():
                made = table.attempt(case, name, maker)
                if made is not None and table.attempt(case, name, lambda c=made: (c(), True)[1]):
                    calls[name] = made
            work = norm_linear(rows, cols, outs).after
            floor = None if peak is None else peak.floor_us(work.bytes, work.flops)
            for name, us in bench.medians_us(calls).items() if calls else ():
                table.add(case, name, us=us, floor_us=floor)


def _bound(function: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: function(*given)
