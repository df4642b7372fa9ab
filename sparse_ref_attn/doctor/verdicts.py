"""What was measured of every backend here, and which of them auto takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..ops.verdicts import JUDGED
from ..ops.verdicts.table import verify as verify_kinds
from .hardware import device, where

__all__ = ["verdict_lines", "verify"]


def verify(name: str | None = None) -> Iterator[dict[str, Any]]:
    """Compare every backend of every op with float64, and time those that agree, on a device; see `ops.verdicts`.

    Parameters
    ----------
    name : str, optional
        A torch device. Default: the GPU if there is one.

    Yields
    ------
    dict
        ``kind`` in words, and as JSON types what `ops.verdicts.Verdict` holds: ``order``, ``milliseconds``, ``errors``
        (over what is allowed), ``unusable``, ``unable``.
    """
    for kind, verdict in verify_kinds(where(name)):
        yield {"kind": kind.name, **verdict._asdict()}


def verdict_lines(name: str | None = None) -> Iterator[str]:
    """What `verify` finds, as the lines of a table, each as soon as it is known."""
    at = where(name)
    yield f"{device(name)}"
    if at.type in JUDGED:
        yield "auto takes the first of each kind, from now on"
    else:
        yield f"auto does not go by these times on {at.type}: it is fixed there, so that results repeat"
    yield f"  {'backend':<12}{'ms':>10}  error, of what is allowed"
    for row in verify(name):
        yield row["kind"]
        for backend in row["order"]:
            took = row["milliseconds"][backend]
            yield f"  {backend:<12}{f'{took:.3f}' if took else 'alone':>10}  {row['errors'][backend]:.2f}"
        for backend, why in row["unusable"].items():
            yield f"  {backend:<12}  UNUSABLE  {why}"
        for backend, why in row["unable"].items():
            yield f"  {backend:<12}{'-':>10}  {why}"
