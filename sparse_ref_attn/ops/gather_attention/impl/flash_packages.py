"""Packed FlashAttention as each package spells it: flash-attn 2 and 3, fa3-fwd, and the one inside PyTorch.

All take q (T, H, C), k and v (K, G, C) in item order, int32 offsets (B + 1,) and upper bounds of the lengths, and give
out (T, H, C) and a natural-log lse (H, T), float32: what one computed forward, another may differentiate.
`backends.flash_packages` says which of them can do a call.

Written against the sources of flash-attn 2.7 to 2.8, of flash-attn 3 (hopper/), of fa3-fwd 0.0.3 and of PyTorch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["BACKWARD", "FORWARD", "Backward", "Forward", "Lengths"]

aten: Any = torch.ops.aten


class Lengths(NamedTuple):
    """Offsets (B + 1,), int32, of queries and keys, and bounds of an item's queries and keys."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


Forward = Callable[[Tensor, Tensor, Tensor, Lengths, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Lengths, float], tuple[Tensor, Tensor, Tensor]]


def _forward_by(module: str) -> Forward:
    """The public function of that module; its arguments by keyword, for their places differ."""

    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        attend = import_module(module).flash_attn_varlen_func
        out, lse = attend(q, k, v, *lengths, softmax_scale=scale, return_attn_probs=True)[:2]
        return out, lse

    return forward


def _forward_torch(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    """What `torch.nn.attention.varlen.varlen_attn` calls; flash-attn 3 where the user activated it in PyTorch."""
    out, lse = aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, scale=scale)[:2]
    return out, lse


def _backward_3(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _like(q, k, v)
    import_module("flash_attn_interface")._flash_attn_backward(
        grad_out, q, k, v, out, lse, lengths.cu_q, lengths.cu_k, None, None, lengths.max_q, lengths.max_k,
        dq, dk, dv, scale, False, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _backward_2(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _like(q, k, v)
    import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
        grad_out, q, k, v, out, lse, dq, dk, dv, *lengths, dropout_p=0.0, softmax_scale=scale, causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _backward_torch(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the random numbers for dropout: none
    return aten._flash_attention_backward(grad_out, q, k, v, out, lse, *lengths, 0.0, False, state, state, scale=scale)


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


# By the name of the module that is imported; fa3-fwd has no backward.
FORWARD: dict[str, Forward] = {
    "flash_attn_interface": _forward_by("flash_attn_interface"),
    "fa3_fwd_interface": _forward_by("fa3_fwd_interface"),
    "flash_attn": _forward_by("flash_attn"),
    "torch": _forward_torch,
}
BACKWARD: dict[str, Backward] = {
    "flash_attn_interface": _backward_3,
    "flash_attn": _backward_2,
    "torch": _backward_torch,
}
