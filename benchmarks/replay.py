"""Times on a card by replaying a CUDA graph: the kernels alone, without what Python needs to launch them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["replayable", "replayed"]

FLUSH_BYTES = 256 << 20  # more than any card's L2


def replayable(run: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], bool]:
    """A function that does what `run` does, and whether it is a graph's replay; what cannot be captured runs as it is.

    `run` is called three times before, which compiles what is compiled at the first call.
    """
    if device.type != "cuda":
        run()
        return run, False
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # it waits for the device somewhere
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def replayed(run: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Milliseconds of each of `rounds` runs, the cache cold before each."""
    cuda = device.type == "cuda"
    flush: Tensor | None = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if cuda else None
    out = []
    for _ in range(rounds):
        if flush is None:
            begin = time.perf_counter()
            run()
            out.append(1000 * (time.perf_counter() - begin))
            continue
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        out.append(start.elapsed_time(stop))
    return out
