"""Gather once, then PyTorch's FlashAttention for packed batches; no host sync.

``torch.nn.attention.activate_flash_attention_impl("FA3")`` makes PyTorch call FlashAttention-3 where it is installed;
without it, the FlashAttention-2 inside PyTorch.

The packing is proved on a CPU; the call of the kernel has not run on a card.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dense import EXTRA, carry_lse
from .arguments import Arguments
from .gradients import Gradients, Wanted
from .packed import pack, unpack_gradients

__all__ = ["backward", "forward"]

aten: Any = torch.ops.aten


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), contiguous."""
    p = pack(a)
    limits = (p.q.shape[0], p.k.shape[0])
    out, lse = aten._flash_attention_forward(
        p.q, p.k, p.v, p.cu_q, p.cu_k, *limits, 0.0, False, False, scale=a.scale
    )[:2]  # fmt: skip
    # FlashAttention says +inf where there is no key
    lse = torch.where(lse == float("inf"), float("-inf"), lse)
    return p.put_back(out), p.put_back(lse.t()).t().contiguous()


def backward(
    a: Arguments, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wanted: Wanted
) -> Gradients:
    """Gradients from those of out (T, H, C) and lse (H, T)."""
    p = pack(a)
    limits = (p.q.shape[0], p.k.shape[0])
    lse = torch.where(lse == float("-inf"), float("inf"), lse)
    lse = p.take(lse.t()).t().contiguous()
    grad_out, out, q, k, v = p.take(grad_out), p.take(out), p.q, p.k, p.v
    if grad_lse is not None:
        grad_out, out = carry_lse(grad_out, out, p.take(grad_lse.t()).t())
        q, k, v = (torch.nn.functional.pad(x, (0, EXTRA)) for x in (q, k, v))
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, p.cu_q, p.cu_k, *limits, 0.0, False, state, state, scale=a.scale
    )
    dq, dk, dv = (x[..., : a.q.shape[2]] for x in grads)
    return unpack_gradients(a, p, dq, dk, dv, wanted)
