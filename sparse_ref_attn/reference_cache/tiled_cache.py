"""Reference K/V of all layers in the order of the tokens, their cells' means, and what each tile reads of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .moved import moved
from .tile_ranking import TileRanking

__all__ = ["TiledCache"]


class TiledCache:
    """K and V of every layer's reference tokens, which each tile of a call's own rows reads by its own ranking.

    Parameters
    ----------
    layers : int
    ranking : TileRanking
        Its cells are those whose means are held.

    Examples
    --------
    >>> from sparse_ref_attn.reference_cache import Cells, Tiling
    >>> cache = TiledCache(1, TileRanking(Tiling(0, (1, 2), 1), (4,), Cells(((1, 4),), 2)))
    >>> k = torch.arange(4.0).view(1, 4, 1, 1)
    >>> cache.store(0, k, -k)
    >>> cache.means(0)[0].flatten(), cache.holds(0)
    (tensor([0.5000, 2.5000]), True)
    """

    def __init__(self, layers: int, ranking: TileRanking) -> None:
        self.layers, self.ranking = layers, ranking
        self._seen: Tensor | None = None
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._means: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of rows, means and rankings."""
        return self.row_bytes + _bytes(self._means) + self.ranking.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows alone."""
        return _bytes(self._rows)

    @property
    def seen(self) -> Tensor | None:
        """Tokens that may be attended to, (B, R) bool; None for all."""
        return self._seen

    def holds(self, layer: int) -> bool:
        """Whether the layer's rows were stored."""
        return layer in self._rows

    def hide(self, seen: Tensor | None) -> None:
        """Say which tokens may be attended to, before layers are stored (a sync where `seen` is given)."""
        self._seen = seen
        self.ranking.hide(seen)

    def store(self, layer: int, k: Tensor, v: Tensor) -> Tensor | None:
        """Take a layer's k and v (B, R, H, C), and forget its ranking.

        Returns
        -------
        Tensor, shape (), float32, or None
            How far they moved since they were last taken (see `moved`); None if they were not.

        Raises
        ------
        LayoutError
            If they are not of every token, or of another shape, dtype or device than before.
        """
        tokens = sum(self.ranking.sizes)
        held = self._rows.get(layer)
        wanted = (k.shape[0], tokens, *k.shape[2:]) if held is None else tuple(held[0].shape)
        if {tuple(k.shape), tuple(v.shape)} != {wanted} or (held is not None and not _alike(k, held[0])):
            raise LayoutError(
                f"layer {layer} must get k and v (B, R, H, C) = {wanted} as before, got {tuple(k.shape)} and "
                f"{tuple(v.shape)} in {k.dtype} on {k.device}"
            )
        change = None
        if held is None:
            self._rows[layer] = held = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))  # type: ignore[assignment]
        else:
            change = moved(held, (k, v))
        assert held is not None
        for own, given in zip(held, (k, v), strict=True):
            own.copy_(given)
        self.ranking.forget(layer)
        for known in (self._means, self._weights):
            known.pop(layer, None)
        return change

    def adopt(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take a layer's k and v (B, R, H, C) as they lie, not to be changed by anybody, and keep its ranking."""
        self._rows[layer] = (k, v)
        self._means.pop(layer, None)

    def weigh(self, layer: int, weights: Tensor) -> None:
        """Let the layer's tokens count by `weights` (B, R), float32, in the means, until it is stored again."""
        self._weights[layer] = weights
        self._means.pop(layer, None)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's k and v (B, R, H, C)."""
        return self._rows[layer]

    def means(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Mean k and v (B, cells, H, C) of the layer's cells, made when they are first asked for; None and None
        without."""
        if self.ranking.cells is None:
            return None, None
        if layer not in self._means:
            of, weights = self.ranking.cells.means, self._weights.get(layer)
            k, v = (of(x, self._seen, weights) for x in self._rows[layer])
            self._means[layer] = (k, v)
        return self._means[layer]


def _bytes(pairs: dict[int, tuple[Tensor, Tensor]]) -> int:
    return sum(x.numel() * x.element_size() for pair in pairs.values() for x in pair)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device)
