"""Use a kernel: norms that a Triton kernel computes faster than what Inductor generates.

A norm is taken with what Inductor would fuse into it: the residual add before it, and the
activation after it. The kernel has to win against that. What no kernel supports, and every norm on
a CPU, stays for `lower` as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from normfx import graph as g
from normfx.kernels import kernels
from normfx.kernels.generate import RowForm
from normfx.kernels.select import Contest, Selector
from normfx.ops import NormSpec, norm, row_scale
from normfx.options import Options
from normfx.passes.emit import inline
from normfx.passes.verdict import change
from normfx.record import Record, Refusal
from normfx.torch_internals import (
    fake_mode_of,
    real_tensors_allowed,
    size_hint,
    trace_pre_dispatch,
)

RULE = "use-kernel"

aten = torch.ops.aten

_ACTIVATIONS: dict[Any, tuple[str, Callable[..., Any]]] = {
    aten.relu: ("relu", torch.relu),
    aten.silu: ("silu", F.silu),
    aten.sigmoid: ("sigmoid", torch.sigmoid),
    aten.gelu: ("gelu", F.gelu),
}


@dataclass(frozen=True, slots=True)
class Region:
    """A norm, and what is computed in one kernel with it.

    Attributes:
        node: the canonical node.
        operator: the kernel.
        form: what it computes.
        operands: the nodes it reads: x, residual, gate, weight, bias; None where there is none.
        sizes: of a row.
        results: the nodes that it replaces, in the order of `kernel` and `plain`.
        kernel: the operands that are there to the results, with the kernel.
        plain: the same in plain torch.
    """

    node: fx.Node
    operator: str
    form: RowForm
    operands: tuple[fx.Node | None, ...]
    sizes: tuple[int, ...]
    results: tuple[fx.Node, ...]
    kernel: Callable[..., Any]
    plain: Callable[..., Any]

    @property
    def present(self) -> list[fx.Node]:
        """The operands that are there."""
        return [node for node in self.operands if node is not None]


def use_kernels(
    gm: fx.GraphModule, options: Options, selector: Selector, *, grad: bool = False
) -> None:
    """Replaces canonical nodes by kernels where the selector says so; changes the graph in place.

    Args:
        gm: the graph.
        options: may leave a norm as it is (`skip`).
        selector: decides.
        grad: whether gradients flow through the graph.

    Refuses:
        no-kernel, kernel-slower, kernel-not-timed.
    """
    for node in list(gm.graph.nodes):
        site: Any = node.meta.get("normfx_site")
        if not g.is_call(node, norm, row_scale) or site is None or options.skips("lower", site.key):
            continue
        held = g.tensor(node.args[0])
        if held is None or not selector.considers(held.device):
            continue
        region = _region(node, grad)
        if isinstance(region, str):
            _decline(node, Refusal.NO_KERNEL, region)
            continue
        if selector.kernels == "triton":
            detail = f"{region.operator}, as the option kernels says"
        else:
            verdict = selector.verdict(_contest(region, held, grad))
            if not verdict.kernel_wins:
                code = Refusal.SLOWER if verdict.timed else Refusal.NOT_TIMED
                _decline(node, code, f"{region.operator}: {verdict}")
                continue
            detail = f"{region.operator}: {verdict}"
        change(node, "lower", RULE, detail)
        _replace(gm.graph, region)


def _decline(node: fx.Node, code: Refusal, detail: str) -> None:
    site: Any = node.meta["normfx_site"]
    site.records.append(Record("lower", RULE, False, code, node.name, g.location(node), detail))


# ------------------------------------------------------------------------- the check


def _region(node: fx.Node, grad: bool) -> Region | str:
    """The region of a norm, or why no kernel computes it."""
    x = node.args[0]
    held = g.tensor(x)
    assert held is not None
    spec: Any = node.kwargs["spec"]
    lead = held.dim() - len(spec.dims)
    sizes = tuple(held.shape[lead:])
    trailing = not spec.groups and spec.dims == tuple(range(lead, held.dim()))
    if not trailing or not all(isinstance(size, int) for size in sizes):
        return "its dims are not the last ones, of known size"
    if not held.is_contiguous():
        return "its input is not dense"
    cols = math.prod(sizes)
    table = {kernel.name: kernel for kernel in kernels()}
    if "row_norm" not in table:
        return "Triton is not installed"
    reason = table["row_norm"].supports(spec, cols, held.dtype, held.device)
    if reason:
        return reason
    form = RowForm.of(spec)
    assert form is not None
    if node.target is row_scale:
        return _scale_region(node, form, sizes, grad)
    return _norm_region(node, spec, form, sizes)


def _scale_region(node: fx.Node, form: RowForm, sizes: tuple[int, ...], grad: bool) -> Region | str:
    """Residual add and the factor of each row."""
    cols = math.prod(sizes)
    if grad:
        return "add_row_scale has no gradient"
    x, eps, square = node.args
    add = _residual(x, node)
    if add is None or eps is not None or square is not None:
        return "no residual is added, or a statistic is given"
    spec: Any = node.kwargs["spec"]
    text = form.text

    def kernel(a: Any, b: Any) -> Any:
        rows = a.reshape(-1, cols), b.reshape(-1, cols)
        stream, factor = torch.ops.normfx.add_row_scale(*rows, text)
        lead = a.shape[: a.dim() - len(spec.dims)]
        return stream.reshape(a.shape), factor.reshape(*lead, *[1] * len(spec.dims))

    def plain(a: Any, b: Any) -> Any:
        stream = a + b
        return stream, row_scale(stream, spec=spec)

    operands: Any = add.args
    return Region(node, "add_row_scale", form, operands, sizes, (add, node), kernel, plain)


def _norm_region(
    node: fx.Node, spec: NormSpec, form: RowForm, sizes: tuple[int, ...]
) -> Region | str:
    """The norm with a residual before it and an activation after it."""
    cols = math.prod(sizes)
    operands: Any = node.args
    x, weight, bias, eps, mean, square, gate = operands
    if not (eps is None and mean is None and square is None):
        return "eps or a statistic is an operand"
    for operand in (weight, bias, gate):
        shape = sizes if operand is None else tuple(g.shape(operand) or ())
        if shape != sizes or (spec.affine_dim is not None and len(sizes) > 1):
            return "weight, bias or gate are not of the shape of a row"
        if operand is not None and g.dtype(operand) not in (
            torch.float16,
            torch.bfloat16,
            torch.float32,
        ):
            return "weight, bias or gate are of another dtype"
    if gate is not None:
        form = replace(form, gate="swish")
    add = _residual(x, node)
    act = _activation(node, spec)
    if act is not None:
        form = replace(form, activation=_named(act)[0])
    text = form.text
    rank: Any = node.kwargs["rank"]
    first: Any = (x, None) if add is None else add.args

    def kernel(x: Any, residual: Any, gate: Any, weight: Any, bias: Any) -> Any:
        row = [None if t is None else t.reshape(-1) for t in (gate, weight, bias)]
        if residual is None:
            y = torch.ops.normfx.row_norm(x.reshape(-1, cols), *row, text)[0]
            return (y.reshape(x.shape),)
        rows = x.reshape(-1, cols), residual.reshape(-1, cols)
        y, stream = torch.ops.normfx.add_row_norm(*rows, *row, text)[:2]
        return stream.reshape(x.shape), y.reshape(x.shape)

    def plain(x: Any, residual: Any, gate: Any, weight: Any, bias: Any) -> Any:
        stream = x if residual is None else x + residual
        y = norm(stream, weight, bias, gate=gate, spec=spec, rank=rank)
        if act is not None:
            y = _named(act)[1](y, **act.kwargs)
        return (y,) if residual is None else (stream, y)

    last = node if act is None else act
    return Region(
        node,
        "row_norm" if add is None else "add_row_norm",
        form,
        (*first, gate, weight, bias),
        sizes,
        (last,) if add is None else (add, last),
        kernel,
        plain,
    )


def _residual(x: Any, node: fx.Node) -> fx.Node | None:
    """The sum of two tensors of one shape and dtype that a norm reads, if it may be made here."""
    if not g.is_call(x, aten.add.Tensor) or len(x.args) != 2 or x.kwargs:
        return None
    terms = [g.tensor(term) if isinstance(term, fx.Node) else None for term in x.args]
    held = g.tensor(x)
    if held is None or any(
        t is None
        or t.shape != held.shape
        or t.dtype != held.dtype
        or not t.is_contiguous()
        or t.device != held.device
        for t in terms
    ):
        return None
    # it moves to the norm: whoever reads it has to stand after that, and nothing may write between
    between = x.next
    while between is not node:
        if x in between.all_input_nodes or g.mutated_arguments(between):
            return None
        between = between.next
    return x


def _activation(node: fx.Node, spec: NormSpec) -> fx.Node | None:
    """The only reader of a norm, if it is an activation that a kernel has."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    known = g.packet(reader) in _ACTIVATIONS and reader.args == (node,)
    if not known or g.mutated_arguments(reader) or g.dtype(reader) != spec.out_dtype:
        return None
    return reader if g.dtype(node) == g.dtype(reader) else None


