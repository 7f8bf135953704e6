"""Selection: whether a kernel or Inductor's own code computes a norm, by measurement on the device.

`Selector` is asked with a `Contest`: two graphs of the same operands, of which one calls a kernel.
It times both once for each (form, sizes, dtypes, device), keeps the times on disk, and says by how
much one of them won. A kernel wins only where it is measured to be faster.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from normfx.options import Kernels

log = logging.getLogger(__name__)

# A kernel has to win by more than two runs of one program differ.
MARGIN = 0.98


@dataclass(frozen=True, slots=True)
class Contest:
    """One decision.

    Attributes:
        operator: the name of the kernel.
        form: what it computes, as text.
        operands: (shape, dtype) of each; sizes that are no columns are in a bucket: the next power
            of two.
        device: where.
        grad: whether a backward pass is timed with it.
        graphs: makes both sides, for these operands: with the kernel, and what Inductor would get.
    """

    operator: str
    form: str
    operands: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    device: torch.device
    grad: bool
    graphs: Callable[[], tuple[fx.GraphModule, fx.GraphModule]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who won.

    Attributes:
        kernel_us: microseconds of a call, or None: it was not timed.
        inductor_us: those of Inductor's code.
        failure: what went wrong when it was timed, or "".
    """

    kernel_us: float | None = None
    inductor_us: float | None = None
    failure: str = ""

    @property
    def timed(self) -> bool:
        """Whether there are times."""
        return self.kernel_us is not None and self.inductor_us is not None

    @property
    def kernel_wins(self) -> bool:
        """Whether the kernel is faster, by more than noise."""
        if self.kernel_us is None or self.inductor_us is None:
            return False
        return self.kernel_us < MARGIN * self.inductor_us

    def __str__(self) -> str:
        if self.kernel_us is None or self.inductor_us is None:
            return f"not timed{self.failure and f': {self.failure}'}"
        gain = self.inductor_us / self.kernel_us if self.kernel_us else math.inf
        return (
            f"kernel {self.kernel_us:.1f} us, Inductor {self.inductor_us:.1f} us ({gain:.2f} times)"
        )


# (a graph, operands, whether with its backward pass, Inductor's settings) -> microseconds a call
Timer = Callable[[fx.GraphModule, "list[Tensor]", bool, Mapping[str, Any]], float]


@dataclass(frozen=True, slots=True)
class Selector:
    """Decides contests; one for each compilation.

    Attributes:
        kernels: the option of this name.
        timer: measures one side; None: only what is on disk is known, and nothing is measured.
        settings: of Inductor, for the timer.
        folder: where winners are kept; None: Inductor's cache folder.
        devices: the types of device on which "auto" has something to choose from.
    """

    kernels: Kernels = "auto"
    timer: Timer | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    devices: tuple[str, ...] = ("cuda",)

    def considers(self, device: torch.device) -> bool:
        """Whether a kernel may be chosen on a device; where not, nothing more is asked."""
        if self.kernels == "inductor":
            return False
        return self.kernels == "triton" or device.type in self.devices

    def verdict(self, contest: Contest) -> Verdict:
        """The times of a contest: from the disk, or measured now and written there."""
        path = self._path(contest)
        kept = _read(path)
        if kept is not None or self.timer is None:
            return kept or Verdict()
        try:
            verdict = Verdict(*self._times(contest, self.timer))
        except Exception as error:  # a driver, memory, a compiler: the model runs without a kernel
            log.warning("%s could not be timed, so Inductor's code is used", contest.operator)
            return Verdict(failure=f"{type(error).__name__}: {error}".splitlines()[0])
        _write(path, contest, verdict)
        return verdict

    def _times(self, contest: Contest, timer: Timer) -> tuple[float, float]:
        """Microseconds of the kernel and of Inductor's code."""
        operands = [
            torch.randn(shape, device=contest.device, dtype=dtype, requires_grad=contest.grad)
            for shape, dtype in contest.operands
        ]
        # in turns, so that a clock that slows down does so for both; the best of each
        sides: tuple[list[float], list[float]] = ([], [])
        graphs = contest.graphs()
        for _ in range(2):
            for graph, times in zip(graphs, sides, strict=True):
                times.append(timer(graph, operands, contest.grad, self.settings))
        return min(sides[0]), min(sides[1])

    def _path(self, contest: Contest) -> Path:
        facts = (
            contest.operator,
            contest.form,
            contest.operands,
            contest.grad,
            _device_name(contest.device),
            sorted((name, repr(value)) for name, value in self.settings.items()),
            _versions(),
            source_hash(),
        )
        name = hashlib.sha256(repr(facts).encode()).hexdigest()
        return (self.folder or default_folder()) / f"{name}.json"


def default_folder() -> Path:
    """A folder beside Inductor's own caches, so that TORCHINDUCTOR_CACHE_DIR moves it as well."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "normfx-kernels"


@cache
def source_hash() -> str:
    """A hash of the sources of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _versions() -> tuple[str, str]:
    try:
        import triton
    except ImportError:
        return torch.__version__, ""
    return torch.__version__, triton.__version__


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(path: Path) -> Verdict | None:
    """What is kept, or None: a file that cannot be read is measured again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Verdict(float(kept["kernel_us"]), float(kept["inductor_us"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, contest: Contest, verdict: Verdict) -> None:
    """In one step, since another process may read it; a cache that cannot be written is none."""
    text = json.dumps(
        {
            "operator": contest.operator,
            "form": contest.form,
            "operands": [[list(shape), str(dtype)] for shape, dtype in contest.operands],
            "grad": contest.grad,
            "device": _device_name(contest.device),
            "kernel_us": verdict.kernel_us,
            "inductor_us": verdict.inductor_us,
        },
        indent=1,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        return
