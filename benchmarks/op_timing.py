"""Times of several runs in turn, each with a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["measure"]


def measure(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, cold cache, one warm-up round; never two of the same in a row."""
    flush = torch.empty(256 << 20 if device.type == "cuda" else 32 << 20, dtype=torch.uint8, device=device)
    out: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            flush.zero_()
            if device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                stop.record()
                torch.cuda.synchronize(device)
                took = start.elapsed_time(stop)
            else:
                begin = time.perf_counter()
                run()
                took = 1000 * (time.perf_counter() - begin)
            if turn:
                out[name].append(took)
    return out
