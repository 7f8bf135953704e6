"""The numerics contract of normfx, as assertions.

    error(got) <= max(2 * error(eager), 1 ulp of the dtype at the scale of the result)

where the error is the largest distance from a run in float64. There is no other tolerance in the tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfx.numerics import compare

STRICT = {"lowering": "eager", "strict": True}


def compiled(
    model: Callable[..., Any], dynamic: bool | None = None, **options: Any
) -> Callable[..., Any]:
    """The model through normfx; unless said otherwise without Inductor, and with every error raised."""
    return torch.compile(model, backend="normfx", dynamic=dynamic, options={**STRICT, **options})


def assert_within_contract(
    got: Tensor, eager: Tensor, exact: Tensor, *, scale: float | None = None, what: str = "output"
) -> None:
    """Holds one tensor to the contract.

    Args:
        got: what normfx computed.
        eager: what the model itself computes in the same dtype.
        exact: the float64 result.
        scale: the size that one ulp is relative to; without it, the largest absolute value of `exact`.
        what: the name of the tensor, for the message.
    """
    found = compare(got, eager, exact, scale=scale)
    assert found.within, f"{what}: {found}"


def assert_agrees(
    model: nn.Module,
    *inputs: Any,
    grad: bool = False,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Runs a model eagerly, in float64 and through normfx, and holds outputs (and gradients) to the contract.

    Args:
        model: a module; each run has a copy of it, so that its buffers see one call each.
        inputs: arguments of the call; floating tensors are widened for the float64 run.
        grad: compare the gradients of all parameters too.
        dynamic: as in `torch.compile`.
        options: added to lowering=eager and strict.

    Returns:
        The compiled callable.
    """
    eager_model, got_model = copy.deepcopy(model), copy.deepcopy(model)
    exact_model = copy.deepcopy(model).double()
    fast = compiled(got_model, dynamic=dynamic, **(options or {}))
    runs = []
    for call, owner, widen in (
        (eager_model, eager_model, False),
        (exact_model, exact_model, True),
        (fast, got_model, False),
    ):
        arguments = pytree.tree_map(_widened if widen else _copied, inputs)
        torch.manual_seed(1)  # dropout
        with torch.set_grad_enabled(grad):
            outputs = tensors_of(call(*arguments))
        if grad:
            _loss(outputs).backward()
        runs.append((outputs, owner))
    (eager, eager_model), (exact, exact_model), (got, got_model) = runs
    assert len(got) == len(eager)
    for index, (mine, theirs, truth) in enumerate(zip(got, eager, exact, strict=True)):
        assert_within_contract(
            mine.detach(), theirs.detach(), truth.detach(), what=f"output {index}"
        )
    for (name, mine), theirs, truth in zip(
        got_model.named_buffers(), eager_model.buffers(), exact_model.buffers(), strict=True
    ):
        assert_within_contract(mine, theirs, truth, what=name)
    if grad:
        assert_gradients_within_contract(got_model, eager_model, exact_model)
    return fast


def assert_gradients_within_contract(got: nn.Module, eager: nn.Module, exact: nn.Module) -> None:
    """Holds every gradient to the contract.

    One ulp is relative to the largest gradient of the model: a bias in front of a norm has a true gradient of zero,
    and what eager leaves there is rounding noise of the size of the others.
    """
    scale = max(p.grad.abs().max().item() for p in exact.parameters() if p.grad is not None)
    for (name, mine), theirs, truth in zip(
        got.named_parameters(), eager.parameters(), exact.parameters(), strict=True
    ):
        assert (mine.grad is None) == (theirs.grad is None), f"{name}: a gradient is missing"
        if mine.grad is not None:
            assert_within_contract(
                mine.grad, theirs.grad, truth.grad, scale=scale, what=f"grad of {name}"
            )


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _loss(outputs: list[Tensor]) -> Tensor:
    """A scalar that depends on every element in another way (a plain sum of a LayerNorm is constant)."""
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.requires_grad:
            generator = torch.Generator().manual_seed(2)
            probe = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            total = total + (output * probe.to(output.dtype)).double().sum()
    return total


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _widened(leaf: Any) -> Any:
    copied = _copied(leaf)
    return copied.double() if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point else copied
