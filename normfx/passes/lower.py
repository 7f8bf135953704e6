"""Lower: canonical nodes become ATen, which Inductor fuses and generates code for.

What was an operator of ATen before becomes that operator again: Inductor decomposes it
with care (one pass for the statistics, a backward of its own), and eager runs a fused kernel.
Anything else becomes the body of `ops.norm`, traced once for each distinct (spec, shapes, dtypes)
and copied to every node that needs it.

On a CPU, Inductor takes the variance of a short row in two passes, and writes the mean to memory
between them, so that the loops over the rows are not fused and x is read from memory three times.
Without gradients, short rows therefore get the two passes spelled out, which are fused: 4 loops
for 8, and half the time where x is larger than the cache (`python -m benchmarks.norm_forms`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.ops import NormSpec, norm, row_scale
from normfx.options import Options
from normfx.passes.emit import inline
from normfx.torch_internals import fake_mode_of, real_tensors_allowed, trace_pre_dispatch

aten = torch.ops.aten

# Rows that Inductor takes two passes over (`config.cpp.use_two_step_variance_threshold`).
_SHORT_ROW = 1024


def lower(gm: fx.GraphModule, *, two_passes: bool = False, options: Options | None = None) -> None:
    """Replaces every canonical node of the graph by ATen operators; changes the graph in place.

    Args:
        gm: the graph.
        two_passes: whether Inductor gets it and no gradients are wanted, so that the variance of
            rows on a CPU may be spelled out.
        options: says which nodes to leave as they are; None: none.
    """
    bodies: dict[Any, fx.GraphModule] = {}
    done: dict[Any, fx.Node] = {}  # what is computed already, until one of its operands changes
    # what is written to, or returned, must be a tensor of its own
    own = g.written_storages(gm.graph)
    own |= {g.storage(returned) for returned in gm.graph.output_node().all_input_nodes}
    for node in list(gm.graph.nodes):
        if not g.is_call(node, norm, row_scale):
            if g.mutated_arguments(node):
                done.clear()
            continue
        site: Any = node.meta.get("normfx_site")
        if options is not None and site is not None and options.skips("lower", site.key):
            continue
        spec: Any = node.kwargs["spec"]
        key = (node.target, node.args, spec)
        if key in done and not {g.storage(node), g.storage(done[key])} & own:
            node.replace_all_uses_with(done[key], propagate_meta=False)
            gm.graph.erase_node(node)
            continue
        with gm.graph.inserting_before(node):
            spelled = two_passes and _is_on_cpu(node)
            operator = None if spelled and _is_short_row(node) else _as_operator(gm.graph, node)
            result = operator or _as_body(gm.graph, node, bodies, two_passes=spelled)
        if result.meta.get("val") is None:
            g.inherit_meta(result, node)
        result.meta["normfx_site"] = site  # whose part it is
        node.replace_all_uses_with(result, propagate_meta=False)
        gm.graph.erase_node(node)
        if spec.statistic != "batch":
            done[key] = result


def _is_on_cpu(node: fx.Node) -> bool:
    held = g.tensor(node)
    return held is not None and held.device.type == "cpu"


def _is_short_row(node: fx.Node) -> bool:
    """Whether a norm is of rows that Inductor takes two passes over, as it has few elements."""
    spec: Any = node.kwargs["spec"]
    if spec.origin != "layer_norm" or spec.groups:
        return False
    shape: Any = g.shape(node)
    sizes: list[Any] = [shape[d] for d in spec.dims]
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= _SHORT_ROW


def _as_operator(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The norm as one operator of ATen, or None if there is none that computes exactly this."""
    if node.target is row_scale:
        return None
    spec: Any = node.kwargs["spec"]
    rank: Any = node.kwargs["rank"]
    args: Any = node.args
    x, weight, bias, eps, mean, var, _ = args
    held = g.tensor(x)
    if (
        held is None
        or eps is not None
        or spec.scale != 1.0
        or spec.eps_place != "inside"
        or spec.correction
        or spec.prefix
    ):
        return None
    affine = (weight, bias)
    if spec.origin in ("batch_norm", "instance_norm", "group_norm"):
        channels = all(a is None or len(g.shape(a) or ()) == 1 for a in affine)
        if not channels or (any(a is not None for a in affine) and spec.affine_dim != 1):
            return None
        if not _rounds_once(spec, held.dtype):
            return None
        if spec.origin == "batch_norm":
            training = spec.statistic != "running"
            args = (x, weight, bias, mean, var, training, spec.momentum, spec.eps, True)
            return graph.call_function(aten.batch_norm.default, args)
        if spec.origin == "group_norm":
            return graph.call_function(
                aten.group_norm.default, (x, spec.groups, weight, bias, spec.eps, True)
            )
        args = (
            x,
            weight,
            bias,
            mean,
            var,
            spec.statistic != "running",
            spec.momentum,
            spec.eps,
            True,
        )
        return graph.call_function(aten.instance_norm.default, args)
    trailing = spec.dims == tuple(range(rank - len(spec.dims), rank)) and spec.groups == 0
    # a spelled-out one keeps its two passes: on rows with a large mean ATen's kernel is less exact
    is_layer_norm = spec.origin == "layer_norm" and trailing
    is_rms_norm = spec.origin == "rms_norm" and trailing
    sizes = list(held.shape[rank - len(spec.dims) :])
    if not (is_layer_norm or is_rms_norm) or not all(isinstance(s, int) for s in sizes):
        return None
    if not _rounds_once(spec, held.dtype) or not all(
        _is_like(a, sizes, held.dtype, spec) for a in affine
    ):
        return None
    if is_rms_norm:
        return (
            graph.call_function(aten.rms_norm.default, (x, sizes, weight, spec.eps))
            if bias is None
            else None
        )
    return graph.call_function(aten.layer_norm.default, (x, sizes, weight, bias, spec.eps))


