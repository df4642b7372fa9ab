"""Copies of rows, several tensors in one launch.

    pack:    y[o, t] = x[o, row[t]]                            d pack   = unpack
    unpack:  x[o, row[t]] = y[o, t], every other row 0         d unpack = pack

A tensor is seen as (outer, rows, inner) with a contiguous inner run, its elements as plain integers of their size, so
any dtype is copied bit for bit. `row` holds distinct indices: no two programs write the same place. An index outside
the tensor reads as zeros and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_pack", "launch_unpack"]

TILE = 4096  # elements of one step of a program: with 16 bits each, 4 loads of 16 bytes by each of 128 threads
WIDEST = 1024
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _copy(
    X,
    Y,
    row,
    rows,
    size,
    inner,
    x_outer,
    x_row,
    y_outer,
    y_row,
    SCATTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS kept rows of one outer index: X (outer, size, inner) -> Y (outer, rows, inner), or back."""
    outer = tl.cast(tl.program_id(2), tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = t < rows
    r = tl.cast(tl.load(row + t, mask=live, other=0), tl.int64)
    inside = live & (r >= 0) & (r < size)
    x = X + outer * x_outer + (r * x_row)[:, None]
    y = Y + outer * y_outer + (tl.cast(t, tl.int64) * y_row)[:, None]
    for first in range(0, inner, BLOCK):
        d = first + tl.arange(0, BLOCK)
        within = (d < inner)[None, :]
        if SCATTER:
            tile = tl.load(y + d[None, :], mask=inside[:, None] & within, other=0)
            tl.store(x + d[None, :], tile, mask=inside[:, None] & within)
        else:
            tile = tl.load(x + d[None, :], mask=inside[:, None] & within, other=0)
            tl.store(y + d[None, :], tile, mask=live[:, None] & within)


@triton.jit
def _copy_rows(
    X,
    Y,
    row,
    rows,
    size,
    inner,
    x_outer,
    x_row,
    y_outer,
    y_row,
    COUNT: tl.constexpr,
    SCATTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tuples of COUNT tensors, inner lengths and strides; one program copies one block of rows of one of them."""
    for i in tl.static_range(COUNT):
        if tl.program_id(1) == i:
            # int64 before any product
            a, b = tl.cast(x_outer[i], tl.int64), tl.cast(x_row[i], tl.int64)
            c, d = tl.cast(y_outer[i], tl.int64), tl.cast(y_row[i], tl.int64)
            _copy(X[i], Y[i], row, rows, size, inner[i], a, b, c, d, SCATTER, ROWS, BLOCK)


def launch_pack(tensors: Sequence[Tensor], row: Tensor, dim: int) -> list[Tensor]:
    """Rows `row` of each tensor along `dim`; the tensors agree in size along it, nothing else."""
    packed = [_resized(x, dim, row.shape[0], x.new_empty) for x in tensors]
    _launch(tensors, packed, row, dim, scatter=False)
    return packed


def launch_unpack(packed: Sequence[Tensor], row: Tensor, size: int, dim: int) -> list[Tensor]:
    """Tensors of `size` rows along `dim`, zero but for the rows `row`."""
    full = [_resized(y, dim, size, y.new_zeros) for y in packed]
    _launch(full, packed, row, dim, scatter=True)
    return full


def _launch(full: Sequence[Tensor], packed: Sequence[Tensor], row: Tensor, dim: int, scatter: bool) -> None:
    pairs = [(_as_rows(x, dim), _as_rows(y, dim)) for x, y in zip(full, packed, strict=True) if x.numel() and y.numel()]
    # one launch for all tensors of one element size and one outer count: nearly always one launch
    for group in {(x.element_size(), x.shape[0]) for x, _ in pairs}:
        xs, ys = zip(*(p for p in pairs if (p[0].element_size(), p[0].shape[0]) == group), strict=True)
        widest = triton.next_power_of_2(max(x.shape[2] for x in xs))
        block = min(widest, WIDEST)
        block_rows = TILE // block if row.shape[0] * block >= TILE else triton.next_power_of_2(row.shape[0])
        grid = (triton.cdiv(row.shape[0], block_rows), len(xs), group[1])
        with torch.cuda.device_of(row):
            _copy_rows[grid](
                xs,
                ys,
                row,
                row.shape[0],
                xs[0].shape[1],
                tuple(x.shape[2] for x in xs),
                tuple(x.stride(0) for x in xs),
                tuple(x.stride(1) for x in xs),
                tuple(y.stride(0) for y in ys),
                tuple(y.stride(1) for y in ys),
                COUNT=len(xs),
                SCATTER=scatter,
                ROWS=block_rows,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=True,
            )


def _resized(x: Tensor, dim: int, rows: int, make: Callable[[list[int]], Tensor]) -> Tensor:
    shape = list(x.shape)
    shape[dim] = rows
    return make(shape)


def _as_rows(x: Tensor, dim: int) -> Tensor:
    """(outer, rows, inner) integers; a view where the layout allows it, else a copy."""
    if x.is_complex():
        x = torch.view_as_real(x)
    x = x.view(INTEGERS[x.element_size()])
    x = x.flatten(0, dim - 1) if dim else x[None]
    x = x.flatten(2) if x.ndim > 2 else x[..., None]
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
