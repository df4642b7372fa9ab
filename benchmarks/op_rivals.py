"""What one would call without this library. Each function prepares a call once and returns what is timed.

`ATTENTION` and `MASS` name them with the package that they need. Written against PyTorch 2.13, flash-attn 2.7, the
flash-attn 3 of hopper/, FlashInfer 0.5 and flash-colreduce 0.2; but for "by hand" none has run here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .op_calls import Attention, Mass

__all__ = ["ATTENTION", "DENSE", "MASS", "Rival", "by_hand", "mass_by_hand"]

Run = Callable[[], Tensor]


class Rival(NamedTuple):
    """`prepare(call)` gives what is timed; `package` is imported by it, None for PyTorch's own."""

    prepare: Callable[[Any], Run]
    package: str | None = None

    def reasons(self, device: torch.device) -> str | None:
        """Why it cannot be tried at all."""
        if self.package is not None and find_spec(self.package) is None:
            return f"needs the package {self.package}, which is not installed"
        return None if device.type == "cuda" else f"needs a CUDA device, got {device}"


def by_hand(call: Attention, kernel: SDPBackend | None = None) -> Run:
    """index_select, cat, and PyTorch's attention: the kernel of its choice, or that one."""

    def run() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in call.joined())
        if kernel is None:
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def flash(call: Attention) -> Run:
    """The FlashAttention inside PyTorch."""
    return by_hand(call, SDPBackend.FLASH_ATTENTION)


def cudnn(call: Attention) -> Run:
    """CuDNN's attention through PyTorch."""
    return by_hand(call, SDPBackend.CUDNN_ATTENTION)


def varlen(call: Attention) -> Run:
    """PyTorch's attention for packed batches."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = call.shape.queries, call.shape.queries + call.kept
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=call.device) for n in (queries, keys))

    def run() -> Tensor:
        q, k, v = (x[0] for x in call.joined())
        out = varlen_attn(q, k, v, cu_q, cu_k, queries, keys)
        assert isinstance(out, Tensor)
        return out[None]

    return run


def flash2(call: Attention) -> Run:
    """flash-attn 2."""
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(*call.joined())


def flash3(call: Attention) -> Run:
    """flash-attn 3; its first releases return the LSE too."""
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    def run() -> Tensor:
        out = flash_attn_func(*call.joined())
        return out[0] if isinstance(out, tuple) else out

    return run


def flex(call: Attention, attend: Callable[..., Any] | None = None) -> Run:
    """FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = attend or torch.compile(flex_attention)

    def run() -> Tensor:
        return attend(*(x.transpose(1, 2) for x in call.joined())).transpose(1, 2)

    return run


def flashinfer(call: Attention) -> Run:
    """FlashInfer's paged attention with pages of one row: the bank lies in the pool, the dense rows are copied to it.

    The plan, which reads the indices on the host, is made once.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    assert call.rows is not None
    device, dense, heads, channels = call.device, call.shape.queries, call.shape.heads, call.shape.channels
    pools = [torch.cat([x.new_empty(dense, heads, channels), x.detach()])[:, None] for x in (call.k_ref, call.v_ref)]
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=device), "NHD")
    pages = torch.cat([torch.arange(dense, device=device), dense + call.rows]).int()

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    wrapper.plan(
        integers(0, dense), integers(0, pages.shape[0]), pages, integers(1), heads, heads, channels, 1,
        causal=False, q_data_type=call.q.dtype,
    )  # fmt: skip

    def run() -> Tensor:
        for pool, x in zip(pools, (call.k, call.v), strict=True):
            pool[:dense, 0].copy_(x[0].detach())
        return wrapper.run(call.q[0].detach(), tuple(pools))[None]

    return run


def mass_by_hand(call: Mass) -> Run:
    """A softmax that is stored, head by head."""

    def run() -> Tensor:
        span, scale = slice(*call.span), call.shape.channels**-0.5
        heads = ((call.q[:, :, h] * scale, call.keys[:, :, h]) for h in range(call.shape.heads))
        return torch.stack([(q @ k.transpose(1, 2)).softmax(-1)[..., span].float().mean(1) for q, k in heads], dim=1)

    return run


def colreduce(call: Mass) -> Run:
    """flash-colreduce: the columns of all keys."""
    from flash_colreduce import flash_colreduce  # type: ignore[import-not-found]

    q, k = call.q.transpose(1, 2), call.keys.transpose(1, 2)
    return lambda: flash_colreduce(q, k, "mean")[..., slice(*call.span)]


def swapped_flex(call: Mass, attend: Callable[..., Any] | None = None) -> Run:
    """FlexAttention twice: the LSE of the queries, then keys for queries, whose LSE is the column's sum."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend = attend or torch.compile(flex_attention)
    q, k = call.q.transpose(1, 2), call.keys.transpose(1, 2)
    k_ref = k[:, :, slice(*call.span)]

    def run() -> Tensor:
        lse = attend(q, k, k, return_aux=AuxRequest(lse=True))[1].lse

        def weigh(score: Tensor, b: Tensor, h: Tensor, _r: Tensor, j: Tensor) -> Tensor:
            return score - lse[b, h, j]

        return attend(k_ref, q, q, score_mod=weigh, return_aux=AuxRequest(lse=True))[1].lse.exp() / q.shape[2]

    return run


ATTENTION = {
    "index_select + flash": Rival(flash),
    "index_select + cudnn": Rival(cudnn),
    "index_select + varlen_attn": Rival(varlen),
    "index_select + FA2": Rival(flash2, "flash_attn"),
    "index_select + FA3": Rival(flash3, "flash_attn_interface"),
    "index_select + FlexAttention": Rival(flex),
    "FlashInfer, page_size=1": Rival(flashinfer, "flashinfer"),
}
MASS = {
    "swapped FlexAttention": Rival(swapped_flex),
    "flash-colreduce": Rival(colreduce, "flash_colreduce"),
}
DENSE = {
    "dense, flash": Rival(flash),
    "dense, cudnn": Rival(cudnn),
    "dense, FA2": Rival(flash2, "flash_attn"),
    "dense, FA3": Rival(flash3, "flash_attn_interface"),
}
