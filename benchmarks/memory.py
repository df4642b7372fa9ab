"""Keeps the C library's allocator from handing large tensors back to the kernel between operations.

glibc maps every block above 32 MB anew and clears it page by page, so an operation just above that size pays for page
faults that one just below does not: the dense run would look slow for the wrong reason.
"""

from __future__ import annotations

import ctypes
import ctypes.util

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Serve all blocks from a heap that never shrinks; False where the C library is not glibc."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))
