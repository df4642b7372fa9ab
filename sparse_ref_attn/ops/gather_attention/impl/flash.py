"""Gather once, then FlashAttention for packed batches, by the best package that can; no host sync.

Everything but the packages' own functions is proved on a CPU, with plain attention in their place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Arguments, HostLayout
from ..backends import flash_packages
from ..gradients import Gradients, Wanted
from .dense_attention import EXTRA, carry_lse
from .flash_packages import BACKWARD, FORWARD, Backward, Forward, Lengths
from .packed import Packed, pack, unpack_gradients

__all__ = ["backward", "backward_by", "forward", "forward_by"]


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), contiguous."""
    return forward_by(FORWARD[_package(a)], a)


def backward(
    a: Arguments, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wanted: Wanted
) -> Gradients:
    """Gradients from those of out (T, H, C) and lse (H, T)."""
    return backward_by(BACKWARD[_package(a, backward=True)], a, grad_out, grad_lse, out, lse, wanted)


def forward_by(attend: Forward, a: Arguments) -> tuple[Tensor, Tensor]:
    """Pack, attend, and put everything back in its place."""
    p = pack(a)
    if not p.q.shape[0] or not p.k.shape[0]:
        lse = a.q.new_full(a.q.shape[1::-1], float("-inf"), dtype=torch.promote_types(a.q.dtype, torch.float32))
        return torch.zeros_like(a.q, memory_format=torch.contiguous_format), lse
    out, lse = attend(p.q, p.k, p.v, _lengths(a, p), a.scale)
    # without keys, some packages say +inf and others -inf
    lse = torch.where(lse.isinf(), float("-inf"), lse)
    return p.put_back(out), p.put_back(lse.t()).t().contiguous()


def backward_by(
    attend: Backward,
    a: Arguments,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: Wanted,
) -> Gradients:
    """Pack, differentiate, and put everything back in its place."""
    p = pack(a)
    if not p.q.shape[0] or not p.k.shape[0]:
        return unpack_gradients(a, p, torch.zeros_like(p.q), torch.zeros_like(p.k), torch.zeros_like(p.v), wanted)
    lse = torch.where(lse.isinf(), float("inf"), lse)  # exp(s - inf) = 0 in every package
    lse = p.take(lse.t()).t().contiguous()
    grad_out, out, q, k, v = p.take(grad_out).contiguous(), p.take(out), p.q, p.k, p.v
    if grad_lse is not None:
        grad_out, out = carry_lse(grad_out, out, p.take(grad_lse.t()).t())
        q, k, v = (torch.nn.functional.pad(x, (0, EXTRA)) for x in (q, k, v))
    grads = attend(grad_out, q, k, v, out, lse, _lengths(a, p), a.scale)
    dq, dk, dv = (x[..., : a.q.shape[2]] for x in grads)
    return unpack_gradients(a, p, dq, dk, dv, wanted)


def _lengths(a: Arguments, p: Packed) -> Lengths:
    """The longest item's rows where the host knows them; else all rows, which no item can pass."""
    if a.host is None:
        return Lengths(p.cu_q, p.cu_k, p.q.shape[0], p.k.shape[0])
    layout = HostLayout.of(a)
    return Lengths(p.cu_q, p.cu_k, layout.most_queries, layout.most_keys)


def _package(a: Arguments, backward: bool = False) -> str:
    """The first package that can; the one inside PyTorch where only shapes are asked for, on meta tensors."""
    able = flash_packages(a.q.device, a.q.dtype, backward)
    return next((name for name, why in able.items() if not why), "torch")
