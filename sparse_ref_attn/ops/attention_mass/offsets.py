"""What must hold of the offsets of a ragged batch or of tiles, which only reading them on the host can tell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ...errors import LayoutError

__all__ = ["check_offsets", "check_tiles", "split_offsets"]


def split_offsets(host: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """cu_seqlens_q, cu_seqlens_k, cu_seqlens_ref (B + 1 each) and ref_starts (B), which lie end to end in `host`."""
    one = (len(host) + 1) // 4
    return host[:one], host[one : 2 * one], host[2 * one : 3 * one], host[3 * one :]


def check_offsets(
    tilings: dict[str, tuple[list[int], int]], ref_starts: list[int], longest: dict[str, tuple[int, str]]
) -> None:
    """Raise a LayoutError unless offsets tile their rows and references lie among their item's keys.

    `tilings` holds (offsets, rows) of cu_seqlens_q, cu_seqlens_k and cu_seqlens_ref, `longest` the bound of an item's
    rows by its name, and which offsets it bounds.
    """
    for name, (offsets, rows) in tilings.items():
        _check_run(name, offsets, rows)
    for bound, (most, name) in longest.items():
        found = max((b - a for a, b in pairwise(tilings[name][0])), default=0)
        if found > most:
            raise LayoutError(f"{bound} must be at least the longest item's {found} rows of {name}, got {most}")
    keys, references = (tilings[name][0] for name in ("cu_seqlens_k", "cu_seqlens_ref"))
    for item, start in enumerate(ref_starts):
        count = references[item + 1] - references[item]
        if count and not keys[item] <= start <= keys[item + 1] - count:
            raise LayoutError(
                f"the references of item {item} must lie among its keys, rows {keys[item]} to {keys[item + 1]} of k, "
                f"got rows {start} to {start + count}"
            )


def check_tiles(tiles: Sequence[int], queries: int, query_stride: int = 1) -> None:
    """Raise a LayoutError unless the tiles cover the queries in order, each of which counts."""
    if query_stride != 1:
        raise LayoutError(f"query_stride must be 1 with tiles, of which every query counts, got {query_stride}")
    _check_run("tiles", tiles, queries)


def _check_run(name: str, offsets: Sequence[int], rows: int) -> None:
    if offsets[0] != 0 or offsets[-1] != rows or any(a > b for a, b in pairwise(offsets)):
        raise LayoutError(f"{name} must run from 0 to {rows} without decreasing, got {list(offsets)}")
