"""Gather once, then FlashAttention for packed batches, by the best package that can; no host sync.

The packing is proved on a CPU; no call of a kernel has run on a card.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dense import EXTRA, carry_lse
from .._support import Call, flash_packages
from .arguments import Arguments
from .flash_packages import BACKWARD, FORWARD, Lengths
from .gradients import Gradients, Wanted
from .packed import Packed, pack, unpack_gradients

__all__ = ["backward", "forward"]


def forward(a: Arguments, package: str | None = None) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), contiguous."""
    p = pack(a)
    if not p.q.shape[0] or not p.k.shape[0]:
        lse = a.q.new_full((a.q.shape[1], a.q.shape[0]), float("-inf"), dtype=torch.float32)
        return torch.zeros_like(a.q, memory_format=torch.contiguous_format), lse
    out, lse = FORWARD[package or _package(a)](p.q, p.k, p.v, _lengths(p), a.scale)
    # without keys, some packages say +inf and others -inf
    lse = torch.where(lse.isinf(), float("-inf"), lse)
    return p.put_back(out), p.put_back(lse.t()).t().contiguous()


def backward(
    a: Arguments,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: Wanted,
    package: str | None = None,
) -> Gradients:
    """Gradients from those of out (T, H, C) and lse (H, T)."""
    p = pack(a)
    if not p.q.shape[0] or not p.k.shape[0]:
        return unpack_gradients(a, p, *(torch.zeros_like(x) for x in (p.q, p.k, p.v)), wanted)
    lse = torch.where(lse.isinf(), float("inf"), lse)  # exp(s - inf) = 0 in every package
    lse = p.take(lse.t()).t().contiguous()
    grad_out, out, q, k, v = p.take(grad_out).contiguous(), p.take(out), p.q, p.k, p.v
    if grad_lse is not None:
        grad_out, out = carry_lse(grad_out, out, p.take(grad_lse.t()).t())
        q, k, v = (torch.nn.functional.pad(x, (0, EXTRA)) for x in (q, k, v))
    grads = BACKWARD[package or _package(a, backward=True)](grad_out, q, k, v, out, lse, _lengths(p), a.scale)
    dq, dk, dv = (x[..., : a.q.shape[2]] for x in grads)
    return unpack_gradients(a, p, dq, dk, dv, wanted)


def _lengths(p: Packed) -> Lengths:
    """Bounds that need no look at the offsets: an item has no more rows than there are."""
    return Lengths(p.cu_q, p.cu_k, p.q.shape[0], p.k.shape[0])


def _package(a: Arguments, backward: bool = False) -> str:
    """The first package that can; the one inside PyTorch where only shapes are asked for, on meta tensors."""
    able = flash_packages(Call(a.q.device, a.q.dtype, a.q.shape[2]), backward)
    return next((name for name, why in able.items() if not why), "torch")
