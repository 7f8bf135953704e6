"""Calibrated: a norm becomes the static affine map that its statistics over data give.

    norm(x; w, b)  ~  x * (w s) + (w t + b)

with s and t for each channel (`normfx/calibration/affine.py`). No statistic is left, so the folds
take the map into the operators beside it. This changes the function: the rule runs only where
statistics are given (`normfx.calibrate`), and raises where they do not fit the graph, since the
user asked for it. w s and w t + b are made in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfx import graph as g
from normfx.calibration.sites import form_of, named_norms, state_of
from normfx.calibration.statistics import SiteStatistics, Statistics, digest_of
from normfx.errors import StatisticsError
from normfx.options import Options
from normfx.passes.emit import Emitter
from normfx.passes.verdict import Refused, allows, change, refuse
from normfx.record import Refusal

aten = torch.ops.aten

RULE = "calibrated-norm"

_PREFIX = "normfx_calibrated_"
_HINT = "Calibrate this model with normfx.calibrate."


def calibrated(gm: fx.GraphModule, options: Options, *, in_body: bool) -> None:
    """Replaces the chosen norms of a graph by static ones, if statistics are given.

    Args:
        gm: a graph with canonical nodes; changed in place.
        options: the statistics, and which sites.
        in_body: whether this is the body of an operator, which is not measured by itself.

    Every norm of an activation gets one record, if there are statistics.

    Refuses:
        rule-off, inside-a-body, site-not-chosen, site-not-measured, not-per-channel,
        affine-not-constant.

    Raises:
        StatisticsError: the statistics are of another model, lack a site, or are not finite.
    """
    statistics = options.statistics
    if statistics is None:
        return
    constant = g.parameter_only(gm.graph)
    if not in_body:
        _check_state(gm.graph, statistics)
    chosen = statistics.resolve(options.sites)
    for name, node in named_norms(gm.graph, constant):
        plan = _check(name, node, constant, options, statistics, chosen, in_body=in_body)
        if isinstance(plan, Refused):
            refuse(node, "calibrate", RULE, plan)
        else:
            _replace(gm, node, plan.form.channel, *plan.affine(statistics.form))
            change(node, "calibrate", RULE, f"{statistics.form}, {name}")


def _check(
    name: str,
    node: fx.Node,
    constant: set[fx.Node],
    options: Options,
    statistics: Statistics,
    chosen: Sequence[str],
    *,
    in_body: bool,
) -> SiteStatistics | Refused:
    if not allows(options, RULE, node):
        return Refused(Refusal.RULE_OFF, node)
    if in_body:
        return Refused(Refusal.IN_BODY, node)
    form = form_of(node, constant)
    measured = statistics.sites.get(name)
    if name in statistics.refused:
        return form if isinstance(form, Refused) else Refused(Refusal.NOT_MEASURED, node)
    if measured is None:
        if isinstance(form, Refused):
            return form
        if statistics.options.get("sites") is None:
            raise StatisticsError(
                f"site {name!r} ({form}, {g.location(node)}) is missing in the statistics. {_HINT}"
            )
        return Refused(Refusal.NOT_CHOSEN, node)
    if isinstance(form, Refused) or form != measured.form:
        got = form.code.value if isinstance(form, Refused) else form
        raise StatisticsError(
            f"site {name!r}: the statistics are of {measured.form}, but the model has {got} "
            f"({g.location(node)}). {_HINT}"
        )
    if name not in chosen:
        return Refused(Refusal.NOT_CHOSEN, node)
    check_numbers(name, measured, statistics)
    return measured


def check_numbers(name: str, measured: SiteStatistics, statistics: Statistics) -> None:
    """Raises where a site cannot be used: nothing was measured, or numbers are not finite."""
    if measured.moments.rows.item() <= 0:
        raise StatisticsError(f"site {name!r}: the statistics are of no rows. {_HINT}")
    bad = {
        key: int((~held.isfinite()).sum())
        for key, held in (
            *measured.moments._asdict().items(),
            *zip("st", measured.affine(statistics.form), strict=True),
        )
        if not held.isfinite().all()
    }
    if bad:
        which = ", ".join(f"{count} of {key}" for key, count in bad.items())
        raise StatisticsError(
            f"site {name!r}: the statistics must be finite, but {which} are not. Look for NaN or "
            "infinity in the calibration data, and mask padding."
        )


def _check_state(graph: fx.Graph, statistics: Statistics) -> None:
    for name, (_, looks) in state_of(graph).items():
        known = statistics.state.get(name)
        if known is None or looks not in known:
            expected = " or ".join(known) if known else "no parameter of this name"
            raise StatisticsError(
                f"the statistics are of another model: they expect {name!r} as {expected}, the "
                f"model has {looks}. {_HINT}"
            )


def check_weights(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> None:
    """Compares the values of parameters, where statistics are for certain weights only.

    Raises:
        StatisticsError: they differ.
    """
    if options.statistics is None or not options.statistics.weights:
        return
    for name, (position, _) in state_of(gm.graph).items():
        known, held = options.statistics.weights.get(name), inputs[position]
        if known is not None and isinstance(held, Tensor) and digest_of(held) != known:
            raise StatisticsError(
                f"the statistics are for other weights: the values of {name!r} differ. {_HINT}"
            )


def _replace(gm: fx.GraphModule, node: fx.Node, channel: int, scale: Tensor, shift: Tensor) -> None:
    """Makes a norm static: x * weight + bias."""
    graph, spec, rank = gm.graph, node.kwargs["spec"], node.kwargs["rank"]
    assert isinstance(rank, int)
    s: Any = spec
    x, weight, bias = node.args[:3]
    trailing = [1] * (-1 - channel)
    with graph.inserting_before(node):
        emit = Emitter(graph, node, RULE)
        made = [_constant(gm, node, held.reshape([-1, *trailing])) for held in (scale, shift)]
        factor, summand = made
        if weight is not None:
            wide = _wide(emit, weight, s, rank)
            factor = emit(aten.mul.Tensor, wide, factor)
            summand = emit(aten.mul.Tensor, wide, summand)
        if bias is not None:
            summand = emit(aten.add.Tensor, summand, _wide(emit, bias, s, rank))
        shape = torch.broadcast_shapes(
            (scale.shape[0], *trailing),
            *(
                _aligned_shape(operand, s, rank)
                for operand in (weight, bias)
                if operand is not None
            ),
        )
        held: Any = g.tensor(x)
        with g.fake_mode(node), torch.no_grad():
            # one value each: two inputs of a trace that are one tensor would be one input
            likes = [torch.empty(shape, dtype=s.stats_dtype, device=held.device) for _ in made]
        factor = emit(aten.to.dtype, factor, s.stats_dtype, like=likes[0])
        summand = emit(aten.to.dtype, summand, s.stats_dtype, like=likes[1])
    node.args = (x, factor, summand, None, None, None, None)
    static = s._replace(
        dims=(),
        statistic="static",
        centre=False,
        correction=0,
        eps=0.0,
        eps_place="inside",
        scale=1.0,
        norm_dtype=s.stats_dtype,
        affine_dim=None,
        origin="algebra",
    )
    node.kwargs = {**node.kwargs, "spec": static}


def _constant(gm: fx.GraphModule, node: fx.Node, held: Tensor) -> fx.Node:
    """A float64 tensor as a constant of the graph, on the device of the norm."""
    count = sum(name.startswith(_PREFIX) for name, _ in gm.named_buffers())
    name = f"{_PREFIX}{count}"
    held = held.to(g.value(node).device)
    gm.register_buffer(name, held)
    made = gm.graph.get_attr(name)
    made.meta["val"] = g.fake_mode(node).from_tensor(held, static_shapes=True)
    made.meta["normfx_rule"] = RULE
    return made


def _wide(emit: Emitter, operand: Any, spec: Any, rank: int) -> fx.Node:
    """A weight or bias in float64, so that it broadcasts against x."""
    wide = emit(aten.to.dtype, operand, torch.float64)
    shape = _aligned_shape(operand, spec, rank)
    return wide if shape == g.shape(operand) else emit(aten.reshape.default, wide, list(shape))


def _aligned_shape(operand: Any, spec: Any, rank: int) -> tuple[Any, ...]:
    shape: Any = g.shape(operand)
    if spec.affine_dim is None or len(shape) != 1:
        return shape
    return (*shape, *[1] * (rank - 1 - spec.affine_dim))
