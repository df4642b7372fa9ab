"""Whose row is whose, where several items are in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...functional import HostOffsets, gather_attention, pack_rows, unpack_rows

__all__ = ["ItemTap", "RaggedRows", "packed_rows", "padded_rows"]

ItemTap = Callable[[int, int, Tensor, Tensor, Tensor, "Tensor | None", Tensor], None]


@dataclass(frozen=True)
class RaggedRows:
    """Whose row is whose in joint attention, B items.

    Parameters
    ----------
    cu_seqlens : Tensor, shape (B + 1,) or (2, B + 1), int32
        Items' stretches of the rows; two where text and image rows lie apart.
    live : Tensor, shape (T,), int64, optional
        Rows of the flattened (batch * S) sequence that belong to an item, item by item. None: all.
    keys : Tensor, shape (T',), int64, optional
        Of the live rows those that may be attended to. None: all.
    cu_seqlens_k : Tensor, shape (B + 1,), int32, optional
        Items' stretches of `keys`.
    rotate : callable, optional
        Turns (1, T, H, C), the live rows, where the model's own rotary embedding does not apply.
    tap : callable, optional
        ``tap(item, site, q, k, v, mask, lse)`` sees each item's attention, (1, S, H, C) after RoPE, and its LSE,
        (1, H, S) float32.
    host : HostOffsets, optional
        What `cu_seqlens` and the keys' offsets hold: no layer reads them from the device.
    """

    cu_seqlens: Tensor
    live: Tensor | None = None
    keys: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    rotate: Any = None
    tap: ItemTap | None = None
    host: HostOffsets | None = None

    def attend(self, site: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (batch, S, H, C) within each item; rows of no item are zero."""
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if self.live is not None:
            q, k, v = pack_rows((q, k, v), self.live, 0)
        if self.rotate is not None:
            q, k = (self.rotate(x[None])[0] for x in (q, k))
        if torch.is_autocast_enabled(q.device.type):  # as scaled_dot_product_attention casts
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        seen = (q.detach(), k.detach(), v.detach())
        cu_seqlens_k = self.cu_seqlens
        if self.keys is not None and self.cu_seqlens_k is not None:
            k, v = pack_rows((k, v), self.keys, 0)
            cu_seqlens_k = self.cu_seqlens_k
        out, lse = gather_attention(
            q, k, v, cu_seqlens_q=self.cu_seqlens, cu_seqlens_k=cu_seqlens_k, host=self.host, return_lse=True
        )
        if self.tap is not None:
            self._show(site, *seen, lse.detach().float())
        if self.live is not None:
            out = unpack_rows(out, self.live, shape[0] * shape[1], 0)
        return out.view(shape)

    def _show(self, site: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        assert self.tap is not None
        mask = None
        if self.keys is not None:
            mask = torch.zeros(q.shape[0], dtype=torch.bool, device=q.device).index_fill_(0, self.keys, True)
        stretches = self._stretches()
        for item in range(len(stretches[0]) - 1):
            at = [slice(row[item], row[item + 1]) for row in stretches]
            item_q, item_k, item_v = (torch.cat([x[span] for span in at])[None] for x in (q, k, v))
            kept = None if mask is None else torch.cat([mask[span] for span in at])[None, None, None]
            item_lse = torch.cat([lse[:, span] for span in at], dim=1)[None]
            self.tap(item, site, item_q, item_k, item_v, kept, item_lse)

    def _stretches(self) -> list[list[int]]:
        """Items' offsets, one row for each part."""
        if self.host is None:
            return self.cu_seqlens.reshape(-1, self.cu_seqlens.shape[-1]).tolist()
        return [list(row) for row in self.host.cu_seqlens_q]  # type: ignore[union-attr, arg-type]


def _offsets(lengths: Sequence[int], first: int = 0) -> list[int]:
    return list(accumulate(lengths, initial=first))


def packed_rows(
    text: Sequence[int],
    images: Sequence[int],
    masks: Sequence[Tensor | None],
    device: torch.device,
    tap: ItemTap | None,
) -> RaggedRows:
    stretches = [_offsets(text), _offsets(images, sum(text))]
    cu_seqlens = torch.tensor(stretches, dtype=torch.int32, device=device)
    if all(mask is None for mask in masks):
        return RaggedRows(cu_seqlens, tap=tap, host=HostOffsets(stretches, stretches))
    spans = [[torch.arange(row[i], row[i + 1]) for row in stretches] for i in range(len(text))]
    keys, kept = _keys([torch.cat(span) for span in spans], masks, device)
    cu_seqlens_k = torch.tensor(kept, dtype=torch.int32, device=device)
    return RaggedRows(cu_seqlens, None, keys, cu_seqlens_k, tap=tap, host=HostOffsets(stretches, [kept]))


def _keys(rows: Sequence[Tensor], masks: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, list[int]]:
    """Of each item's `rows`, on the CPU, those that may be attended to, item by item, and their offsets."""
    kept = [own if mask is None else own[mask.cpu()] for own, mask in zip(rows, masks, strict=True)]
    return torch.cat(kept).to(device), _offsets([len(own) for own in kept])


def padded_rows(
    text: Sequence[int],
    images: Sequence[int],
    masks: Sequence[Tensor | None],
    rotate: Callable[[Tensor], Tensor],
    device: torch.device,
    tap: ItemTap | None,
) -> RaggedRows:
    most, size = max(text), max(text) + max(images)
    spans = [
        torch.arange(start, start + length)
        for i, (words, cells) in enumerate(zip(text, images, strict=True))
        for start, length in ((i * size, words), (i * size + most, cells))
    ]
    lengths = [a + b for a, b in zip(text, images, strict=True)]
    offsets = _offsets(lengths)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    live = torch.cat(spans).to(device)
    if all(mask is None for mask in masks):
        return RaggedRows(cu_seqlens, live, rotate=rotate, tap=tap, host=HostOffsets([offsets], [offsets]))
    keys, kept = _keys(list(torch.arange(sum(lengths)).split(lengths)), masks, device)
    cu_seqlens_k = torch.tensor(kept, dtype=torch.int32, device=device)
    return RaggedRows(cu_seqlens, live, keys, cu_seqlens_k, rotate, tap, HostOffsets([offsets], [kept]))
