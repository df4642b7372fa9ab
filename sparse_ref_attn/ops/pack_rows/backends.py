"""Who copies the rows: the backends, one predicate of each, and the order in which "auto" tries them.

`reference` is the definition, `triton` and `cuda` the kernels. On a card "auto" goes by the verdict of `verdicts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..shared.choice import order_on, pick, ranked
from ..shared.cuda_launch import against
from ..shared.requirements import triton_reasons
from ..verdicts import JUDGED, Kind

__all__ = ["MODULES", "ORDER", "PREDICATES", "choose", "explain", "fixed", "kernels"]

# What "auto" takes where it has no verdict: on a CPU always, on a card where nothing can be measured (see `verdicts`).
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("reference",),
    "cuda": ("reference",),
}
MODULES = {"triton": ".impl.triton_rows", "cuda": ".impl.cuda"}
MOST_OUTER = 65_535  # the grid's third axis


def explain(tensors: Sequence[Tensor], rows: Tensor, dim: int) -> dict[str, list[str]]:
    """Every backend with the reasons against it, the one that "auto" takes first."""
    return ranked(_order("pack", tensors, rows, tensors[0].shape[dim], dim, False), _predicates(tensors, rows, dim))


def fixed(device: torch.device) -> str | None:
    """What "auto" takes on a device whatever the call; None where it goes by a verdict."""
    return None if device.type in JUDGED else ORDER.get(device.type, ORDER["cpu"])[0]


def choose(backend: str, form: str, tensors: Sequence[Tensor], rows: Tensor, size: int, dim: int) -> str:
    """`backend`, or for "auto" the first that can, in the order of the verdict; `form` is "pack" or "unpack".

    ConfigError with everyone's reasons where none can.
    """
    order = _order(form, tensors, rows, size, dim, True) if backend == "auto" else ()
    return pick(backend, order, _predicates(tensors, rows, dim))


def _order(form: str, tensors: Sequence[Tensor], rows: Tensor, size: int, dim: int, measure: bool) -> tuple[str, ...]:
    def kind() -> Kind:
        from .trial import kind_of

        return kind_of(form, tensors, size, rows.shape[0], dim)

    return order_on(rows.device, ORDER, kind, measure)


def _predicates(tensors: Sequence[Tensor], rows: Tensor, dim: int) -> dict[str, Callable[[], list[str]]]:
    return {name: partial(reasons, tensors, rows, dim) for name, reasons in PREDICATES.items()}


def _always(tensors: Sequence[Tensor], rows: Tensor, dim: int) -> list[str]:
    return []


def _triton(tensors: Sequence[Tensor], rows: Tensor, dim: int) -> list[str]:
    why = triton_reasons(rows)
    outer = max(x.shape[:dim].numel() for x in tensors)
    if outer > MOST_OUTER:
        why.append(f"needs at most {MOST_OUTER} elements before the token axis, got {outer}")
    return why


def _cuda(tensors: Sequence[Tensor], rows: Tensor, dim: int) -> list[str]:
    return against(rows.device)


PREDICATES: dict[str, Callable[[Sequence[Tensor], Tensor, int], list[str]]] = {
    "reference": _always,
    "triton": _triton,
    "cuda": _cuda,
}
"""Why a backend cannot do a call with tensors, rows and their axis; empty when it can."""


def kernels(chosen: str) -> Any:
    """The module with `launch_pack` and `launch_unpack`."""
    return import_module(MODULES[chosen], __package__)
