"""What a process holds: resident bytes, and the tensors and objects that live."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Held"]


@dataclass(frozen=True)
class Held:
    """Of this process, after a collection and with freed pages given back.

    Attributes
    ----------
    resident : int
        Bytes in memory (Linux); 0 elsewhere.
    tensors, bytes : int
        Tensors that live, and the bytes of their storages.
    objects : int
        Everything that the collector knows.

    What was frozen (``gc.freeze``) is not counted.
    """

    resident: int
    tensors: int
    bytes: int
    objects: int

    @classmethod
    def now(cls) -> Held:
        for _ in range(3):
            gc.collect()
        libc = ctypes.CDLL(ctypes.util.find_library("c"))
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        objects = gc.get_objects()
        tensors = [x for x in objects if type(x) in (torch.Tensor, torch.nn.Parameter)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        statm = Path("/proc/self/statm")
        resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
        return cls(resident, len(tensors), sum(storages.values()), len(objects))
