"""Reference keys and values that a run held between its steps: bytes, exactness, and how far they had moved."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..record import RunRecord

__all__ = ["stored", "tiled"]


def stored(record: RunRecord) -> dict[str, Any] | None:
    """Bytes of the reference K/V held between steps, and of those of every token, and their drift; None without any."""
    if not record.dense_cache_bytes:
        return None
    held = [step.cache_bytes for step in record.steps]
    moved = [(step.index, step.drift) for step in record.steps if step.drift is not None]
    return {
        "dense_bytes": record.dense_cache_bytes,
        "peak_bytes": max(held),
        "last_bytes": held[-1],
        "exactness": record.exactness,
        "drift": [
            {"step": index, "median": _finite(drift.median()), "worst": _finite(drift.max())} for index, drift in moved
        ],
    }


def tiled(record: RunRecord) -> dict[str, Any] | None:
    """How many tiles read tokens of their own, and what they see the others by; None where one ranking served all."""
    tiles = record.tiles
    if tiles is None:
        return None
    means = max(step.means for step in record.steps)
    return {"tile": tiles.side, "tiles": list(tiles.shape), "cell": tiles.cell or None, "means": means}


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
