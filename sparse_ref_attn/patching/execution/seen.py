"""Which keys of a call may be attended to, where attention knows masks of keys alone, and whether its layers agree."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...adapters.base import Adapter, Kwargs
from ...adapters.masks import as_scores
from ...errors import LayoutError
from ...types import TokenLayout

__all__ = ["PackedKeys", "SeenKeys"]


@dataclass(frozen=True)
class PackedKeys:
    """A call's own keys that may be attended to, item by item.

    Parameters
    ----------
    rows : Tensor, shape (T,), int64
        Of the flattened (B * N) rows.
    offsets : tuple of int
        Where each item's begin, and where the last's end.
    """

    rows: Tensor
    offsets: tuple[int, ...]

    def known(self, rows: int, others: int) -> tuple[list[int], list[list[int]]]:
        """Offsets of items of `rows` queries, and of their keys, beside which each has `others` more.

        Examples
        --------
        >>> PackedKeys(torch.tensor([1, 2]), (0, 1, 2)).known(3, 4)
        ([0, 3, 6], [[0, 1, 2], [0, 4, 8]])
        """
        items = range(len(self.offsets))
        keys = [list(self.offsets), *([[i * others for i in items]] if others else [])]
        return [i * rows for i in items], keys


@dataclass
class SeenKeys:
    """What a call's arguments say of its keys, and whether its layers go by the same.

    Parameters
    ----------
    keys : Tensor, shape (B, text + rows), bool, optional
        Of a call with every row, text first; None for all.
    layout : TokenLayout
        Of that call.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference
    >>> layout = TokenLayout(3, 1, (0, 2), (Reference(2, 1),))
    >>> seen = SeenKeys(torch.tensor([[False, True, True, True]]), layout)
    >>> seen.packed(), seen.references
    (PackedKeys(rows=tensor([1, 2]), offsets=(0, 2)), None)
    """

    keys: Tensor | None
    layout: TokenLayout
    _agree: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, adapter: Adapter, kwargs: Kwargs, layout: TokenLayout) -> SeenKeys:
        """Of a call's arguments with every row (may sync).

        Raises
        ------
        IncompatibleError
            If its mask is none of keys.
        """
        keys = adapter.keys(kwargs)
        if keys is not None and bool(keys.all()):
            keys = None
        return cls(keys, layout)

    @property
    def references(self) -> Tensor | None:
        """Reference tokens that may be attended to, (B, R) bool; None for all (may sync)."""
        if self.keys is None:
            return None
        seen = self.keys[:, self.layout.text + self.layout.reference_rows(self.keys.device)]
        return None if bool(seen.all()) else seen

    @property
    def own(self) -> Tensor | None:
        """Text and generation rows that may be, (B, N) bool; None for all."""
        if self.keys is None:
            return None
        text, (first, length) = self.layout.text, self.layout.generation
        return torch.cat([self.keys[:, :text], self.keys[:, text + first : text + first + length]], 1)

    def packed(self) -> PackedKeys | None:
        """The own rows that may be attended to; None where all may (syncs)."""
        own = self.own
        if own is None or bool(own.all()):
            return None
        counts = own.sum(1).cumsum(0).tolist()
        return PackedKeys(own.flatten().nonzero().flatten(), (0, *counts))

    def hear(self, mask: Tensor | None, expected: Tensor | None, batch: int) -> None:
        """Note the mask that a layer goes by, of whose keys (B, S) those `expected` may be attended to.

        Raises
        ------
        LayoutError
            If it is none of keys.
        """
        if mask is None:
            if expected is not None:
                self._agree.append(expected.all())
            return
        scores = as_scores(mask, batch)
        if scores.shape[1] > 1 or scores.shape[2] > 1:
            raise LayoutError(self._words(tuple(mask.shape)))
        keys = scores[:, 0, 0]
        known = torch.ones_like(keys, dtype=torch.bool)
        if keys.dtype != torch.bool:
            hidden = keys <= torch.finfo(keys.dtype).min / 2
            known, keys = hidden | (keys == 0), ~hidden
        right = keys.all() if expected is None else (keys == expected).all()
        self._agree.append(right & known.all())

    def check(self) -> None:
        """After the call: raise LayoutError where a layer went by another mask (syncs where there was any)."""
        if self._agree and not bool(torch.stack(self._agree).all()):
            raise LayoutError(self._words("others"))

    def _words(self, got: object) -> str:
        return (
            "where each tile reads reference tokens of its own, every attention layer must mask the keys that the "
            f"call's own mask names and no others, got {got}: name the mask to the adapter, or use per='run'"
        )
