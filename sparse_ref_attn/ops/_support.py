"""Who can compute a call of `gather_attention`, and why another cannot.

One predicate per backend returns the reasons against it; an empty list means that it can. The same
predicate picks a backend and explains a refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import ConfigError

__all__ = ["ORDER", "Call", "choose", "order_for", "reasons"]

# The order in which "auto" tries them. No row has been measured by this project yet: the cards' rows follow
# published figures, and `benchmarks/bench_ops.py` prints what should replace them.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("sdpa",),
    "cuda, one item": ("sdpa",),  # one gather costs 1-3 % of the attention it feeds
    "cuda, several items": ("sdpa",),
}


class Call(NamedTuple):
    """What the choice depends on.

    ``items`` is the batch size, ``per_head`` whether key/value heads have selections of their own, ``aligned`` whether
    every row of every operand starts at a multiple of 16 bytes.
    """

    device: torch.device
    dtype: torch.dtype
    channels: int
    items: int = 1
    per_head: bool = False
    aligned: bool = True


def _sdpa(call: Call) -> list[str]:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return [] if call.dtype in floats else [f"needs float16, bfloat16, float32 or float64, got {call.dtype}"]


_PREDICATES: dict[str, Callable[[Call], list[str]]] = {"sdpa": _sdpa}


def reasons(backend: str, call: Call) -> list[str]:
    """Why `backend` cannot do `call`; empty when it can."""
    return _PREDICATES[backend](call)


def order_for(call: Call) -> tuple[str, ...]:
    """The row of `ORDER` for a call; devices other than CUDA take the CPU's."""
    if call.device.type != "cuda":
        return ORDER["cpu"]
    return ORDER["cuda, several items" if call.items > 1 or call.per_head else "cuda, one item"]


def choose(backend: str, call: Call) -> str:
    """The backend to use: `backend` itself, or for "auto" the first that can.

    Raises
    ------
    ConfigError
        If it cannot do the call (each backend tried, with its reasons).
    """
    tried = order_for(call) if backend == "auto" else (backend,)
    against = {name: reasons(name, call) for name in tried}
    for name, why in against.items():
        if not why:
            return name
    told = "; ".join(f"{name}: {', '.join(why)}" for name, why in against.items())
    raise ConfigError(f"the backend must be able to do the call, got {told}")
