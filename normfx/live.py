"""Live weights: hoisted tensors that follow every update of the parameters they are made from.

An in-place update (an optimizer step, `copy_`, `load_state_dict`) bumps a tensor's version;
`assign=True` hands another tensor to the call; `p.data = t` moves the tensor to other memory. All
three are compared at every call, and memory that was freed since counts as other memory.
`p.data.mul_()` changes none of them: `normfx.refold()` is for that. Neither does `batch_norm` in
training mode, when it updates running statistics: buffers that may be such are compared by value,
on the CPU, where that needs no synchronisation.

Dynamo runs the same compiled code for every module that its guards admit, so the parameters of a
call may be those of another model, or of the next block. Each set of parameters has hoisted tensors
of its own, for as long as its parameters live.

A graph may be right only under conditions (a scale that is divided by is not zero, what `bake_`
made neutral still is). They are computed with the hoisted tensors; where one does not hold, the
graph runs as it came.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from normfx.passes.hoist import Hoisted
from normfx.torch_internals import without_autocast

_alive: weakref.WeakSet[LiveWeights] = weakref.WeakSet()
_alive_lock = threading.Lock()


class _Entry:
    """One set of parameters as last seen, and what was made from them.

    Attributes:
        owners: weak references to the parameters.
        seen: position among the arguments, owner, version and address of each; empty once the
            memory of one is gone, so that an address that comes back is not mistaken for the old.
        copies: position and value of those that may change without a new version.
        hoisted: what was made from them.
        fits: whether the compiled graph may run with it.
    """

    __slots__ = (
        *("__weakref__", "_positions", "_storages"),
        *("copies", "fits", "hoisted", "owners", "seen"),
    )

    def __init__(self, positions: tuple[int, ...] = (), owners: tuple[Any, ...] = ()) -> None:
        self._positions = positions
        self.owners = owners
        self.seen: tuple[tuple[int, Any, int, int], ...] = ()
        self.copies: tuple[tuple[int, torch.Tensor], ...] = ()
        self.hoisted: tuple[torch.Tensor, ...] = ()
        self.fits = True
        self._storages: tuple[Any, ...] = ()

    def look(self, tensors: list[torch.Tensor], *, frozen: bool) -> None:
        """Remembers the parameters as they are now."""
        entry = weakref.ref(self)

        def gone(_: object) -> None:
            held = entry()
            if held is not None:
                held.seen = ()

        self._storages = tuple(weakref.ref(t.untyped_storage(), gone) for t in tensors)
        self.seen = tuple(
            (position, owner, 0 if frozen else t._version, t.data_ptr())
            for position, owner, t in zip(self._positions, self.owners, tensors, strict=True)
        )
        self.copies = tuple(
            (position, t.detach().clone())
            for position, t in zip(self._positions, tensors, strict=True)
            if not frozen and _may_change_unseen(t)
        )

    def is_fresh(self, tensors: list[torch.Tensor], *, frozen: bool) -> bool:
        """Whether these parameters are as they were seen last."""
        return (
            bool(self.seen)
            and all(
                t is owner() and (frozen or (t._version == version and t.data_ptr() == pointer))
                for t, (_, owner, version, pointer) in zip(tensors, self.seen, strict=True)
            )
            and self.keeps_values(dict(zip(self._positions, tensors, strict=True)))
        )

    def keeps_values(self, tensors: Any) -> bool:
        """Whether what is compared by value has its old one; the tensors by their positions."""
        return all(torch.equal(tensors[position], copy) for position, copy in self.copies)


def _may_change_unseen(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be a running statistic, and can be compared without waiting."""
    is_buffer = not isinstance(tensor, torch.nn.Parameter)
    one_a_channel = tensor.dim() == 1 and tensor.is_floating_point()
    return is_buffer and one_a_channel and tensor.device.type == "cpu"


