"""Live weights: hoisted buffers that follow every update of the parameters they are computed from.

An in-place update (an optimizer step, `copy_`, `load_state_dict`) bumps a tensor's version;
`assign=True` hands another tensor to the call; `p.data = t` moves the tensor to other memory. All
three are compared at every call. `p.data.mul_()` changes none of them: `normfx.refold()` is for
that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from normfx.passes.hoist import Hoisted

_alive: weakref.WeakSet[LiveWeights] = weakref.WeakSet()
_alive_lock = threading.Lock()


class LiveWeights:
    """Recomputes the hoisted buffers when a parameter has changed. Safe under threads.

    Args:
        hoisted: what to compute, and from which arguments of a call.
        module: the captured graph module, which holds the buffers.
        frozen: compute once, and never look again.
    """

    def __init__(self, hoisted: Hoisted, module: torch.nn.Module, *, frozen: bool) -> None:
        self._compute = hoisted.compute
        self._positions = hoisted.positions
        self._buffers = [module.get_buffer(name) for name in hoisted.names]
        self._frozen = frozen
        self._lock = threading.Lock()
        self._seen: list[tuple[Any, int, int]] = []
        with _alive_lock:
            _alive.add(self)

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled callable behind a check of the parameters among its arguments."""
        positions, frozen = self._positions, self._frozen

        def with_live_weights(*args: Any) -> Any:
            seen = self._seen
            if not seen:
                self._refresh(args)
            elif not frozen:
                # not strict: this runs at every call, and the lengths are equal
                for index, (reference, version, pointer) in zip(positions, seen, strict=False):
                    argument = args[index]
                    if (
                        argument is not reference()
                        or argument._version != version
                        or argument.data_ptr() != pointer
                    ):
                        self._refresh(args)
                        break
            return call(*args)

        return with_live_weights

    def forget(self) -> None:
        """Makes the next call recompute everything."""
        self._seen = []

    def _refresh(self, args: tuple[Any, ...]) -> None:
        with self._lock:
            tensors = [args[index] for index in self._positions]
            seen = [
                (weakref.ref(t), 0 if self._frozen else t._version, t.data_ptr()) for t in tensors
            ]
            with torch.inference_mode(False), torch.no_grad(), _without_autocast(tensors):
                for buffer, new in zip(self._buffers, self._compute(*tensors), strict=True):
                    buffer.copy_(new)
            self._seen = seen


def _without_autocast(tensors: list[torch.Tensor]) -> torch.autocast:
    return torch.autocast(tensors[0].device.type, enabled=False)


def refold(*_: torch.nn.Module) -> None:
    """Makes every compiled graph compute its folded weights again at its next call.

    For updates that no tensor reports: `p.data.mul_(2)`, or a write by another process to shared
        memory. All others
    are followed without it.
    """
    with _alive_lock:
        for live in list(_alive):
            live.forget()
