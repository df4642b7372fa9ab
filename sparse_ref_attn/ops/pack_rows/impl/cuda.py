"""The copies of csrc/rows.cu: any dtype, any strides, several tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....kernels import abi
from ...shared.cuda_launch import index, launch

__all__ = ["launch_pack", "launch_unpack", "nested"]


def launch_pack(tensors: Sequence[Tensor], row: Tensor, dim: int) -> list[Tensor]:
    """Rows `row` of each tensor along `dim`."""
    packed = [x.new_empty(_resized(x, dim, row.shape[0])) for x in tensors]
    _launch("sra_pack_rows", tensors, packed, row, dim)
    return packed


def launch_unpack(packed: Sequence[Tensor], row: Tensor, size: int, dim: int) -> list[Tensor]:
    """Tensors of `size` rows along `dim`, zero but for the rows `row`."""
    full = [y.new_zeros(_resized(y, dim, size)) for y in packed]
    _launch("sra_unpack_rows", full, packed, row, dim)
    return full


def _launch(function: str, full: Sequence[Tensor], packed: Sequence[Tensor], row: Tensor, dim: int) -> None:
    pairs = [(x, y) for x, y in zip(full, packed, strict=True) if x.numel() and y.numel()]
    if not pairs:
        return
    sources = []  # a copy of one lives until the launch
    copies = (abi.RowCopy * len(pairs))()
    for n, (x, y) in enumerate(pairs):
        if len(nested(x, y, dim)[1]) > abi.MAX_AXES:
            x, y = x.contiguous(), y.contiguous()
        x, y = (t.resolve_conj().resolve_neg() for t in (x, y))
        sources.append((x, y))
        run, axes = nested(x, y, dim)
        sizes, of_full, of_packed = zip(*axes, strict=True) if axes else ((), (), ())
        copies[n] = abi.RowCopy(
            full=x.data_ptr(),
            packed=y.data_ptr(),
            bytes=run,
            full_row=x.stride(dim) * x.element_size(),
            packed_row=y.stride(dim) * y.element_size(),
            axes=len(axes),
            sizes=sizes,
            full_strides=of_full,
            packed_strides=of_packed,
        )
    size = full[0].shape[dim]
    launch(function, abi.RowsArgs(copies=copies, count=len(pairs), row=index(row), rows=row.shape[0], size=size), row)


def nested(x: Tensor, y: Tensor, dim: int) -> tuple[int, list[tuple[int, int, int]]]:
    """The run of bytes contiguous in both tensors, and the other axes as (size, stride in x, stride in y), in bytes.

    The token axis is neither. Dimensions whose strides nest in both tensors are one.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.empty(2, 10, 3, 4), torch.empty(2, 5, 3, 4)
    >>> nested(x, y, 1)
    (48, [(2, 480, 240)])
    >>> nested(x.transpose(0, 2), y.transpose(0, 2), 1)
    (48, [(2, 480, 240)])
    """
    width = x.element_size()
    run, axes = width, list[tuple[int, int, int]]()
    others = [d for d in range(x.ndim) if d != dim and x.shape[d] != 1]
    for d in sorted(others, key=lambda d: (y.stride(d), x.stride(d))):
        size, a, b = x.shape[d], x.stride(d) * width, y.stride(d) * width
        if (a, b) == (run, run):
            run *= size
        elif axes and (a, b) == tuple(axes[0][0] * stride for stride in axes[0][1:]):
            axes[0] = (axes[0][0] * size, *axes[0][1:])
        else:
            axes.insert(0, (size, a, b))
    return run, axes


def _resized(x: Tensor, dim: int, rows: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = rows
    return shape
