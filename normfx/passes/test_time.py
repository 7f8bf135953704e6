"""Test time: a BatchNorm in evaluation adapts to the data it is given, by the option `test_time`.

alpha-BN (2110.04065), with a the weight of the batch:

    mean = (1 - a) running_mean + a mean(x)        var = (1 - a) running_var + a unbiased var(x)

UnMix-TNS (ICLR 2024): the statistics of each instance mixed with K components, which move at each
call; `normfx/nn/unmix.py` has the equations, and the functions that are traced here. The components
begin around the running statistics. They belong to the tensor `running_mean` of the model, so a
graph that is compiled anew, for other shapes say, goes on where the last one was.

This changes the function, so it runs only where it is asked for. No gradient passes the statistics
of alpha-BN; UnMix-TNS is for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfx import graph as g
from normfx.nn.unmix import components_of, mixed
from normfx.ops import norm
from normfx.options import Adaptation, Options
from normfx.passes.emit import inline
from normfx.passes.verdict import Refused, allows, change, refuse
from normfx.record import Refusal
from normfx.torch_internals import fake_mode_of, real_tensors_allowed, trace_pre_dispatch

RULE = "test-time-norm"

_COMPONENTS = "_normfx_components"
_PREFIX = "normfx_components_"


def adapted(
    gm: fx.GraphModule,
    options: Options,
    *,
    grad: bool,
    in_body: bool,
    inputs: Sequence[Any],
) -> None:
    """Gives the BatchNorms of a graph statistics that depend on their input.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: says how.
        grad: whether gradients flow through the graph.
        in_body: whether this is the body of an operator.
        inputs: what the graph is called with, parameters among them.

    Every norm of an activation whose statistics are given gets one record.

    Refuses:
        rule-off, needs-batch-norm, affine-not-constant; for UnMix-TNS also needs-grad,
        inside-a-body, no-image.
    """
    how = options.test_time
    if how is None:
        return
    constant = g.parameter_only(gm.graph)
    places = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    count = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=norm)):
        spec: Any = node.kwargs["spec"]
        if spec.statistic not in ("running", "static") or node.args[0] in constant:
            continue
        refused = _check(node, constant, options, in_body=in_body)
        mean: Any = node.args[4]
        if refused is None and how.kind == "unmix-tns":
            held = inputs[places[mean]] if mean in places and inputs else None
            refused = _check_unmix(node, held, grad=grad, in_body=in_body)
            if refused is None:
                assert isinstance(held, Tensor)
                _unmix(gm, node, how, _components(node, held, inputs, places, how, count))
        elif refused is None:
            _alpha(gm, node, how.weight_of_test_batch)
        if refused is not None:
            refuse(node, "test-time", RULE, refused)
        else:
            count += 1
            change(node, "test-time", RULE, how.kind)


def _check(
    node: fx.Node, constant: set[fx.Node], options: Options, *, in_body: bool
) -> Refused | None:
    if not allows(options, RULE, node):
        return Refused(Refusal.RULE_OFF, node)
    spec: Any = node.kwargs["spec"]
    if spec.statistic != "running" or spec.origin != "batch_norm":
        return Refused(Refusal.NEEDS_BATCH_NORM, node)
    for operand in node.args[4:6]:
        assert isinstance(operand, fx.Node)
        # what comes from outside of a body is not known to be a buffer; what is computed is none
        if operand not in constant and not (in_body and operand.op == "placeholder"):
            return Refused(Refusal.NOT_CONSTANT, operand)
    return None


def _check_unmix(node: fx.Node, held: Any, *, grad: bool, in_body: bool) -> Refused | None:
    if grad:
        return Refused(Refusal.NEEDS_GRAD, node)
    if in_body or not isinstance(held, Tensor):  # its components are nowhere at hand
        return Refused(Refusal.IN_BODY, node)
    return None if node.kwargs["rank"] == 4 else Refused(Refusal.NO_IMAGE, node)


def _alpha(gm: fx.GraphModule, node: fx.Node, a: float) -> None:
    """Mixes the running statistics with those of the batch."""
    spec: Any = node.kwargs["spec"]
    rank: Any = node.kwargs["rank"]
    channel = 1 if rank > 1 else 0
    others = [dim for dim in range(rank) if dim != channel]

    def statistics(x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        h = x.detach().to(spec.stats_dtype)
        n = h.numel() // h.shape[channel]
        square, centre = torch.var_mean(h, others, correction=0)
        # unbiased; of one number it is its own zero
        square = square * (n / torch.sym_max(n - 1, 1))
        return (1 - a) * mean + a * centre, (1 - a) * variance + a * square

    x, mean, variance = node.args[0], *node.args[4:6]
    made = _traced(gm, node, statistics, (x, mean, variance))
    node.args = (*node.args[:4], *made, None)
    kept = spec._replace(kind="AlphaBatchNorm", origin="algebra", norm_dtype=spec.stats_dtype)
    node.kwargs = {**node.kwargs, "spec": kept}


def _unmix(gm: fx.GraphModule, node: fx.Node, how: Adaptation, state: tuple[Tensor, ...]) -> None:
    """Takes the statistics of each instance from a mixture, and moves its components."""
    spec: Any = node.kwargs["spec"]
    x, weight, bias = node.args[:3]

    def statistics(x: Tensor, means: Tensor, variances: Tensor, *weight: Tensor) -> Any:
        h = x.to(spec.stats_dtype)
        variance, mean = torch.var_mean(h, (2, 3), correction=0)
        old, old_variances = means.to(h.dtype), variances.to(h.dtype)
        p, centre, total = mixed(mean, variance, old, old_variances, how.temperature)
        for running, was, new in ((means, old, mean), (variances, old_variances, variance)):
            moved = (p * (new.unsqueeze(1) - was)).mean(0)
            running.copy_(was + how.momentum * moved)
        scale = torch.rsqrt(total + spec.eps)
        if weight:
            scale = scale * weight[0]
        return centre[..., None, None], scale[..., None, None]

    def shift(bias: Tensor) -> Tensor:
        return bias[:, None, None]

    with gm.graph.inserting_before(node):
        held = [_attribute(gm, node, tensor) for tensor in state]
    given = (x, *held, *([] if weight is None else [weight]))
    centre, scale = _traced(gm, node, statistics, given)
    if bias is not None:
        (bias,) = _traced(gm, node, shift, (bias,))
    node.args = (x, scale, bias, None, centre, None, None)
    kept = spec._replace(
        kind="UnMixTNS",
        statistic="static",
        eps=0.0,
        affine_dim=None,
        norm_dtype=spec.stats_dtype,
        origin="algebra",
    )
    node.kwargs = {**node.kwargs, "spec": kept}


def _components(
    node: fx.Node,
    mean: Tensor,
    inputs: Sequence[Any],
    places: dict[fx.Node, int],
    how: Adaptation,
    index: int,
) -> tuple[Tensor, ...]:
    """The components that belong to a BatchNorm; made at their first use."""
    variance = inputs[places[node.args[5]]]  # pyright: ignore[reportArgumentType]
    known = getattr(mean, _COMPONENTS, None)
    if known is not None and known[0] == how:
        return known[1]
    generator = torch.Generator().manual_seed(how.seed + index)
    with torch.inference_mode(False), torch.no_grad():
        made = components_of(mean.detach(), variance.detach(), how.components, generator)
        state = tuple(held.clone(memory_format=torch.contiguous_format) for held in made)
    setattr(mean, _COMPONENTS, (how, state))
    return state


def _attribute(gm: fx.GraphModule, node: fx.Node, held: Tensor) -> fx.Node:
    """A tensor that the graph holds, and writes to."""
    name = f"{_PREFIX}{sum(key.startswith(_PREFIX) for key, _ in gm.named_buffers())}"
    gm.register_buffer(name, held)
    made = gm.graph.get_attr(name)
    made.meta["val"] = g.fake_mode(node).from_tensor(held, static_shapes=True)
    return made


def _traced(
    gm: fx.GraphModule, node: fx.Node, function: Callable[..., Any], inputs: Sequence[Any]
) -> tuple[fx.Node, ...]:
    """Puts a function in front of a node, traced on these inputs."""
    fakes: list[Any] = [g.tensor(given) for given in inputs]
    mode = fake_mode_of(fakes)
    with real_tensors_allowed(mode), mode:
        traced = trace_pre_dispatch(function, fakes)
    with gm.graph.inserting_before(node):
        return inline(gm.graph, traced.graph, inputs, node)
