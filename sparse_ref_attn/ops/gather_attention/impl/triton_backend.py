"""The Triton backend: launches in order, configurations from the table. It never reads a tensor on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ...shared.launch_config import Config, capability_of, config_for
from ...shared.requirements import is_aligned
from ..arguments import Arguments
from ..gradients import Gradients, Wanted
from .triton_forward import launch_forward
from .triton_grad_kv import launch_grad_kv, launch_grad_kv_gathered
from .triton_grad_q import launch_delta, launch_grad_q
from .triton_sum_rows import launch_sum_rows
from .triton_tiles import block_of, launch_tiles
from .tuning import FORWARD, GRAD_KV, GRAD_Q, TILES

__all__ = ["backward", "forward"]


def forward(a: Arguments, config: Config | None = None, tiles: Config | None = None) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), contiguous."""
    config = config or config_for(FORWARD, capability_of(a.q), a.q.shape[2])
    if a.cu_tiles is None:
        return launch_forward(a, config)
    out, lse = None, a.q.new_empty(a.q.shape[1::-1], dtype=torch.float32)
    if a.shared is not None:
        out, lse = launch_forward(a.shared, config, torch.float32)
    return launch_tiles(a, out, lse, tiles or config_for(TILES[block_of(a)], capability_of(a.q), a.q.shape[2])), lse


def backward(
    a: Arguments,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: Wanted,
    configs: tuple[Config, Config] | None = None,
) -> Gradients:
    """Gradients from those of out (T, H, C) and lse (H, T)."""
    of_q, of_kv = configs or tuple(config_for(t, capability_of(a.q), a.q.shape[2]) for t in (GRAD_Q, GRAD_KV))
    if grad_out.stride(-1) != 1 or not is_aligned(grad_out):
        grad_out = grad_out.contiguous()
    delta = launch_delta(out, grad_out, grad_lse)
    dq = launch_grad_q(a, grad_out, lse, delta, of_q) if wanted.q else None
    dense: list[tuple[Tensor | None, Tensor | None]] = [(None, None), (None, None)]
    if wanted.dense:
        for n, (k, v, cu) in enumerate(a.segments):
            dense[n] = launch_grad_kv(a, k, v, cu, grad_out, lse, delta, of_kv)
    bank: tuple[Tensor | None, Tensor | None] = (None, None)
    if wanted.bank and a.ref_indices is not None:
        packed = launch_grad_kv_gathered(a, grad_out, lse, delta, of_kv)
        bank = packed if a.distinct else _into_bank(a, *packed)
    return Gradients(dq, *dense[0], *dense[1], *bank)


def _into_bank(a: Arguments, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows (nnz, G or 1, C) -> the bank's gradients (R, G, C)."""
    assert a.k_ref is not None
    assert a.ref_indices is not None
    assert a.ref_offsets is not None
    size, heads, channels = a.k_ref.shape
    rows = a.ref_indices.long()
    if a.per_head:  # one bucket for each (row, head), in the bank's own order
        ends = a.ref_offsets[:, -1].contiguous()
        head = torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype), right=True)
        rows = rows * heads + head
    k, v = launch_sum_rows(dk.flatten(1), dv.flatten(1), rows, size * (heads if a.per_head else 1), a.q.dtype)
    return k.view(size, heads, channels), v.view(size, heads, channels)
