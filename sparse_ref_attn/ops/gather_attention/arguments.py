"""The operands of the op in one normal form, and what must hold of their values.

Packed tensors only: q (T, H, C), dense k and v (M, G, C) with G key/value heads, bank k_ref and
v_ref (R, G, C). Item b's rows of a packed tensor are ``cu_seqlens[p, b]`` up to
``cu_seqlens[p, b + 1]`` for each part p (one part or two).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain, islice, pairwise
from typing import NamedTuple

from torch import Tensor

from ...errors import LayoutError

__all__ = ["Arguments", "HostLayout", "check_ranges", "check_values"]


class Arguments(NamedTuple):
    """Operands after validation, in the order of the registered op.

    ``cu_seqlens_q`` (P, B+1); ``cu_seqlens_k`` (P, B+1): row 1 counts in `k2` where there is one, else in `k`;
    ``ref_offsets`` (1, B+1), or (G, B+1) for one selection per key/value head. With ``cu_tiles`` (T+1,) the selections
    are those of T query tiles: (1, T+1) or (G, T+1); ``bias`` (T, W) joins the scores of `k2`. ``host``: every number
    of these offsets, row after row and ``cu_tiles`` last, where the host knows them all.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    k2: Tensor | None
    v2: Tensor | None
    k_ref: Tensor | None
    v_ref: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    ref_indices: Tensor | None
    ref_offsets: Tensor | None
    scale: float
    distinct: bool
    host: list[int] | None = None
    cu_tiles: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The differentiable operands: q, k, v, k2, v2, k_ref, v_ref."""
        return self.q, self.k, self.v, self.k2, self.v2, self.k_ref, self.v_ref

    @property
    def items(self) -> int:
        """Batch size B."""
        return self.cu_seqlens_q.shape[1] - 1

    @property
    def key_heads(self) -> int:
        """Key/value heads G."""
        k = self.k_ref if self.k is None else self.k
        assert k is not None
        return k.shape[1]

    @property
    def per_head(self) -> bool:
        """Whether each key/value head has a selection of its own."""
        return self.ref_offsets is not None and self.ref_offsets.shape[0] > 1

    @property
    def tiles(self) -> int:
        """Query tiles T; 0 where items select."""
        return 0 if self.cu_tiles is None else self.cu_tiles.shape[0] - 1

    @property
    def shared(self) -> Arguments | None:
        """What all tiles of an item attend to alike, unbiased: a call without tiles. None where that is nothing."""
        if self.k is None or self.cu_seqlens_k is None:
            return None
        alone = self._replace(
            k_ref=None, v_ref=None, ref_indices=None, ref_offsets=None, host=None, cu_tiles=None, bias=None
        )
        return alone if self.bias is None else alone._replace(k2=None, v2=None, cu_seqlens_k=self.cu_seqlens_k[:1])

    @property
    def segments(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(k, v, cu_seqlens (P, B+1)) of each dense tensor."""
        if self.k is None or self.v is None or self.cu_seqlens_k is None:
            return []
        if self.k2 is None or self.v2 is None:
            return [(self.k, self.v, self.cu_seqlens_k)]
        return [(self.k, self.v, self.cu_seqlens_k[:1]), (self.k2, self.v2, self.cu_seqlens_k[1:])]


