"""Time on a device without stopping it: CUDA events where there are any, the host clock elsewhere."""

from __future__ import annotations

import time

import torch

__all__ = ["Stopwatch", "Stopwatches"]


class Stopwatch:
    """Starts when made. `seconds` waits for the device, so read it after the run."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._first = self._mark(device)
        self._last = self._first

    def _mark(self, device: torch.device) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def stop(self, device: torch.device) -> None:
        self._last = self._mark(device)

    def seconds(self) -> float:
        if isinstance(self._first, float) and isinstance(self._last, float):
            return self._last - self._first
        assert isinstance(self._first, torch.cuda.Event)
        assert isinstance(self._last, torch.cuda.Event)
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1000


class Stopwatches(list[Stopwatch]):
    """Stopwatches of one step's calls; called, their sum in seconds."""

    def __call__(self) -> float:
        return sum(watch.seconds() for watch in self)