class LiveWeights:
    """Makes the hoisted inputs of a compiled graph, again after a change. Safe under threads.

    Args:
        hoisted: what to compute, and from which arguments of a call.
        frozen: never look for a change of parameters that were seen before.
    """

    def __init__(self, hoisted: Hoisted, *, frozen: bool) -> None:
        self._compute = hoisted.compute
        self._positions = hoisted.positions
        self._strides = [value.stride() for value in hoisted.values]
        self._frozen = frozen
        self._lock = (
            threading.RLock()
        )  # a parameter may die, and its entry with it, while it is held
        self._entries: dict[tuple[int, ...], _Entry] = {}
        self._last = _Entry()
        with _alive_lock:
            _alive.add(self)

    def wrap(self, call: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled callable, with its hoisted inputs made from the parameters of each call.

        Args:
            call: the compiled callable.
            otherwise: what runs in its place, without hoisted inputs, on parameters that do not
                meet the conditions of the rules.
        """

        def run(entry: _Entry, args: tuple[Any, ...]) -> Any:
            return call(*args, *entry.hoisted) if entry.fits else otherwise(*args)

        def with_live_weights(*args: Any) -> Any:
            entry = self._last
            seen = entry.seen
            if not seen:
                return run(self._refreshed(args), args)
            for index, owner, version, pointer in seen:
                argument = args[index]
                if (
                    argument._version != version
                    or argument.data_ptr() != pointer
                    or argument is not owner()
                ):
                    return run(self._refreshed(args), args)
            if entry.copies and not entry.keeps_values(args):
                return run(self._refreshed(args), args)
            return run(entry, args)

        def with_frozen_weights(*args: Any) -> Any:
            entry = self._last
            seen = entry.seen
            if seen and all(args[index] is owner() for index, owner, _, _ in seen):
                return run(entry, args)
            return run(self._refreshed(args), args)

        return with_frozen_weights if self._frozen else with_live_weights

    def forget(self) -> None:
        """Makes the next call compute everything again."""
        with self._lock:
            for entry in (self._last, *self._entries.values()):
                entry.seen = ()

    def _refreshed(self, args: tuple[Any, ...]) -> _Entry:
        """The entry of these parameters, its tensors at the same addresses if it had some."""
        tensors = [args[index] for index in self._positions]
        with self._lock:
            entry = self._entry(tensors)
            if not entry.is_fresh(tensors, frozen=self._frozen):
                made, entry.fits = self._run(tensors)
                entry.hoisted = _into(entry.hoisted, made)
                entry.look(tensors, frozen=self._frozen)
            self._last = entry
            return entry

    def _entry(self, tensors: list[torch.Tensor]) -> _Entry:
        """The entry of these parameters. It goes when one of them does."""
        key = tuple(map(id, tensors))
        known = self._entries.get(key)
        if known is not None and all(o() is t for o, t in zip(known.owners, tensors, strict=True)):
            return known
        live = weakref.ref(self)

        def died(_: object) -> None:
            held = live()
            if held is not None:
                with held._lock:
                    gone = held._entries.pop(key, None)
                    if held._last is gone:
                        held._last = _Entry()

        owners = tuple(weakref.ref(t, died) for t in tensors)
        entry = self._entries[key] = _Entry(self._positions, owners)
        return entry

    def _run(self, tensors: list[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], bool]:
        """The hoisted tensors, and whether all conditions are met."""
        with torch.inference_mode(False), torch.no_grad(), without_autocast(tensors[0].device):
            made = self._compute(*tensors)
            count = len(self._strides)
            laid_out = tuple(
                tensor if tensor.stride() == stride else _restrided(tensor, stride)
                for tensor, stride in zip(made[:count], self._strides, strict=True)
            )
            return laid_out, all(map(bool, made[count:]))


def _into(
    held: tuple[torch.Tensor, ...], made: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """New numbers at the addresses of the old ones, if there are any like them."""
    if [(t.device, t.dtype) for t in held] != [(t.device, t.dtype) for t in made]:
        return made
    with torch.inference_mode(False), torch.no_grad():
        for old, new in zip(held, made, strict=True):
            old.copy_(new)
    return held


def _restrided(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The same numbers laid out as the compiled code expects them."""
    laid_out = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return laid_out.copy_(tensor)


def refold(*_: torch.nn.Module) -> None:
    """Makes every compiled graph compute its hoisted weights again at its next call.

    For updates that no tensor reports: `p.data.mul_(2)`, or a write by another process to shared
    memory. All others are followed without it.
    """
    with _alive_lock:
        living = list(_alive)
    for live in living:
        live.forget()
