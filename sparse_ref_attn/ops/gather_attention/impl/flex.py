"""Gather once, then FlexAttention with a mask that keeps items apart.

Compiled on CUDA. On a CPU PyTorch runs it without compiling, which stores the scores, and without a backward pass: for
comparison only. The forward pass is proved on a CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from ..arguments import Arguments
from ..gradients import Gradients, Wanted
from .packed import Packed, pack, unpack_gradients

__all__ = ["backward", "forward"]


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), contiguous."""
    p = pack(a)
    out, lse = _attend(p, p.q, p.k, p.v, a.scale)
    return p.put_back(out), p.put_back(lse.t()).t().contiguous()


def backward(
    a: Arguments, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wanted: Wanted
) -> Gradients:
    """Gradients from those of out (T, H, C) and lse (H, T); the forward pass runs again."""
    p = pack(a)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (p.q, p.k, p.v))
        outs = _attend(p, q, k, v, a.scale)
        seeds = (p.take(grad_out), torch.zeros_like(outs[1]) if grad_lse is None else p.take(grad_lse.t()).t())
        if not outs[0].requires_grad:  # nothing to attend to
            dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        else:
            dq, dk, dv = torch.autograd.grad(outs, (q, k, v), seeds)
    return unpack_gradients(a, p, dq, dk, dv, wanted)


def _attend(p: Packed, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Packed q (T, H, C), k and v (M, G, C) -> out (T, H, C), lse (H, T); empty rows are 0 and -inf."""
    if not q.shape[0] or not k.shape[0]:
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.zeros_like(q), lse

    def same_item(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return p.q_items[i] == p.k_items[j]

    mask = create_block_mask(same_item, None, None, q.shape[0], k.shape[0], device=q.device)
    run = _compiled() if q.device.type == "cuda" else flex_attention
    out, aux = run(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, scale=scale,
        enable_gqa=k.shape[1] != q.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out[0].transpose(0, 1), aux.lse[0]


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
