"""Who computes the mass: one predicate per backend, and the order in which "auto" tries them.

`reference` is the definition, `chunked` plain PyTorch in bounded memory, `triton` and `cuda` the kernels. On a card
"auto" goes by the verdict of `verdicts`; `ORDER` is what it takes without one, on a CPU always.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..shared.choice import order_on, pick, ranked
from ..shared.launch_config import capability_of, config_for
from ..shared.requirements import csrc_reasons, has_16_byte_rows, triton_reasons
from ..verdicts import Kind

__all__ = ["LAUNCHERS", "ORDER", "PREDICATES", "Launchers", "choose", "explain", "keys_read"]

ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("chunked",),
    "cuda": ("chunked",),
}
CHANNELS = (32, 64, 128)
HALF = (torch.float16, torch.bfloat16)


def choose(
    backend: str, q: Tensor, k: Tensor, scale: float, references: int, lse_given: bool = False, tiled: bool = False
) -> str:
    """`backend`, or for "auto" the first that can, in the order of the verdict on q (B, N, H, C), k (B, S, H, C).

    `tiled`: whether each tile of queries gets a mass of its own. ConfigError with everyone's reasons where none can.
    """
    order = _order(q, k, references, lse_given, tiled, measure=True) if backend == "auto" else ()
    return pick(backend, order, _predicates(q, k, scale, tiled))


def explain(q: Tensor, k: Tensor, scale: float) -> dict[str, list[str]]:
    """Every backend with the reasons against it, the one that "auto" takes first."""
    return ranked(_order(q, k, k.shape[1], False, False, measure=False), _predicates(q, k, scale, False))


def keys_read(q: Tensor, k: Tensor, span: int, tiled: bool = False) -> int:
    """Keys that each query is multiplied with where the LSE is not given, by the backend that "auto" takes.

    Plain PyTorch goes over all keys S once; the kernels compute the LSE first and then go over the span again, S + R.
    """
    chosen = choose("auto", q, k, q.shape[-1] ** -0.5, span, tiled=tiled)
    return k.shape[1] + (span if chosen in ("triton", "cuda") else 0)


def _order(q: Tensor, k: Tensor, references: int, lse_given: bool, tiled: bool, measure: bool) -> tuple[str, ...]:
    def kind() -> Kind:
        from .trial import kind_of

        return kind_of(q, k, references, lse_given, tiled)

    return order_on(q.device, ORDER, kind, measure)


def _predicates(q: Tensor, k: Tensor, scale: float, tiled: bool) -> dict[str, Callable[[], list[str]]]:
    return {name: partial(against, q, k, scale, tiled) for name, against in PREDICATES.items()}


def _always(q: Tensor, k: Tensor, scale: float, tiled: bool) -> list[str]:
    return []


def _cuda(q: Tensor, k: Tensor, scale: float, tiled: bool) -> list[str]:
    why = csrc_reasons(q.device, q.dtype, q.shape[-1], all(map(has_16_byte_rows, (q, k))))
    if any(x.stride(-1) != 1 for x in (q, k) if x.numel()):
        why.append("needs a contiguous last dim")
    if not 0 < scale < float("inf"):
        why.append(f"needs scale > 0, got {scale}")
    if tiled:
        why.append("cannot give each tile a mass of its own")
    return why


def _triton(q: Tensor, k: Tensor, scale: float, tiled: bool) -> list[str]:
    why = triton_reasons(q, k)
    if q.dtype not in HALF and not (q.dtype == torch.float32 and not q.is_cuda):
        why.append(f"needs float16 or bfloat16, got {q.dtype}")
    if q.shape[-1] not in CHANNELS:
        why.append(f"needs a head dim in {CHANNELS}, got {q.shape[-1]}")
    if not scale > 0:
        why.append(f"needs scale > 0, got {scale}")
    return why


PREDICATES: dict[str, Callable[[Tensor, Tensor, float, bool], list[str]]] = {
    "reference": _always,
    "chunked": _always,
    "triton": _triton,
    "cuda": _cuda,
}
"""Why a backend cannot do a call with q, k and a scale, of tiles or not; empty when it can."""


class Launchers(NamedTuple):
    """What launches the kernels of a backend: the LSE, the mass, and the mass of each tile where there is one."""

    lse: Callable[..., Tensor]
    mass: Callable[..., Tensor]
    tile_mass: Callable[..., Tensor] | None = None


def _launch_cuda(q: Tensor) -> Launchers:
    from .impl.cuda import launch_lse, launch_mass

    return Launchers(launch_lse, launch_mass)


def _launch_triton(q: Tensor) -> Launchers:
    from .impl import triton_mass, triton_tile_mass, tuning

    row = (capability_of(q), q.shape[-1])
    return Launchers(
        partial(triton_mass.launch_lse, config=config_for(tuning.LSE, *row)),
        partial(triton_mass.launch_mass, config=config_for(tuning.MASS, *row)),
        partial(triton_tile_mass.launch_tile_mass, config=config_for(tuning.TILE_MASS, *row)),
    )


LAUNCHERS: dict[str, Callable[[Tensor], Launchers]] = {"triton": _launch_triton, "cuda": _launch_cuda}
"""The launchers for these queries, by the backends that are not plain PyTorch."""
