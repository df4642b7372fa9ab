r"""Packed gradients summed into the bank's rows, in a fixed order.

    out[r] = sum of packed[i] over the entries i with rows[i] == r

Entries are sorted by row (stable), so one program owns one row of the bank and adds its entries in the order of the
selection: no atomics, the same bits every time, and rows that nobody kept become zero in the same launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_sum_rows"]


@triton.jit
def _sum_rows(PACKED_K, PACKED_V, OUT_K, OUT_V, ORDER, STARTS, WIDTH, BLOCK: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < WIDTH
    first = tl.load(STARTS + row).to(tl.int32)
    stop = tl.load(STARTS + row + 1).to(tl.int32)
    k = tl.zeros([BLOCK], tl.float32)
    v = tl.zeros([BLOCK], tl.float32)
    for i in range(first, stop):
        entry = tl.load(ORDER + i).to(tl.int64)
        k += tl.load(PACKED_K + entry * WIDTH + columns, mask=live, other=0.0)
        v += tl.load(PACKED_V + entry * WIDTH + columns, mask=live, other=0.0)
    tl.store(OUT_K + row * WIDTH + columns, k.to(OUT_K.dtype.element_ty), mask=live)
    tl.store(OUT_V + row * WIDTH + columns, v.to(OUT_V.dtype.element_ty), mask=live)


def launch_sum_rows(k: Tensor, v: Tensor, rows: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed k and v (nnz, W) float32, rows (nnz,) in [0, size) -> two (size, W) of `dtype`."""
    width = k.shape[1]
    outs = [torch.empty((size, width), dtype=dtype, device=k.device) for _ in range(2)]
    rows, order = torch.sort(rows, stable=True)
    starts = torch.searchsorted(rows, torch.arange(size + 1, device=rows.device, dtype=rows.dtype))
    block = min(1024, triton.next_power_of_2(width))
    if size:
        with torch.cuda.device_of(k):
            _sum_rows[(size, triton.cdiv(width, block))](
                k, v, *outs, order, starts, width, BLOCK=block, num_warps=4, enable_fp_fusion=True
            )
    return outs[0], outs[1]
