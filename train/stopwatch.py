"""Stopwatch: time and memory of steps that the host launches ahead of the device."""

import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor


class Stopwatch:
    """Marks of moments in the work of a device, and what it writes for the host; on a CPU work is done as it comes."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._device = device

    def mark(self) -> float | torch.cuda.Event:
        """The moment when what was launched until now is done."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
        """Seconds from one mark to another; waits until both have come."""
        if not self._cuda:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    def fetch(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """A copy on the host, under way, and what waits for it."""
        if not self._cuda:
            return tensor, lambda: None
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return copy, event.synchronize

    def memory(self) -> int:
        """Peak bytes so far: of the device's allocator, or of this process on a CPU."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
