"""pack: y[.., t, ..] = x[.., row[t], ..]    unpack: x[.., row[t], ..] = y[.., t, ..], every other row 0.

Each is the other's gradient. Rows are distinct, so both are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ...errors import LayoutError
from .backends import fixed
from .reference import pack_reference, unpack_reference
from .registered import pack_op, unpack_op

__all__ = ["pack_rows", "unpack_rows"]


@overload
def pack_rows(x: Tensor, rows: Tensor, dim: int = 1, *, backend: str = ..., check: bool = ...) -> Tensor: ...


@overload
def pack_rows(
    x: Sequence[Tensor], rows: Tensor, dim: int = 1, *, backend: str = ..., check: bool = ...
) -> tuple[Tensor, ...]: ...


def pack_rows(
    x: Tensor | Sequence[Tensor], rows: Tensor, dim: int = 1, *, backend: str = "auto", check: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """Keep `rows` of `x` along `dim`.

    Parameters
    ----------
    x : Tensor, any dtype, with S rows along `dim`; or a sequence of them
        Several tensors (hidden states, position ids, keys, values, ...) share one launch. They agree
        in S and the device, and may differ in every other dimension and in dtype.
    rows : Tensor, shape (T,), int32 | int64
        Distinct rows in [0, S). Ascending order keeps the sequence's order.
    dim : int
        The token axis. Default 1, as in (B, S, D).
    backend : {"auto", "reference", "triton", "cuda"}
        "reference" is ``index_select``, and "auto" on a CPU; on a card "auto" is the fastest whose copies agreed there.
        A named backend never falls back.
    check : bool
        Check that rows lie within the tensor and are distinct, which on CUDA waits for the device. On the CPU the
        first is always checked (but under `torch.compile`, where torch itself checks it). Default False.

    Returns
    -------
    Tensor, shape of `x` with T rows along `dim`; or a tuple of them
        Copies; differentiable.

    Raises
    ------
    LayoutError
        If `rows` is not a vector of integers, has a row outside the tensor (or, checked, one twice), or the tensors
        disagree in S or the device.
    ConfigError
        If the backend cannot do the call; the message says why.

    Notes
    -----
    Deterministic, forward and backward. No host sync, unless asked to check. With "triton" and "cuda" an unchecked
    row outside the tensor reads as zeros.

    Examples
    --------
    >>> import torch
    >>> pack_rows(torch.arange(4.0).view(1, 4, 1), torch.tensor([0, 3])).flatten().tolist()
    [0.0, 3.0]
    """
    tensors, dim = _check((x,) if isinstance(x, Tensor) else x, rows, dim)
    _check_values(rows, tensors[0].shape[dim], check)
    if _is_reference(backend, tensors[0]):
        packed = [pack_reference(t, rows, dim) for t in tensors]
    else:
        packed = pack_op(tensors, rows, dim, backend)
    return packed[0] if isinstance(x, Tensor) else tuple(packed)


@overload
def unpack_rows(
    y: Tensor, rows: Tensor, size: int, dim: int = 1, *, backend: str = ..., check: bool = ...
) -> Tensor: ...


@overload
def unpack_rows(
    y: Sequence[Tensor], rows: Tensor, size: int, dim: int = 1, *, backend: str = ..., check: bool = ...
) -> tuple[Tensor, ...]: ...


def unpack_rows(
    y: Tensor | Sequence[Tensor], rows: Tensor, size: int, dim: int = 1, *, backend: str = "auto", check: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """Put packed rows back into `size` rows; the dropped ones are zero.

    Parameters
    ----------
    y : Tensor, with T rows along `dim`; or a sequence of them
        As `pack_rows` returned them.
    rows : Tensor, shape (T,), int32 | int64
        Where each row goes, as given to `pack_rows`.
    size : int
        Number of rows S of the result along `dim`.
    dim : int
        The token axis. Default 1.
    backend : {"auto", "reference", "triton", "cuda"}
        "reference" is ``index_copy``. A named backend never falls back.
    check : bool
        Check that rows lie within the tensor and are distinct, which on CUDA waits for the device. On the CPU the
        first is always checked (but under `torch.compile`, where torch itself checks it). Default False.

    Returns
    -------
    Tensor, shape of `y` with `size` rows along `dim`; or a tuple of them
        Differentiable.

    Raises
    ------
    LayoutError
        If `rows` does not number the rows of `y`, has a row outside the result (or, checked, one twice), or the
        tensors disagree in T or the device.
    ConfigError
        If the backend cannot do the call; the message says why.

    Notes
    -----
    Deterministic, forward and backward. No host sync, unless asked to check. With "triton" and "cuda" an unchecked
    row outside the result is left out.

    Examples
    --------
    >>> import torch
    >>> unpack_rows(torch.tensor([[[5.0], [6.0]]]), torch.tensor([0, 2]), 4).flatten().tolist()
    [5.0, 0.0, 6.0, 0.0]
    """
    tensors, dim = _check((y,) if isinstance(y, Tensor) else y, rows, dim)
    if tensors[0].shape[dim] != rows.shape[0]:
        raise LayoutError(
            f"rows must number the {tensors[0].shape[dim]} rows of y along dim {dim}, got {rows.shape[0]}"
        )
    _check_values(rows, size, check)
    if _is_reference(backend, tensors[0]):
        full = [unpack_reference(t, rows, size, dim) for t in tensors]
    else:
        full = unpack_op(tensors, rows, size, dim, backend)
    return full[0] if isinstance(y, Tensor) else tuple(full)


def _is_reference(backend: str, x: Tensor) -> bool:
    """Whether the definition computes the call, so that no op of ours stands between torch and it."""
    if backend == "auto":
        return fixed(x.device) == "reference"
    return backend == "reference"


def _check(tensors: Sequence[Tensor], rows: Tensor, dim: int) -> tuple[list[Tensor], int]:
    """The tensors and `dim` counted from the first axis, which all tensors must share."""
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise LayoutError(
            f"rows must be a vector of row numbers, int32 or int64, got shape {tuple(rows.shape)}, {rows.dtype}"
        )
    if not tensors:
        raise LayoutError("there must be at least one tensor, got none")
    first = tensors[0]
    if rows.device != first.device:
        raise LayoutError(f"rows must lie on the tensors' device, {first.device}, got {rows.device}")
    if not -first.ndim <= dim < first.ndim:
        raise LayoutError(f"dim must be one of the tensors' {first.ndim} axes, got {dim}")
    axis = dim % first.ndim
    for t in tensors[1:]:
        if (
            not -t.ndim <= dim < t.ndim
            or dim % t.ndim != axis
            or t.shape[axis] != first.shape[axis]
            or t.device != first.device
        ):
            raise LayoutError(
                "tensors must share the token axis, its length and the device, "
                f"got {tuple(first.shape)} on {first.device} and {tuple(t.shape)} on {t.device} along {dim}"
            )
    return list(tensors), axis


def _check_values(rows: Tensor, size: int, check: bool) -> None:
    """Read the row numbers; a traced or fake tensor has none."""
    if not (check or rows.is_cpu) or torch.compiler.is_compiling() or type(rows) is not Tensor or not rows.numel():
        return
    low, high = (int(x) for x in rows.aminmax())
    if low < 0 or high >= size:
        raise LayoutError(f"rows must lie in [0, {size}), got values from {low} to {high}")
    if check and rows.unique().shape != rows.shape:
        raise LayoutError(f"rows must be distinct, got {rows.shape[0]} of which {rows.unique().shape[0]} differ")