def _rounds_once(spec: NormSpec, dtype: torch.dtype) -> bool:
    """Whether the result is rounded once, at the end, as ATen's operators do."""
    return (
        spec.out_dtype == dtype
        and spec.norm_dtype == spec.stats_dtype
        and (spec.stats_dtype == dtype or dtype in (torch.float16, torch.bfloat16))
    )


def _is_like(operand: Any, sizes: list[int], dtype: torch.dtype, spec: NormSpec) -> bool:
    if operand is None:
        return True
    same_dtype = g.dtype(operand) == dtype or spec.origin in ("layer_norm", "rms_norm")
    return list(g.shape(operand) or ()) == sizes and same_dtype


def _give_statistics(operands: list[Any], spec: NormSpec) -> None:
    """Makes the mean and the variance operands, where the body would compute them."""
    x, mean, square, gate = operands[0], *operands[4:]
    plain = spec.statistic == "variance" and spec.eps_place in ("inside", "floor-inside")
    if plain and not (spec.groups or spec.prefix) and mean is square is gate is None:
        h = x.to(spec.stats_dtype)
        mean = h.mean(spec.dims, keepdim=True)
        # not h - mean, which the body has: Inductor would make it once, and write it to memory
        square = (mean - h).square().sum(spec.dims, keepdim=True)
        n = math.prod(h.shape[d] for d in spec.dims)
        operands[4:6] = [mean, square / (n - spec.correction)]


def _as_body(
    graph: fx.Graph, node: fx.Node, bodies: dict[Any, fx.GraphModule], *, two_passes: bool
) -> fx.Node:
    """The operators of the body of a canonical node, in place of the node."""
    spec: Any = node.kwargs["spec"]
    target: Any = node.target
    operands_of: Any = node.args
    present = [i for i, a in enumerate(operands_of) if isinstance(a, fx.Node)]
    fakes: list[Any] = [g.tensor(operands_of[i]) for i in present]
    key = (
        target,
        spec,
        two_passes,
        *(
            (i, str(f.shape), str(f.stride()), f.dtype, f.device)
            for i, f in zip(present, fakes, strict=True)
        ),
    )
    if key not in bodies:

        def body(*given: torch.Tensor) -> torch.Tensor:
            operands: list[Any] = [None] * len(operands_of)
            for i, tensor in zip(present, given, strict=True):
                operands[i] = tensor
            if two_passes and target is norm:
                _give_statistics(operands, spec)
            return target(*operands, **node.kwargs)

        mode = fake_mode_of(fakes)
        with real_tensors_allowed(mode), mode:
            bodies[key] = trace_pre_dispatch(body, fakes)
    (result,) = inline(graph, bodies[key].graph, (operands_of[i] for i in present), node)
    return result
