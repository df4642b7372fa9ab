"""Keeps the C library's allocator from handing large tensors back to the kernel between operations.

glibc maps every block above 32 MB anew and the kernel clears it page by page, so an operation just above that size pays
for page faults that one just below does not: the dense run would look slow for the wrong reason. Even a heap that never
shrinks still grows now and then, where the freed blocks lie so that a large tensor fits none of them; `reserve` lets it
grow once, before anything is timed, and `page_faults` shows whether that was enough.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["keep_freed_memory", "page_faults", "peak_memory", "peak_of", "reserve"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Serve all blocks from a heap that never shrinks; False where the C library is not glibc."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))


def reserve(size: int) -> None:
    """Make the heap hold `size` more bytes whose pages are already there (after `keep_freed_memory`)."""
    torch.empty(size, dtype=torch.uint8).fill_(1)


def page_faults() -> int:
    """Pages that the kernel has given this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_memory() -> int:
    """Most memory this process has held, in bytes (Linux)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that `call` holds at once, beyond those that were there before it.

    On a card the allocator says it; on a CPU every allocation is recorded, which is slow: never time such a call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
