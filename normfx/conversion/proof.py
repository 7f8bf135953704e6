"""Proof: what a hand-written module computes, from the graph of a call of it alone.

The module is traced as the compiler would trace it, on tokens and on images, in training and in
evaluation. It is a norm if each graph is one canonical norm of the input, with nothing beside it.
Then the spec of that norm says what it is, whoever wrote it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from normfx import graph as g
from normfx.calibration.observe import recognised
from normfx.conversion.sources import Source, placed
from normfx.laws import ARRANGEMENTS, VIEWS
from normfx.ops import NormSpec, norm
from normfx.record import Refusal
from normfx.torch_internals import compile_alone, is_module_state, same_random_numbers, source_name

aten = torch.ops.aten

# Sizes of the dims beside the channels: those that are no number of channels are taken.
_SIZES = (3, 5, 7, 11)


class _Affine(NamedTuple):
    """Offset + factor * parameter."""

    name: str
    factor: float
    offset: float


class _Proved(NamedTuple):
    """What the graph of a call says."""

    spec: NormSpec
    rank: int
    channel: int
    weight: _Affine | None
    bias: _Affine | None


class Proofs:
    """The proofs of one conversion: modules that differ in their numbers only share one."""

    def __init__(self) -> None:
        self._known: dict[Any, _Proved | Refusal | None] = {}

    def __call__(self, module: nn.Module, channels: int | None) -> Source | Refusal | None:
        """What a module computes; None where there is no norm in it.

        Args:
            module: without submodules.
            channels: of a norm without parameters, if known.
        """
        if not _may_be_norm(module):
            return None
        sizes = {p.numel() for p in module.parameters()} or {channels}
        if len(sizes) != 1 or None in sizes:
            # a norm has one size; without any, nothing can be called
            return None
        (size,) = sizes
        assert size is not None
        key = _key(module, size)
        if key is None or key not in self._known:
            proved = _prove(module, size)
            if key is None:
                return _source(module, size, proved)
            self._known[key] = proved
        return _source(module, size, self._known[key])


def _may_be_norm(module: nn.Module) -> bool:
    """A leaf of somebody's own, all of whose parameters have one number for each channel."""
    if type(module).__module__.split(".")[0] == "torch" or any(True for _ in module.children()):
        return False
    return all(
        p.is_floating_point() and sum(size != 1 for size in p.shape) <= 1
        for p in module.parameters()
    )


def _key(module: nn.Module, size: int) -> Any:
    """What decides the graph of a module, or None where that is not known.

    Two modules of one class with the same plain attributes and looks run the same code.
    """
    plain: list[tuple[str, str]] = []
    for name, held in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        leaves = held if isinstance(held, (tuple, list)) else [held]
        if not all(
            leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype))
            for leaf in leaves
        ):
            return None
        plain.append((name, repr(held)))
    state = [
        (name, None if held is None else (held.shape, held.dtype, held.device))
        for table in (module._parameters, module._buffers)
        for name, held in table.items()
    ]
    return type(module), size, tuple(sorted(plain)), tuple(state)


def _prove(module: nn.Module, channels: int) -> _Proved | Refusal | None:
    if not _takes_one_tensor(module):
        inputs = _inputs(module, channels)
        found = any(isinstance(_read(_copied(module, False), x), _Proved) for x in inputs)
        return Refusal.FURTHER_ARGUMENTS if found else None
    tokens, wide, images = _inputs(module, channels)
    best: Refusal | None = None
    for inputs in ((tokens, wide), (images,)):
        found = [_read(_copied(module, mode), x) for x in inputs for mode in (False, True)]
        proved = [one for one in found if isinstance(one, _Proved)]
        if len(proved) == len(found) and len({_meaning(one) for one in proved}) == 1:
            return proved[0]
        if proved:  # it depends on the mode, or on the number of dims
            best = Refusal.MORE_THAN_NORM
        best = best or next((one for one in found if isinstance(one, Refusal)), None)
    return best


