"""Who computes the mass: one predicate per backend, and the order in which "auto" tries them.

`reference` is the definition, `chunked` plain PyTorch in bounded memory, `triton` and `cuda` the kernels. No card has
run them yet, so "auto" does not pick them: they wait in no row of `ORDER` until `pytest -m gpu` has passed on one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._support import Call, cuda_reasons, has_16_byte_rows, pick, ranked, triton_reasons

__all__ = ["ORDER", "choose", "explain", "keys_read"]

ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("chunked",),
    "cuda": ("chunked",),
}
CHANNELS = (32, 64, 128)
HALF = (torch.float16, torch.bfloat16)


def choose(backend: str, q: Tensor, k: Tensor, scale: float) -> str:
    """`backend`, or for "auto" the first that can; ConfigError with everyone's reasons where none can."""
    return pick(backend, _order(q), _predicates(q, k, scale))


def explain(q: Tensor, k: Tensor, scale: float) -> dict[str, list[str]]:
    """Every backend with the reasons against it, the one that "auto" takes first."""
    return ranked(_order(q), _predicates(q, k, scale))


def keys_read(q: Tensor, k: Tensor, span: int) -> int:
    """Keys that each query is multiplied with where the LSE is not given, by the backend that "auto" takes.

    Plain PyTorch goes over all keys S once; the kernels compute the LSE first and then go over the span again, S + R.
    """
    chosen = choose("auto", q, k, q.shape[-1] ** -0.5)
    return k.shape[1] + (span if chosen in ("triton", "cuda") else 0)


def _order(q: Tensor) -> tuple[str, ...]:
    return ORDER.get(q.device.type, ORDER["cpu"])


def _predicates(q: Tensor, k: Tensor, scale: float) -> dict[str, Callable[[], list[str]]]:
    return {
        "reference": list,
        "chunked": list,
        "triton": lambda: _triton(q, k, scale),
        "cuda": lambda: _cuda(q, k, scale),
    }


def _cuda(q: Tensor, k: Tensor, scale: float) -> list[str]:
    why = cuda_reasons(Call(q.device, q.dtype, q.shape[-1], aligned=all(map(has_16_byte_rows, (q, k)))))
    if any(x.stride(-1) != 1 for x in (q, k) if x.numel()):
        why.append("needs a contiguous last dim")
    if not 0 < scale < float("inf"):
        why.append(f"needs scale > 0, got {scale}")
    return why


def _triton(q: Tensor, k: Tensor, scale: float) -> list[str]:
    why = triton_reasons(q, k)
    if q.dtype not in HALF and not (q.dtype == torch.float32 and not q.is_cuda):
        why.append(f"needs float16 or bfloat16, got {q.dtype}")
    if q.shape[-1] not in CHANNELS:
        why.append(f"needs a head dim in {CHANNELS}, got {q.shape[-1]}")
    if not scale > 0:
        why.append(f"needs scale > 0, got {scale}")
    return why