def _named(act: fx.Node) -> tuple[str, Callable[..., Any]]:
    name, function = _ACTIVATIONS[g.packet(act)]
    return ("gelu-tanh" if act.kwargs.get("approximate") == "tanh" else name), function


# ------------------------------------------------------------------------- both sides


def _contest(region: Region, x: torch.Tensor, grad: bool) -> Contest:
    lead = x.dim() - len(region.sizes)
    bucket = [1 << max(size_hint(size) - 1, 0).bit_length() for size in x.shape[:lead]]
    shapes = []
    for node in region.present:
        held = g.tensor(node)
        assert held is not None
        shape = (*bucket, *region.sizes) if held.shape == x.shape else tuple(held.shape)
        shapes.append((shape, held.dtype))

    def graphs() -> tuple[fx.GraphModule, fx.GraphModule]:
        with FakeTensorMode() as mode:
            fakes = [torch.empty(shape, dtype=dt, device=x.device) for shape, dt in shapes]
        return _traced(region, region.kernel, fakes, mode), _traced(
            region, region.plain, fakes, mode
        )

    spec: Any = region.node.kwargs["spec"]
    what = f"{region.form.text} {spec}"
    return Contest(region.operator, what, tuple(shapes), x.device, grad, graphs)


def _traced(
    region: Region, body: Callable[..., Any], fakes: list[torch.Tensor], mode: Any
) -> fx.GraphModule:
    """A side of a contest as a graph of the operands that are there."""
    places = [i for i, node in enumerate(region.operands) if node is not None]

    def of_present(*given: torch.Tensor) -> Any:
        operands: list[Any] = [None] * len(region.operands)
        for i, tensor in zip(places, given, strict=True):
            operands[i] = tensor
        return body(*operands)

    with real_tensors_allowed(mode), mode:
        return trace_pre_dispatch(of_present, fakes)


def _replace(graph: fx.Graph, region: Region) -> None:
    fakes: list[Any] = [g.tensor(node) for node in region.present]
    template = _traced(region, region.kernel, fakes, fake_mode_of(fakes))
    with graph.inserting_before(region.node):
        made = inline(graph, template.graph, region.present, region.node)
    for new, old in zip(made, region.results, strict=True):
        g.inherit_meta(new, old)
        old.replace_all_uses_with(new, propagate_meta=False)
    for old in dict.fromkeys((region.results[-1], region.node, region.results[0])):
        graph.erase_node(old)