def _meaning(found: _Proved) -> Any:
    """What has to be the same in every graph; the channels are counted from the end."""
    return found.spec._replace(kind="", dims=(), affine_dim=None), *found[2:]


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether a call can have no argument but one: another might decide what is computed."""
    taken = list(inspect.signature(module.forward).parameters.values())
    return len(taken) == 1 and taken[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )


def _inputs(module: nn.Module, channels: int) -> list[torch.Tensor]:
    held = next(module.parameters(), None)
    like: Any = {} if held is None else {"dtype": held.dtype, "device": held.device}
    a, b, c = [size for size in _SIZES if size != channels][:3]
    shapes = ((a, b, channels), (a, b, c, channels), (a, channels, b, c))
    return [torch.ones(shape, **like) for shape in shapes]


def _copied(module: nn.Module, training: bool) -> nn.Module:
    """The module for a trial call: what that changes is not the module's, and nobody looks on."""
    made = copy.copy(module)
    made.__dict__ = dict(module.__dict__)
    made._parameters = {
        name: None if p is None else nn.Parameter(p.detach(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    made._buffers = {
        name: None if b is None else b.detach().clone() for name, b in module._buffers.items()
    }
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(made, hooks, OrderedDict())
    made.training = training
    return made


def _read(module: nn.Module, x: torch.Tensor) -> _Proved | Refusal | None:
    """What a call of a module is; None where it fails, or has no norm."""
    found: list[_Proved | Refusal | None] = []

    def collect(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(_proved(recognised(gm)))
        return gm

    try:
        with torch.no_grad(), same_random_numbers(module):
            module(x)  # dynamo would log that it fails
            compile_alone(module, collect, False, fullgraph=True)(x)
    except Exception:  # a module that cannot be called like this is no norm of such an input
        return None
    return found[0] if len(found) == 1 else None


def _proved(gm: fx.GraphModule) -> _Proved | Refusal | None:
    graph = gm.graph
    norms = [node for node in graph.nodes if g.is_call(node, norm)]
    if not norms:
        return None
    (results,) = next(iter(graph.find_nodes(op="output"))).args
    constant = g.parameter_only(graph)
    working = [n for n in graph.nodes if n.op == "call_function" and n not in constant]
    if len(norms) != 1 or len(results) != 1:  # pyright: ignore[reportArgumentType]
        return Refusal.MORE_THAN_NORM
    (node,), (result,) = norms, results  # pyright: ignore[reportAssignmentType]
    held, weight, bias, *further = node.args
    spec: Any = node.kwargs["spec"]
    rank: Any = node.kwargs["rank"]
    x, came = _arranged(held, rank)
    source, went = _arranged(result, rank)
    back = [came[dim] for dim in went]
    if source is not node or back != list(range(rank)):
        return Refusal.MORE_THAN_NORM
    if not isinstance(x, fx.Node) or x.op != "placeholder" or is_module_state(x):
        return Refusal.MORE_THAN_NORM
    if any(n is not node and g.packet(n) not in _REARRANGES for n in working):
        return Refusal.MORE_THAN_NORM
    if spec.statistic in ("static", "running"):
        return Refusal.NO_STATISTIC
    if (
        spec.statistic not in ("variance", "mean-square", "sum-square")
        or spec.groups
        or spec.prefix
        or len(spec.dims) != 1
        or any(operand is not None for operand in further)
    ):
        return Refusal.NOT_PER_CHANNEL
    (dim,) = spec.dims
    affine = []
    for operand in (weight, bias):
        read = None if operand is None else _affine(operand, spec, rank, dim)
        if operand is not None and read is None:
            return Refusal.COMPUTED
        affine.append(read)
    return _Proved(spec, rank, came[dim] - rank, *affine)


_COPIES = frozenset({aten.contiguous, aten.clone})
_REARRANGES = ARRANGEMENTS | _COPIES


def _arranged(node: Any, rank: int) -> tuple[Any, list[int]]:
    """What a value is a permutation of, and which dim of that each of its dims is."""
    dims = list(range(rank))
    while g.packet(node) in _REARRANGES:
        if g.packet(node) in ARRANGEMENTS:
            order = g.permutation(node, rank)
            dims = [order[dim] for dim in dims]
        node = node.args[0]
    return node, dims


def _affine(operand: Any, spec: NormSpec, rank: int, dim: int) -> _Affine | None:
    """An operand as offset + factor * parameter, if it runs along the channels or is one number."""
    shape: Any = g.shape(operand)
    along = [rank - len(shape) + at for at, size in enumerate(shape) if size != 1]
    if spec.affine_dim is not None and len(shape) == 1:
        along = [spec.affine_dim]
    if along not in ([], [dim]):
        return None
    factor, offset = 1.0, 0.0
    while operand.op != "placeholder":
        called = g.packet(operand)
        if called in (aten.add, aten.mul) and isinstance(operand.args[1], (int, float)):
            if operand.kwargs:
                return None
            number = float(operand.args[1])
            if called is aten.add:
                offset += factor * number
            else:
                factor *= number
        elif called not in (aten.to, *VIEWS):
            return None
        operand = operand.args[0]
    return _Affine(g.clean_path(source_name(operand)), factor, offset)


def _source(
    module: nn.Module, channels: int, proved: _Proved | Refusal | None
) -> Source | Refusal | None:
    if not isinstance(proved, _Proved):
        return proved
    weight, factor, offset = (None, 1.0, 0.0)
    if proved.weight is not None:
        weight, factor, offset = module._parameters.get(proved.weight.name), *proved.weight[1:]
    bias = None
    if proved.bias is not None:
        bias = module._parameters.get(proved.bias.name)
    if (weight is None) != (proved.weight is None) or (bias is None) != (proved.bias is None):
        return Refusal.COMPUTED  # a buffer
    if proved.bias is not None and proved.bias[1:] != (1.0, 0.0):
        return Refusal.COMPUTED
    spec = proved.spec
    # x / sqrt(sum) is the RMSNorm over the square root of how many
    gain = spec.scale / (math.sqrt(channels) if spec.statistic == "sum-square" else 1.0)
    eps = spec.eps if spec.eps_place == "inside" else None
    place = -1 if proved.channel == -1 else 1
    affine = weight, bias, factor * gain, offset * gain
    return placed(Source(spec.kind, spec.statistic, channels, place, eps, *affine), module)
