"""Reference K/V of all layers in rank order, so that any budget is a prefix beside a call's own rows.

Softmax does not care about the order of keys. A layer's reference rows stand in one buffer, the best
nearest to a *room* into which each call writes its own (text and generation) rows: the room and the
best n rows beside it are one contiguous range, and attention reads it as a view, with no gather and
no concatenation. Two layers share a room, one on each side, because a call is done with its rows when
the next layer begins::

    | layer 0, worst .. best | room | layer 1, best .. worst |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BudgetError, LayoutError
from .moved import moved

__all__ = ["RankedCache"]


class RankedCache:
    """K and V of every layer's reference tokens, the best first.

    Parameters
    ----------
    rows : sequence of int
        Reference rows that each layer holds (K_l), in order of execution.
    room : int
        Rows of a call's own (text + generation); it grows when a call has more.

    Notes
    -----
    Holds ``2 B H C (sum of K_l + ceil(layers / 2) room)`` elements once every layer is stored. A view
    that `join` gives is good until the next layer's `join`. No host sync, not differentiable.

    Examples
    --------
    >>> cache = RankedCache(rows=[3], room=2)
    >>> k = torch.arange(3.0).reshape(1, 3, 1, 1)
    >>> cache.store(0, k, -k, torch.tensor([2, 0, 1]))
    >>> own = torch.full((1, 2, 1, 1), 9.0)
    >>> keys, values = cache.join(0, own, own, 2)
    >>> keys.flatten().tolist(), values.flatten().tolist()
    ([0.0, 2.0, 9.0, 9.0], [-0.0, -2.0, 9.0, 9.0])
    """

    def __init__(self, rows: Sequence[int], room: int) -> None:
        self.rows = list(rows)
        self._room = room
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._tokens: dict[int, Tensor] = {}
        self._row_bytes: dict[int, int] = {}

    @property
    def row_bytes(self) -> int:
        """Bytes of reference rows."""
        return sum(2 * self.rows[i] * self._row_bytes[i // 2] for i in self._tokens)

    @property
    def room_bytes(self) -> int:
        """Bytes of the rooms for a call's own rows."""
        return sum(2 * self._room * self._row_bytes[pair] for pair in self._buffers)

    def bytes_of(self, rows: int) -> int:
        """Bytes that `rows` rows of every layer would take."""
        return sum(2 * rows * self._row_bytes[i // 2] for i in self._tokens)

    def store(self, layer: int, k: Tensor, v: Tensor, order: Tensor) -> None:
        """Take the rows `order` (K_l,) of a layer's k and v (B, R, H, C), the best first.

        Raises
        ------
        LayoutError
            If it is not one row for each the layer holds, or k and v differ from the other layers'.
        """
        if order.shape != (self.rows[layer],) or k.shape != v.shape or k.ndim != 4:
            raise LayoutError(
                f"layer {layer} must get {self.rows[layer]} rows of k and v (B, R, H, C), got {len(order)} rows of "
                f"{tuple(k.shape)} and {tuple(v.shape)}"
            )
        if layer // 2 not in self._buffers:
            left, right = self._sides(layer)
            shape = (k.shape[0], left + self._room + right, *k.shape[2:])
            self._buffers[layer // 2] = (k.new_empty(shape), v.new_empty(shape))
            self._row_bytes[layer // 2] = k[:, :1].numel() * k.element_size()
        order = order.to(k.device)
        inner = order.flip(0) if layer % 2 == 0 else order
        self._check(layer, k)
        for own, given in zip(self._held(layer), (k, v), strict=True):
            own.copy_(given.index_select(1, inner))
        self._tokens[layer] = order

    def holds(self, layer: int) -> bool:
        """Whether the layer's rows were stored."""
        return layer in self._tokens

    def renew(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Take the same rows, in the same order, of newer k and v (B, R, H, C) than those of `store`.

        Returns
        -------
        Tensor, shape (), float32
            How far they moved: norm of the difference over the norm of the new ones, the larger of that of k and v.

        Examples
        --------
        >>> cache, k = RankedCache(rows=[2], room=1), torch.full((1, 3, 1, 1), 4.0)
        >>> cache.store(0, k, k, torch.tensor([2, 0]))
        >>> cache.renew(0, k, k + 1)
        tensor(0.2000)
        """
        self._check(layer, k)
        tokens, held = self.tokens(layer, self.rows[layer]), self._held(layer)
        new = [given.index_select(1, tokens.to(given.device)) for given in (k, v)]
        change = moved(held, new)
        for own, given in zip(held, new, strict=True):
            own.copy_(given)
        return change

    def join(self, layer: int, k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Write a call's own k and v (B, S, H, C) beside the layer's rows.

        Returns
        -------
        keys, values : Tensor, shape (B, S + count, H, C)
            Views of the own rows and the best `count` rows.

        Raises
        ------
        BudgetError
            If the layer holds fewer rows.
        LayoutError
            If the own rows do not fit the stored ones in batch, heads, dtype or device.
        """
        if not 0 <= count <= self.rows[layer]:
            raise BudgetError(f"layer {layer} holds {self.rows[layer]} reference rows, got a budget of {count}")
        self._check(layer, k)
        own = k.shape[1]
        self.reserve(own)
        left, _ = self._sides(layer)
        first = left if layer % 2 == 0 else left + self._room - own
        for buffer, given in zip(self._buffers[layer // 2], (k, v), strict=True):
            buffer[:, first : first + own].copy_(given)
        return self._range(layer, own, count)

    def all_of(self, layer: int, own: int) -> tuple[Tensor, Tensor, tuple[int, int], Tensor]:
        """After `join`: views of the `own` rows and all the layer's, their span, and which row of `store` each is."""
        keys, values = self._range(layer, own, self.rows[layer])
        first = 0 if self.before(layer) else own
        return keys, values, (first, first + self.rows[layer]), self.tokens(layer, self.rows[layer])

    def before(self, layer: int) -> bool:
        """Whether the layer's rows lie before a call's own in `join`'s views, or after them."""
        return layer % 2 == 0

    def tokens(self, layer: int, count: int) -> Tensor:
        """Which row of `store` each of the layer's best `count` rows is, (count,), as they lie in `join`'s views."""
        best = self._tokens[layer][:count]
        return best.flip(0) if layer % 2 == 0 else best

    def prefix(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's best `count` rows of k and v (B, count, H, C), in no order that matters to attention."""
        k, v = self._held(layer)
        first = self.rows[layer] - count if layer % 2 == 0 else 0
        return k[:, first : first + count], v[:, first : first + count]

    def bank(self, layer: int, count: int) -> tuple[Tensor, Tensor, int]:
        """The layer's whole buffers of k and v (B, T, H, C), and the first of its best `count` rows in them.

        They hold another layer's rows too, and the room.

        Raises
        ------
        BudgetError
            If the layer holds fewer rows.
        """
        if not 0 <= count <= self.rows[layer]:
            raise BudgetError(f"layer {layer} holds {self.rows[layer]} reference rows, got a budget of {count}")
        left, _ = self._sides(layer)
        return *self._buffers[layer // 2], (left - count if layer % 2 == 0 else left + self._room)

    def reserve(self, room: int) -> bool:
        """Room for calls of `room` own rows; whether the buffers are others now."""
        if room <= self._room:
            return False
        self._resize(self.rows, room)
        return True

    def rearrange(self, layer: int, order: Tensor) -> None:
        """Put the layer's rows into another order: `order` (K_l,) names the same rows as in `store`, the best first."""
        rows, now = self.rows[layer], self._tokens[layer]
        order = order.to(now.device)
        at = now.argsort()[torch.searchsorted(now.sort().values, order)]
        inner = (rows - 1 - at).flip(0) if layer % 2 == 0 else at
        for own in self._held(layer):
            own.copy_(own.index_select(1, inner))
        self._tokens[layer] = order

    def shrink(self, rows: Sequence[int]) -> None:
        """Give back all but the best ``rows[l]`` rows of each layer."""
        self._resize(rows, self._room)

    def _resize(self, rows: Sequence[int], room: int) -> None:
        """Buffers for fewer rows or a larger room, one pair at a time; the room's content is not kept."""
        for pair, (k, v) in self._buffers.items():
            layers = [layer for layer in (2 * pair, 2 * pair + 1) if layer < len(self.rows)]
            length = room + sum(rows[layer] for layer in layers)
            made = []
            for old in (k, v):
                new = old.new_empty(old.shape[0], length, *old.shape[2:])
                left, kept = self.rows[2 * pair], rows[2 * pair]
                new[:, :kept].copy_(old[:, left - kept : left])
                new[:, kept + room :].copy_(old[:, left + self._room :][:, : length - kept - room])
                made.append(new)
            self._buffers[pair] = (made[0], made[1])
        self._tokens = {layer: tokens[: rows[layer]] for layer, tokens in self._tokens.items()}
        self.rows, self._room = list(rows), room

    def _sides(self, layer: int) -> tuple[int, int]:
        """Rows on the left and on the right of the layer's room."""
        left = layer // 2 * 2
        return self.rows[left], self.rows[left + 1] if left + 1 < len(self.rows) else 0

    def _held(self, layer: int) -> list[Tensor]:
        left, right = self._sides(layer)
        first, length = (0, left) if layer % 2 == 0 else (left + self._room, right)
        return [buffer[:, first : first + length] for buffer in self._buffers[layer // 2]]

    def _range(self, layer: int, own: int, count: int) -> tuple[Tensor, Tensor]:
        left, _ = self._sides(layer)
        a, b = (left - count, left + own) if layer % 2 == 0 else (left + self._room - own, left + self._room + count)
        k, v = self._buffers[layer // 2]
        return k[:, a:b], v[:, a:b]

    def _check(self, layer: int, k: Tensor) -> None:
        buffer = self._buffers[layer // 2][0]
        if (k.shape[0], *k.shape[2:], k.dtype, k.device) != (
            buffer.shape[0], *buffer.shape[2:], buffer.dtype, buffer.device,
        ):  # fmt: skip
            raise LayoutError(
                f"keys must fit the stored reference keys, (B, H, C) = {(buffer.shape[0], *buffer.shape[2:])} in "
                f"{buffer.dtype} on {buffer.device}, got {tuple(k.shape)} in {k.dtype} on {k.device}"
            )
