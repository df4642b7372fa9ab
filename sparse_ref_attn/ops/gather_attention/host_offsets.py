"""Offsets that the caller knows without asking the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from torch import Tensor

from ...errors import LayoutError

__all__ = ["HostOffsets", "flatten_offsets"]

Numbers = Sequence[int] | Sequence[Sequence[int]]


class HostOffsets(NamedTuple):
    """What the offsets of a `gather_attention` call hold, as host integers: then nobody reads them from the device.

    Parameters
    ----------
    cu_seqlens_q, cu_seqlens_k, ref_offsets : sequence of int, or a sequence of them for each row, optional
        The numbers of the tensor of that name. One that the call does not give is known from the shapes.
    tiles : sequence of int, optional
        The numbers of ``cu_tiles``.

    Examples
    --------
    >>> import torch
    >>> from sparse_ref_attn.functional import gather_attention
    >>> x, cu = torch.zeros(3, 1, 16), torch.tensor([0, 1, 3])
    >>> known = HostOffsets(cu_seqlens_q=[0, 1, 3], cu_seqlens_k=[0, 1, 3])
    >>> gather_attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, host=known).shape
    torch.Size([3, 1, 16])
    """

    cu_seqlens_q: Numbers | None = None
    cu_seqlens_k: Numbers | None = None
    ref_offsets: Numbers | None = None
    tiles: Numbers | None = None


def flatten_offsets(
    host: HostOffsets,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    ref_offsets: Tensor | None,
    cu_tiles: Tensor | None = None,
) -> list[int] | None:
    """All numbers of the offsets (P, B + 1), then of cu_tiles (T + 1,); None unless every one is known.

    Raises
    ------
    LayoutError
        If there are other numbers than the tensor of that name has, or there is no such tensor.
    """
    flat: list[int] = []
    known = True
    tensors = (cu_seqlens_q, cu_seqlens_k, ref_offsets, None if cu_tiles is None else cu_tiles[None])
    for name, numbers, tensor in zip(HostOffsets._fields, host, tensors, strict=True):
        if numbers is None:
            known = known and tensor is None
            continue
        rows: list[list[int]] = [[x] if isinstance(x, int) else list(x) for x in numbers]
        if numbers and isinstance(numbers[0], int):
            rows = [list(chain.from_iterable(rows))]
        shape = None if tensor is None else tuple(tensor.shape)
        if shape is None or len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
            wanted = "no" if shape is None else " x ".join(map(str, shape))
            tensor_name = "cu_tiles" if name == "tiles" else name
            raise LayoutError(f"host.{name} must hold the {wanted} numbers of {tensor_name}, got {numbers}")
        flat.extend(chain.from_iterable(rows))
    return flat if known else None
