"""pack: y[.., t, ..] = x[.., row[t], ..]    unpack: x[.., row[t], ..] = y[.., t, ..], every other row 0.

Each is the other's gradient. Rows are distinct, so both are deterministic.
"""

from __future__ import annotations

from torch import Tensor

from ...errors import LayoutError

__all__ = ["pack_rows", "unpack_rows"]


def pack_rows(x: Tensor, rows: Tensor, dim: int = 1) -> Tensor:
    """Keep `rows` of `x` along `dim`.

    Parameters
    ----------
    x : Tensor, any dtype, with S rows along `dim`
    rows : Tensor, shape (T,), int64
        Distinct rows in [0, S). Ascending order keeps the sequence's order.
    dim : int
        The token axis. Default 1, as in (B, S, D).

    Returns
    -------
    Tensor, shape of `x` with T rows along `dim`
        A copy; differentiable.

    Raises
    ------
    LayoutError
        If `rows` is not a vector.

    Examples
    --------
    >>> import torch
    >>> pack_rows(torch.arange(4.0).view(1, 4, 1), torch.tensor([0, 3])).flatten().tolist()
    [0.0, 3.0]
    """
    _check(rows)
    return x.index_select(dim, rows)


def unpack_rows(y: Tensor, rows: Tensor, size: int, dim: int = 1) -> Tensor:
    """Put packed rows back into `size` rows; the dropped ones are zero.

    Parameters
    ----------
    y : Tensor, with T rows along `dim`
    rows : Tensor, shape (T,), int64
        Where each row goes, as given to `pack_rows`.
    size : int
        Number of rows S of the result along `dim`.

    Returns
    -------
    Tensor, shape of `y` with `size` rows along `dim`
        Differentiable.

    Raises
    ------
    LayoutError
        If `rows` does not number the rows of `y`.

    Examples
    --------
    >>> import torch
    >>> unpack_rows(torch.tensor([[[5.0], [6.0]]]), torch.tensor([0, 2]), 4).flatten().tolist()
    [5.0, 0.0, 6.0, 0.0]
    """
    _check(rows)
    if y.shape[dim] != rows.shape[0]:
        raise LayoutError(f"rows must number the {y.shape[dim]} rows of y along dim {dim}, got {rows.shape[0]}")
    shape = list(y.shape)
    shape[dim] = size
    return y.new_zeros(shape).index_copy(dim, rows, y)


def _check(rows: Tensor) -> None:
    if rows.ndim != 1:
        raise LayoutError(f"rows must be a vector of row numbers, got shape {tuple(rows.shape)}")
