"""The component of each gradient along its parameter, in float64: zero where a scale is not seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import normfx

# Claims are exact up to eps, so that a test needs one that float64 does not see.
EPS = 1e-30
# Rounding is of the size of the eps of float64; what is not zero is above its root.
ZERO = torch.finfo(torch.float64).eps ** 0.5


def with_small_eps(model: nn.Module) -> nn.Module:
    """The model, each of its norms with an eps that float64 does not see."""
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = EPS
    return model


def radial(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """w * grad of every parameter, relative to the loss, or to |w| |grad| of some parameter.

    The model becomes float64.
    """
    exact = model.double().requires_grad_()
    exact.zero_grad()
    torch.manual_seed(1)  # dropout
    outputs: Any = exact(*(x.double() if x.is_floating_point() else x for x in inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    terms = [y * torch.randn_like(y) for y in outputs]
    sum(term.sum() for term in terms).backward()
    read = {name: p for name, p in exact.named_parameters() if p.grad is not None}
    sizes = [float(p.detach().norm() * p.grad.norm()) for p in read.values()]
    # where every gradient is zero, what is there is rounding
    scale = max(*sizes, sum(float(term.detach().abs().sum()) for term in terms))
    return {name: p.detach() * p.grad / scale for name, p in read.items()}


def largest(claim: normfx.Invariance, product: Tensor) -> float:
    """The largest |<w, grad>| of the blocks of a claim."""
    return claim.dot(product, torch.ones_like(product)).abs().max().item()
