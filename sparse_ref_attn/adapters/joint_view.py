"""Which rows of a joint attention call are what."""

from __future__ import annotations

from torch import Tensor

from ..errors import LayoutError
from ..run import AttentionView
from ..types import TokenLayout
from .masks import viewed

__all__ = ["joint_view"]


def joint_view(layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionView:
    """The view of an attention call (B, S, H, C) over text, then the image stream.

    Raises
    ------
    LayoutError
        If it does not run over these rows.
    """
    at, (first, length) = layout.text, layout.generation
    if not length:
        raise LayoutError(
            "attention is measured from the generation's rows, got a layout without: name the argument that holds "
            "these (tokens) and the references' own, or use a rule that measures none"
        )
    if q.shape[1] != at + layout.rows or k.shape[1] != at + layout.rows:
        raise LayoutError(
            f"attention must run over {at} text and {layout.rows} image rows, got {q.shape[1]} queries and "
            f"{k.shape[1]} keys"
        )
    spans = tuple((at + r.start, at + r.start + r.length) for r in layout.references)
    item = layout.conditional or slice(None)
    rows = {"generation": slice(at + first, at + first + length), "reference": slice(spans[0][0], spans[-1][1])}
    kept = viewed(mask, q.shape[0], q.shape[1], rows, item)
    q, k, v = q[item], k[item], v[item]
    return AttentionView(k, v, q[:, rows["generation"]], q[:, rows["reference"]], spans, **kept)
