"""Whether stored keys and values will fit into a device's memory, seen before a run begins."""

from __future__ import annotations

import torch

from ...errors import BudgetError

__all__ = ["check_room", "free_bytes"]


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where nobody says."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_room(device: torch.device, rows: int, needed: int) -> None:
    """Raise where what is stored of `rows` reference tokens, `needed` bytes with all that goes with it, does not fit.

    Raises
    ------
    BudgetError
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise BudgetError(
            f"keys and values of {rows} reference tokens take {needed / 1e9:.2f} GB for each branch of guidance, and "
            f"must fit into what is free on {device}, got {free / 1e9:.2f} GB: give smaller references or fewer, keep "
            'fewer by a selector that measures no attention, or drop tokens ("sparse-context", "recast", or '
            'execute="tokens")'
        )
