"""Registration with torch: each op is the other's gradient; the backend is resolved inside.

The public functions call the definition directly where it is the backend, and these ops otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..shared.namespace import NAMESPACE
from .backends import choose, kernels
from .reference import pack_reference, unpack_reference

__all__ = ["pack_by", "pack_op", "unpack_by", "unpack_op"]

library = torch.library.Library(NAMESPACE, "FRAGMENT")
library.define("pack_rows(Tensor[] x, Tensor rows, int dim, str backend) -> Tensor[]")
library.define("unpack_rows(Tensor[] y, Tensor rows, SymInt size, int dim, str backend) -> Tensor[]")


def _pack(x: Sequence[Tensor], rows: Tensor, dim: int, backend: str) -> list[Tensor]:
    return pack_by(choose(backend, "pack", x, rows, x[0].shape[dim], dim), x, rows, dim)


def pack_by(chosen: str, x: Sequence[Tensor], rows: Tensor, dim: int) -> list[Tensor]:
    """The op by the backend `chosen`, which can do the call."""
    if chosen == "reference":
        return [pack_reference(t, rows, dim) for t in x]
    return kernels(chosen).launch_pack(x, rows.contiguous(), dim)


def _unpack(y: Sequence[Tensor], rows: Tensor, size: int, dim: int, backend: str) -> list[Tensor]:
    return unpack_by(choose(backend, "unpack", y, rows, size, dim), y, rows, size, dim)


def unpack_by(chosen: str, y: Sequence[Tensor], rows: Tensor, size: int, dim: int) -> list[Tensor]:
    """The op by the backend `chosen`, which can do the call."""
    if chosen == "reference":
        return [unpack_reference(t, rows, size, dim) for t in y]
    return kernels(chosen).launch_unpack(y, rows.contiguous(), size, dim)


library.impl("pack_rows", _pack, "CompositeExplicitAutograd")
library.impl("unpack_rows", _unpack, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::pack_rows", lib=library)
def _(x: Sequence[Tensor], rows: Tensor, dim: int, backend: str) -> list[Tensor]:
    return [t.new_empty((*t.shape[:dim], rows.shape[0], *t.shape[dim + 1 :])) for t in x]


@torch.library.register_fake(f"{NAMESPACE}::unpack_rows", lib=library)
def _(y: Sequence[Tensor], rows: Tensor, size: int, dim: int, backend: str) -> list[Tensor]:
    return [t.new_empty((*t.shape[:dim], size, *t.shape[dim + 1 :])) for t in y]


pack_op = getattr(torch.ops, NAMESPACE).pack_rows.default
unpack_op = getattr(torch.ops, NAMESPACE).unpack_rows.default


class _PackRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, dim: int, backend: str, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows)
        ctx.dim, ctx.backend, ctx.size = dim, backend, x[0].shape[dim]
        return tuple(pack_op(list(x), rows, dim, backend))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        return None, None, None, *unpack_op(list(grads), rows, ctx.size, ctx.dim, ctx.backend)


class _UnpackRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, size: int, dim: int, backend: str, *y: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows)
        ctx.dim, ctx.backend = dim, backend
        return tuple(unpack_op(list(y), rows, size, dim, backend))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        return None, None, None, None, *pack_op(list(grads), rows, ctx.dim, ctx.backend)


# By hand: register_autograd costs 40 us a call with lists of tensors, this 10.
def _pack_autograd(x: Sequence[Tensor], rows: Tensor, dim: int, backend: str) -> list[Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in x):
        return list(_PackRows.apply(rows, dim, backend, *x))
    with torch._C._AutoDispatchBelowAutograd():
        return pack_op(x, rows, dim, backend)


def _unpack_autograd(y: Sequence[Tensor], rows: Tensor, size: int, dim: int, backend: str) -> list[Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in y):
        return list(_UnpackRows.apply(rows, size, dim, backend, *y))
    with torch._C._AutoDispatchBelowAutograd():
        return unpack_op(y, rows, size, dim, backend)


library.impl("pack_rows", _pack_autograd, "Autograd")
library.impl("unpack_rows", _unpack_autograd, "Autograd")
