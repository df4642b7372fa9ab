"""Shorten the image stream to the kept tokens, and restore its length.

Rows keep their order: generation rows all stay, reference rows stay where they are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import RefSelection, TokenLayout

__all__ = ["kept_rows"]


def kept_rows(layout: TokenLayout, selection: RefSelection) -> Tensor:
    """Rows of the image stream that stay, ascending.

    Parameters
    ----------
    layout : TokenLayout
        Of the full call.
    selection : RefSelection
        Kept reference tokens (K of R), on the device of the stream.

    Returns
    -------
    Tensor, shape (rows - R + K,), int64
        No host sync: every count is a host integer.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference
    >>> layout = TokenLayout(6, 0, (0, 2), (Reference(2, 4),))
    >>> kept_rows(layout, RefSelection(torch.tensor([1, 3]), (4,))).tolist()
    [0, 1, 3, 5]
    """
    device = selection.indices.device
    reference_rows = layout.reference_rows(device)
    others, at = [], 0
    for reference in layout.references:
        others.append(torch.arange(at, reference.start, device=device))
        at = reference.start + reference.length
    others.append(torch.arange(at, layout.rows, device=device))
    return torch.cat([*others, reference_rows.index_select(0, selection.indices)]).sort().values