class HostLayout(NamedTuple):
    """Row ranges as host integers. Where the caller did not say them, reading them waits for the device."""

    queries: list[list[int]]
    segments: list[list[list[int]]]
    offsets: list[list[int]]
    tiles: list[int]

    @classmethod
    def of(cls, a: Arguments) -> HostLayout:
        """The ranges of `a`: as the caller said them, else read from the device."""
        if a.host is None:
            return cls.read(a)
        numbers = iter(a.host)

        def take(table: Tensor | None) -> list[list[int]]:
            return [] if table is None else [list(islice(numbers, table.shape[1])) for _ in range(table.shape[0])]

        queries, segments, offsets = take(a.cu_seqlens_q), [take(cu) for _, _, cu in a.segments], take(a.ref_offsets)
        return cls(queries, segments, offsets, list(numbers))

    @classmethod
    def read(cls, a: Arguments) -> HostLayout:
        """Read the ranges of `a` from the device."""
        return cls(
            a.cu_seqlens_q.tolist(),
            [cu.tolist() for _, _, cu in a.segments],
            [] if a.ref_offsets is None else a.ref_offsets.tolist(),
            [] if a.cu_tiles is None else a.cu_tiles.tolist(),
        )

    @property
    def most_queries(self) -> int:
        """Queries of the item that has the most."""
        return max(sum(row[i + 1] - row[i] for row in self.queries) for i in range(len(self.queries[0]) - 1))

    @property
    def most_keys(self) -> int:
        """Keys of the item that has the most; one selection for all heads."""
        rows = [*chain(*self.segments), *self.offsets[:1]]
        return max(sum(row[i + 1] - row[i] for row in rows) for i in range(len(self.queries[0]) - 1))

    def query_rows(self, item: int) -> list[tuple[int, int]]:
        """Row ranges of an item's queries, empty ones left out."""
        return _ranges(self.queries, item)

    def key_rows(self, segment: int, item: int) -> list[tuple[int, int]]:
        """Row ranges of an item's keys in one dense tensor, empty ones left out."""
        return _ranges(self.segments[segment], item)

    def kept(self, item: int, head: int = 0) -> tuple[int, int]:
        """Where the selection of an item, or of a tile, lies in ``ref_indices``."""
        if not self.offsets:
            return 0, 0
        row = self.offsets[min(head, len(self.offsets) - 1)]
        return row[item], row[item + 1]

    @property
    def tile_items(self) -> list[int]:
        """The item of each tile; 0 for a tile without queries."""
        ranges = sorted((part[i], part[i + 1], i) for part in self.queries for i in range(len(part) - 1))
        ranges = [each for each in ranges if each[0] < each[1]]
        starts = [start for start, _, _ in ranges]
        return [ranges[bisect_right(starts, x) - 1][2] if x < y else 0 for x, y in pairwise(self.tiles)]


def _ranges(parts: list[list[int]], item: int) -> list[tuple[int, int]]:
    return [(part[item], part[item + 1]) for part in parts if part[item] < part[item + 1]]


def check_ranges(a: Arguments, layout: HostLayout) -> None:
    """Raise a LayoutError unless every range tiles its tensor."""
    _check_tiling("cu_seqlens_q", layout.queries, a.q.shape[0], "q")
    for n, ((k, _, _), parts) in enumerate(zip(a.segments, layout.segments, strict=True)):
        _check_tiling("cu_seqlens_k", parts, k.shape[0], f"k{n + 1}" if n else "k")
    if a.ref_indices is not None:
        _check_tiling("ref_offsets", layout.offsets, a.ref_indices.shape[0], "ref_indices")
    if a.cu_tiles is not None:
        _check_tiling("cu_tiles", [layout.tiles], a.q.shape[0], "q")
        astray = set(chain(*layout.queries)).difference(layout.tiles)
        if astray:
            raise LayoutError(
                f"cu_tiles must have an edge wherever cu_seqlens_q has one, so that no tile crosses an item, "
                f"got none at row {min(astray)} of q"
            )
    if a.bias is not None:
        most = max(y - x for x, y in pairwise(layout.segments[1][0]))
        if a.bias.shape[1] < most:
            raise LayoutError(f"bias must have a column for each of an item's {most} k2 rows, got {a.bias.shape[1]}")


def check_values(a: Arguments, layout: HostLayout) -> None:
    """As `check_ranges`, and every index lies in the bank, which only reading them can tell."""
    check_ranges(a, layout)
    if a.ref_indices is None or a.k_ref is None:
        return
    if a.ref_indices.numel():
        low, high = (int(x) for x in a.ref_indices.aminmax())
        if low < 0 or high >= a.k_ref.shape[0]:
            raise LayoutError(f"ref_indices must lie in [0, {a.k_ref.shape[0]}), got values from {low} to {high}")


def _check_tiling(name: str, parts: list[list[int]], rows: int, of: str) -> None:
    at = 0
    for part in parts:
        if part[0] != at:
            raise LayoutError(f"{name} must start at 0 and each part where the one before ended ({at}), got {parts}")
        if any(a > b for a, b in pairwise(part)):
            raise LayoutError(f"{name} must not decrease, got {part}")
        at = part[-1]
    if at != rows:
        raise LayoutError(f"{name} must end at the {rows} rows of {of}, got {at}")
