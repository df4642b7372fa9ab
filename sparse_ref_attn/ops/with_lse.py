r"""Somebody else's attention, and the log-sum-exp that its kernel makes anyway.

    lse[h, j] = log sum_k exp(a <q[h, j], k[h, k]>)

The caller's own attention runs as it is; beneath it, where PyTorch dispatches to a kernel, the kernel's second result
is noted. So the output has the bits that it has without us. cuDNN and the memory-efficient kernel make no LSE unless
they are asked to: the first such call of a shape in a process runs both ways, and is asked from then on only if the
bits were the same. An LSE is taken only if a few of its rows agreed with float64 once for that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["attention_with_lse", "forget_proofs"]

aten: Any = torch.ops.aten
# Kernels by name; the LSE is their second result, (B, H, N), in all of them. Where there is a flag, its place.
KERNELS: dict[str, int | None] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": None,
    "aten::_scaled_dot_product_flash_attention": None,
    "aten::_scaled_dot_product_cudnn_attention": 4,
    "aten::_scaled_dot_product_efficient_attention": 4,
    "flash_attn::_flash_attn_forward": None,
    "flash_attn_3::fwd": None,
    "_diffusers_flash_attn_3::_flash_attn_forward": None,
}
HEADS_FIRST = "aten::"  # q, k (B, H, N, C) there, (B, N, H, C) in the others
LOOKED_AT = 8  # queries whose LSE a proof compares with float64
_PROOFS: dict[Hashable, bool] = {}


class _Heard(NamedTuple):
    """A kernel's operands and results."""

    kernel: str
    q: Tensor
    k: Tensor
    out: Tensor
    lse: Tensor


class _Listener(TorchDispatchMode):
    """Notes every attention kernel that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[_Heard] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.scaled_dot_product_attention.default:  # whole in inference mode only
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name
        if name not in KERNELS:
            return func(*args, **kwargs)
        results = _asked(name, func, args, kwargs)
        self.heard.append(_Heard(name, args[0], args[1], results[0], results[1]))
        return results


def attention_with_lse(
    own: Callable[[], Tensor], q: Tensor, k: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``own()`` with its LSE, where one kernel computes it from q and k as they are and says the LSE too.

    Parameters
    ----------
    own : callable
        Attention of q over k at the scale ``C ** -0.5``, as the caller does it.
    q, k : Tensor, shape (B, N, H, C), (B, S, H, C)
        What it attends with.
    mask : Tensor, bool or additive, (B or 1, H or 1, N or 1, S), optional
        What it masks with.

    Returns
    -------
    out : Tensor
        What ``own()`` returns, bit for bit.
    lse : Tensor, shape (B, H, N), float32, or None
        Natural logarithm.

    Examples
    --------
    >>> x = torch.zeros(1, 2, 1, 16)
    >>> attend = lambda: torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2)
    >>> attention_with_lse(attend, x, x)[1].exp().round()
    tensor([[[2., 2.]]])
    """
    with _Listener() as listener:
        out = own()
    if len(listener.heard) != 1:
        return out, None
    kernel, its_q, its_k, its_out, lse = listener.heard[0]
    axis = 2 if kernel.startswith(HEADS_FIRST) else 1
    lse = lse.squeeze(-1) if lse.ndim == 4 else lse
    untouched = (
        (its_q.data_ptr(), its_k.data_ptr(), its_out.data_ptr()) == (q.data_ptr(), k.data_ptr(), out.data_ptr())
        and (its_q.dtype, its_q.shape[axis], its_k.shape[axis]) == (q.dtype, q.shape[1], k.shape[1])
        and its_out.numel() == out.numel()
        and lse.numel() > 0
        and lse.shape[:2] == (q.shape[0], q.shape[2])
        and lse.shape[2] >= q.shape[1]
    )
    if not untouched:
        return out, None
    lse = lse.detach()[..., : q.shape[1]].float()
    key = ("lse", kernel, *_signature(q, k, mask))
    if key not in _PROOFS:
        _PROOFS[key] = _is_the_lse(lse, q.detach(), k.detach(), mask)
    return out, lse if _PROOFS[key] else None


def forget_proofs() -> None:
    """Compare anew from now on."""
    _PROOFS.clear()


def _asked(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """The kernel's results; asked for the LSE where that is known to change no bit of the output."""
    flag = KERNELS[name]
    if flag is None or len(args) <= flag or args[flag]:
        return func(*args, **kwargs)
    asking = (*args[:flag], True, *args[flag + 1 :])
    key = ("bits", name, *_signature(*args), *sorted(kwargs.items()))
    if _PROOFS.get(key):
        return func(*asking, **kwargs)
    plain = func(*args, **kwargs)
    if key in _PROOFS:
        return plain
    results = func(*asking, **kwargs)
    _PROOFS[key] = _same_bits(plain[0], results[0])
    return results if _PROOFS[key] else plain


def _signature(*given: object) -> tuple[Hashable, ...]:
    """What decides how a kernel computes: shapes, strides, dtypes, devices, settings."""
    parts = ((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in given)
    return (*parts, torch.are_deterministic_algorithms_enabled())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def _is_the_lse(lse: Tensor, q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether the first queries' LSE of the first head is that of float64, to what the operands' precision allows."""
    if mask is not None and mask.ndim != 4:
        return False
    scores = torch.einsum("bnc,bsc->bns", q[:, :LOOKED_AT, 0].double(), k[:, :, 0].double()) * q.shape[-1] ** -0.5
    if mask is not None:
        mask = mask[:, 0, :LOOKED_AT]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    allowed = 4 * torch.finfo(q.dtype).eps * (1 + scores.masked_fill(scores.isinf(), 0.0).abs().amax(-1))
    return bool(((lse[:, 0, :LOOKED_AT] - scores.logsumexp(-1)).abs() <= allowed).all())
