r"""Dense attention of one item by the fused kernels of PyTorch, with the LSE and its gradient.

    dS = P * (dO V^T - delta + dlse)        delta = rowsum(dO * O)

PyTorch's backward kernels compute delta themselves and know no dlse. So where there is one, columns are added
to every operand: O gets (1, 1), dO gets -dlse (as its rounded value and the rest), K, Q and V get zeros. This
changes rowsum(dO * O) by -dlse and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["EXTRA", "attend", "attend_backward", "attend_biased", "carry_lse"]

aten: Any = torch.ops.aten
EXTRA = 8  # columns added to carry dlse: kernels on CUDA want multiples of 8


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (N, H, C), k and v (K, G, C) -> out (N, H, C), lse (H, N)."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=_lse_dtype(q))
        return q.new_zeros(q.shape), lse
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    kind = _kind(q)
    if kind == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q4, k4, v4, 0.0, False, scale=scale)
    elif kind == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q4, k4, v4, 0.0, False, False, scale=scale)[:2]
    elif kind == "efficient":
        k4, v4 = (_repeat(x, q4.shape[1]) for x in (k4, v4))
        out, lse = aten._scaled_dot_product_efficient_attention(q4, k4, v4, None, True, 0.0, False, scale=scale)[:2]
        lse = lse[..., : q.shape[0]]
    else:
        k4, v4 = (_repeat(x, q4.shape[1]) for x in (k4, v4))
        scores = q4 @ k4.transpose(-1, -2) * scale
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ v4
    return out[0].transpose(0, 1), lse[0]


def attend_biased(
    q: Tensor, k: Tensor, v: Tensor, biases: Tensor, which: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend` with row `which` (N,) of biases (T, K), float32, added to each query's scores.

    A row of -inf attends to nothing.
    """
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    biases = biases.to(_lse_dtype(q))  # the CPU kernel reads float32 wrongly beside float64
    bias = biases.index_select(0, which)
    if _kind(q) == "cpu":
        mask = bias.expand(*q4.shape[:2], -1, -1)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q4, k4, v4, 0.0, False, attn_mask=mask, scale=scale)
        lse = lse.masked_fill(biases.isneginf().all(1)[which], float("-inf"))  # the kernel says 0
    else:
        k4, v4 = (_repeat(x, q4.shape[1]) for x in (k4, v4))
        scores = (q4 @ k4.transpose(-1, -2)).to(bias.dtype) * scale + bias
        lse = scores.logsumexp(-1)
        out = (scores - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp().to(q.dtype) @ v4
    return out[0].transpose(0, 1), lse[0]


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (N, H, C), k and v (K, G, C)."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    channels, group = q.shape[2], q.shape[1] // k.shape[1]
    kind = _kind(q)
    if grad_lse is not None and kind != "math":
        grad_out, out = carry_lse(grad_out, out, grad_lse)
        q, k, v = (torch.nn.functional.pad(x, (0, EXTRA)) for x in (q, k, v))
    d4, q4, k4, v4, o4 = (x.transpose(0, 1)[None] for x in (grad_out, q, k, v, out))
    lse4 = lse[None]
    if kind == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d4, q4, k4, v4, o4, lse4, 0.0, False, scale=scale
        )
    elif kind == "flash":
        n, m = q.shape[0], k.shape[0]
        none = q.new_empty(0, dtype=torch.int32)
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            d4, q4, k4, v4, o4, lse4.contiguous(), none, none, n, m, 0.0, False, state, state, scale=scale
        )
    elif kind == "efficient":
        k4, v4 = (_repeat(x, q4.shape[1]) for x in (k4, v4))
        padded = torch.nn.functional.pad(lse4, (0, -q.shape[0] % 32), value=float("inf"))
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_efficient_attention_backward(
            d4, q4, k4, v4, None, o4, padded, state, state, 0.0, [True, True, True, False], False, scale=scale
        )[:3]
    else:
        k4, v4 = (_repeat(x, q4.shape[1]) for x in (k4, v4))
        p = (q4 @ k4.transpose(-1, -2) * scale - lse4[..., None]).exp()
        delta = (d4 * o4).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse[None]
        ds = p * (d4 @ v4.transpose(-1, -2) - delta[..., None]) * scale
        grads = (ds @ k4, ds.transpose(-1, -2) @ q4, p.transpose(-1, -2) @ d4)
    dq, dk, dv = (x[0].transpose(0, 1)[..., :channels] for x in grads)
    if dk.shape[1] != k.shape[1]:
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def carry_lse(grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Dout and out (N, H, C) with EXTRA columns that take dlse (H, N) off rowsum(dout * out)."""
    g = -grad_lse.t()[..., None]
    high = g.to(out.dtype)
    low = (g - high).to(out.dtype)
    zeros = out.new_zeros(*out.shape[:2], EXTRA - 2)
    one = torch.ones_like(high)
    return torch.cat([grad_out, high, low, zeros], dim=-1), torch.cat([out, one, one, zeros], dim=-1)


def _kind(q: Tensor) -> str:
    """Which kernel: by device, dtype and head dim."""
    if q.device.type == "cpu":
        return "cpu"
    channels, half = q.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and channels % 8 == 0 and channels + EXTRA <= 256:
        return "flash"
    if q.device.type == "cuda" and q.dtype == torch.float32 and channels % 4 == 0:
        return "efficient"
    return "math"


def _repeat(x: Tensor, heads: int) -> Tensor:
    """(1, G, K, C) -> (1, H, K, C)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
