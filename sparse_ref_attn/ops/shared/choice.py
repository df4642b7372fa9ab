"""How a backend is chosen: the one that is named, or the first that can in the order of "auto".

Each op's ``backends.py`` has one predicate per backend, which returns the reasons against it; an empty list means that
it can. The same predicate picks a backend and explains a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ...errors import ConfigError
from ..verdicts import JUDGED, Kind, order_of

__all__ = ["order_on", "pick", "ranked"]


def order_on(
    device: torch.device, safe: Mapping[str, tuple[str, ...]], kind: Callable[[], Kind], measure: bool
) -> tuple[str, ...]:
    """What "auto" tries on a device: the verdict's order for this kind of call, or the row of `safe`.

    Devices that have no row take the CPU's. With `measure` a verdict that is not known is got.
    """
    row = safe.get(device.type, safe["cpu"])
    return order_of(kind(), row, measure) if device.type in JUDGED else row


def pick(backend: str, order: Sequence[str], predicates: Mapping[str, Callable[[], list[str]]]) -> str:
    """`backend` itself if it can do the call, or for "auto" the first of `order` that can.

    Raises
    ------
    ConfigError
        If none can (each one tried, with its reasons), or the name is unknown.
    """
    if backend != "auto" and backend not in predicates:
        raise ConfigError(f"backend must be one of {('auto', *predicates)}, got {backend!r}")
    tried: dict[str, list[str]] = {}
    for name in order if backend == "auto" else (backend,):
        tried[name] = predicates[name]()
        if not tried[name]:
            return name
    told = "; ".join(f"{name}: {', '.join(why)}" for name, why in tried.items())
    told = told or "none that agrees with the definition on this device (`sra doctor --verify` prints the figures)"
    raise ConfigError(f"the backend must be able to do the call, got {told}")


def ranked(order: Sequence[str], predicates: Mapping[str, Callable[[], list[str]]]) -> dict[str, list[str]]:
    """Every backend of an op with the reasons against it: those that can come first, in the order of "auto"."""
    found = {name: predicates[name]() for name in (*order, *predicates)}
    return dict(sorted(found.items(), key=lambda each: bool(each[1])))
