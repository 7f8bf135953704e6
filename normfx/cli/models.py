"""Models: what MODEL and DATA name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfx.cli.errors import ModelError, UsageError, one_line


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and the arguments of one call."""

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """Calls the model."""
        return self.model(*self.args, **self.kwargs)


def load(name: str, *, device: str, dtype: str | None, train: bool, needs_inputs: bool) -> Loaded:
    """The model that a name stands for, on a device and in a dtype.

    Args:
        name: `package.module:factory` or `hf:FAMILY[:SIZE]`.
        device: as torch names it.
        dtype: of its parameters and floating inputs, or None: as they are.
        train: training mode, else eval mode.
        needs_inputs: whether the arguments of a call are wanted too.

    Raises:
        UsageError: there is no such module, factory, family, size or device.
        ModelError: building it failed.
    """
    torch.manual_seed(0)
    if name.startswith("hf:"):
        from normfx.cli.hugging_face import build

        loaded = build(name)
    else:
        loaded = _unpacked(name, _made(name, resolve(name)))
    if needs_inputs and not (loaded.args or loaded.kwargs):
        raise UsageError(
            f"{name} gives a model without inputs: let the factory return (model, args) or "
            "(model, args, kwargs)"
        )
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    wanted = None if dtype is None else getattr(torch, dtype)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        floating = leaf.is_floating_point()
        return leaf.to(target, wanted if floating and wanted is not None else leaf.dtype)

    model = loaded.model
    if isinstance(model, nn.Module):
        model = model.to(target) if wanted is None else model.to(target, wanted)
        model = model.train(train)
    args, kwargs = pytree.tree_map(moved, (loaded.args, loaded.kwargs))
    return Loaded(model, tuple(args), dict(kwargs))


def resolve(name: str) -> Any:
    """The object that `package.module:name` is.

    Raises:
        UsageError: it is not there.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise UsageError(f"expected package.module:factory or hf:FAMILY[:SIZE], got {name!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(f"importing {module_name} failed: {error}") from error
        raise UsageError(
            f"there is no module {module_name!r} here ({here}) or installed"
        ) from error
    except Exception as error:
        raise ModelError(f"importing {module_name} failed: {one_line(error)}") from error
    for step in path.split("."):
        if not hasattr(found, step):
            raise UsageError(f"module {module_name!r} has no {path!r}")
        found = getattr(found, step)
    return found


def data(name: str) -> Any:
    """The batches that DATA names.

    Raises:
        UsageError: it is not there, or no iterable.
        ModelError: making it failed.
    """
    found = resolve(name)
    if callable(found) and not hasattr(found, "__iter__"):
        found = _made(name, found)
    if not hasattr(found, "__iter__"):
        raise UsageError(f"{name} gives {type(found).__name__}, expected an iterable of batches")
    return found


def _made(name: str, factory: Any) -> Any:
    if isinstance(factory, nn.Module) or not callable(factory):
        return factory
    try:
        return factory()
    except Exception as error:
        raise ModelError(f"{name}() failed: {one_line(error)}") from error


def _unpacked(name: str, made: Any) -> Loaded:
    """The model and the arguments of a call that a factory gave."""
    parts = list(made) if isinstance(made, tuple) else [made]
    model, args, kwargs = [*parts, (), {}][:3] if len(parts) != 2 else [*parts, {}]
    if isinstance(args, Mapping):
        args, kwargs = (), {**args, **kwargs}
    elif not isinstance(args, (tuple, list)):
        args = (args,)
    if len(parts) > 3 or not callable(model) or not isinstance(kwargs, Mapping):
        raise UsageError(
            f"{name} gives {type(made).__name__}, expected a model, (model, args) or "
            "(model, args, kwargs)"
        )
    return Loaded(model, tuple(args), dict(kwargs))
