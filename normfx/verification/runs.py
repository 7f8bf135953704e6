"""Runs: one graph on given inputs, in its own dtype or in float64, and all that it leaves.

A run gets copies of its inputs, so nothing of the caller's is written to, and starts from the same
state of the random number generators as every other run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normfx import graph as g
from normfx.torch_internals import without_autocast

aten = torch.ops.aten

_WIDE = {torch.complex32: torch.complex128, torch.complex64: torch.complex128}
_DRAWS_THE_SAME = frozenset({aten.native_dropout.default, aten.bernoulli_.float})


@dataclass(slots=True)
class Outcome:
    """What a run leaves.

    Attributes:
        tensors: outputs, inputs that were written to, and gradients, each by a name for people.
        gradients: the names of those that are gradients.
        values: of inner nodes that were asked for.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    gradients: set[str] = field(default_factory=set)
    values: dict[str, Tensor] = field(default_factory=dict)


class Recorder(fx.Interpreter):
    """Runs a graph module, and keeps the values of some of its nodes."""

    def __init__(self, module: fx.GraphModule, wanted: frozenset[str] = frozenset()) -> None:
        super().__init__(module)
        self._wanted = wanted
        self._dtype = torch.float32
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        self._dtype = next((d for d in map(g.dtype, n.args) if d is not None), self._dtype)
        result = super().run_node(n)
        if n.name in self._wanted and isinstance(result, Tensor):
            self.values[n.name] = result.detach().clone()
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operator; the eps that it has by default is that of the graph's own dtype."""
        is_rms_norm = getattr(target, "__name__", "").startswith("rms_norm")
        if is_rms_norm and self._dtype.is_floating_point:
            eps = args[3] if len(args) > 3 else kwargs.get("eps")
            if eps is None:
                kwargs = {**kwargs, "eps": torch.finfo(self._dtype).eps}
                args = args[:3]
        return super().call_function(target, args, kwargs)


class Widened(TorchDispatchMode):
    """Every operator in float64, whatever dtypes the graph names."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if draws and func not in _DRAWS_THE_SAME:  # float64 takes other bits of the generator
            args, kwargs = pytree.tree_map(_narrow, (args, kwargs))
            return pytree.tree_map(wide, func(*args, **kwargs))
        args, kwargs = pytree.tree_map(wide, (args, kwargs))
        return func(*args, **kwargs)


def wide(leaf: Any) -> Any:
    """A tensor or a dtype as float64, where it is floating."""
    if isinstance(leaf, torch.dtype):
        return torch.float64 if leaf.is_floating_point else _WIDE.get(leaf, leaf)
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return leaf.to(wide(leaf.dtype))
    return leaf


def _narrow(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype is torch.float64 else leaf


def run(
    make: Callable[[Recorder], Callable[..., Any]],
    module: fx.GraphModule,
    args: Sequence[Any],
    *,
    names: Sequence[str],
    grad: bool,
    in_float64: bool = False,
    before: Sequence[Any] | None = None,
    wanted: frozenset[str] = frozenset(),
) -> Outcome:
    """Runs a graph once.

    Args:
        make: from what runs the graph to what is called with the inputs.
        module: the graph.
        args: its inputs.
        names: of its inputs, for people.
        grad: whether to differentiate.
        in_float64: whether everything is computed in float64.
        before: inputs of a call before this one; the tensors then get the values of `args`.
        wanted: names of nodes whose values are kept.
    """
    recorder = Recorder(module, wanted)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(same_random_numbers(args))
        stack.enter_context(torch.set_grad_enabled(grad))
        first = args if before is None else before
        leaves, given = _copies(first, grad=grad, widened=in_float64)
        if in_float64:
            for device in {t.device for t in leaves if isinstance(t, Tensor)}:
                stack.enter_context(without_autocast(device))
            stack.enter_context(_default_float64())
            stack.enter_context(Widened())
        call = make(recorder)
        if before is not None:
            call(*given)
            with torch.no_grad():
                for held, value in zip(given, args, strict=True):
                    if isinstance(held, Tensor):
                        held.copy_(value)
            recorder.values.clear()
        kept = [t.detach().clone() if _may_be_written(t) else None for t in given]
        returned = _tensors(call(*given))
        outcome = Outcome(values=recorder.values)
        for index, t in enumerate(returned):
            outcome.tensors[f"output {index}"] = t.detach()
        for name, held, value in zip(names, given, kept, strict=True):
            if value is not None and not torch.equal(held, value):
                outcome.tensors[name] = held.detach()
        if grad:
            _differentiate(returned, leaves, names, outcome)
    return outcome


def _may_be_written(held: Any) -> bool:
    """Whether an input is compared by value: `batch_norm` writes to some and bumps no version."""
    return isinstance(held, Tensor) and not held.requires_grad


def _tensors(returned: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]


def _copies(args: Sequence[Any], *, grad: bool, widened: bool) -> tuple[list[Any], list[Any]]:
    """Leaves to differentiate by, and what the graph is called with: a copy for each tensor."""
    leaves, given = [], []
    for arg in args:
        if not isinstance(arg, Tensor):
            leaves.append(arg)
            given.append(arg)
            continue
        copied = arg.detach().clone()
        leaf = wide(copied) if widened else copied
        differentiable = leaf.is_floating_point() or leaf.is_complex()
        leaf.requires_grad_(grad and arg.requires_grad and differentiable)
        leaves.append(leaf)
        # what an earlier graph made may be written to, which autograd forbids for a leaf
        given.append(leaf.clone() if leaf.requires_grad and not arg.is_leaf else leaf)
    return leaves, given


def _differentiate(
    returned: list[Tensor], leaves: list[Any], names: Sequence[str], outcome: Outcome
) -> None:
    """Gradients of a number that depends on every output element in a way of its own.

    A plain sum would not do: that of a LayerNorm is constant.
    """
    total: Any = None
    for index, output in enumerate(returned):
        if not output.requires_grad:
            continue
        generator = torch.Generator().manual_seed(index)
        probe = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        real = output.real if output.is_complex() else output
        term = (real * probe.to(real.device, real.dtype)).double().sum()
        total = term if total is None else total + term
    wanted = [
        (name, leaf)
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if total is None or not wanted:
        return
    grads = torch.autograd.grad(total, [leaf for _, leaf in wanted], allow_unused=True)
    for (name, _), gradient in zip(wanted, grads, strict=True):
        if gradient is not None:
            outcome.tensors[f"gradient of {name}"] = gradient
            outcome.gradients.add(f"gradient of {name}")


@contextmanager
def same_random_numbers(args: Sequence[Any]) -> Iterator[None]:
    """Leaves the random number generators as they are."""
    devices = {t.device.index for t in args if isinstance(t, Tensor) and t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        yield


@contextmanager
def _default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
