"""Torch devices: the default one, and each in words."""

from __future__ import annotations

import platform

import torch

__all__ = ["device", "where"]


def device(name: str | None = None) -> str:
    """A torch device in words; the one that runs by default when none is named.

    Examples
    --------
    >>> device("cpu").startswith("CPU (")
    True
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        threads = torch.get_num_threads()
        kind = "CPU" if name == "cpu" else name
        return f"{kind} ({platform.machine()}, {threads} thread{'s' * (threads != 1)})"
    found = torch.cuda.get_device_properties(name)
    memory = found.total_memory / 2**30
    return f"{found.name} (CUDA {torch.version.cuda}, sm_{found.major}{found.minor}, {memory:.0f} GiB)"


def where(name: str | None) -> torch.device:
    """The device of that name; by default the GPU if there is one."""
    if name is not None:
        return torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
