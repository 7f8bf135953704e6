"""Time, memory and launches on a GPU, and the same on a CPU, so that the benchmark runs there."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


class Bench:
    """What measures on one device.

    Args:
        device: "cuda" or "cpu".
        seconds: of measuring one set of candidates, at most.
        cold: bytes that are written between calls, so that nothing is left in the caches; 0: none.
    """

    def __init__(self, device: str, seconds: float, cold: int = 0) -> None:
        self.device, self.seconds = device, seconds
        self._flush = torch.empty(cold, dtype=torch.int8, device=device) if cold else None

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def medians_us(self, calls: Mapping[str, Call], *, most: int = 200) -> dict[str, float]:
        """Median microseconds of each call. They take turns: a clock that falls hits all."""
        for call in calls.values():
            for _ in range(3):
                call()
        self.synchronise()
        times: dict[str, list[float]] = {name: [] for name in calls}
        ends = time.monotonic() + self.seconds
        rounds = 0
        while rounds < 3 or (rounds < most and time.monotonic() < ends):
            for name, call in calls.items():
                times[name].append(self._once_us(call))
            rounds += 1
        return {name: statistics.median(found) for name, found in times.items()}

    def _once_us(self, call: Call) -> float:
        if self._flush is not None:
            self._flush.zero_()
        if self.device != "cuda":
            begun = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - begun)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end)

    def peak_bytes(self, call: Call) -> int | None:
        """The most that a call allocates beyond what is held before it; None on a CPU."""
        if self.device != "cuda":
            call()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Call) -> int:
        """Kernels that one call runs on the GPU; on a CPU, the operators that it calls."""
        from torch.profiler import ProfilerActivity, profile

        call()
        self.synchronise()
        on_gpu = self.device == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities, acc_events=True) as seen:
            call()
            self.synchronise()
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        names = [event.name for event in seen.events() if event.device_type == kind]
        return len([name for name in names if on_gpu or name.startswith("aten::")])

    def copy_bandwidth(self, megabytes: int) -> float:
        """Bytes a second of a copy: what it reads and what it writes."""
        count = megabytes * 2**20
        source = torch.zeros(count, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        us = self.medians_us({"copy": lambda: target.copy_(source)})["copy"]
        return 2e6 * count / us
