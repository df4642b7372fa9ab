"""What calls have in common that one verdict serves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

__all__ = ["Kind", "size_class"]


class Kind(NamedTuple):
    """A kind of call.

    Parameters
    ----------
    op : {"gather_attention", "attention_mass", "pack_rows"}
    form : str
        gather_attention: "dense", "gathered", "per head", "tiles", "tiles per head"; attention_mass: "LSE given",
        "LSE computed", and each with ", per tile"; pack_rows: "pack", "unpack".
    device : torch.device
    dtype : torch.dtype
    heads, key_heads, channels : int
        0 where the op knows none.
    gradients : bool
        Whether a backward pass follows.
    several : bool
        Whether there is more than one item.
    size : tuple of int
        Size classes. Attention: queries, dense keys and kept rows of an item; with tiles kept rows of a tile, and
        its queries. Mass: queries, keys, references. Rows: rows, kept rows, bytes of one row.
    """

    op: str
    form: str
    device: torch.device
    dtype: torch.dtype
    heads: int = 0
    key_heads: int = 0
    channels: int = 0
    gradients: bool = False
    several: bool = False
    size: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """In words, without the device."""
        parts = [self.op, self.form, str(self.dtype).removeprefix("torch.")]
        if self.channels:
            parts.append(f"{self.heads} heads x {self.channels}")
        parts += ["with gradients"] * self.gradients + ["several items"] * self.several
        return ", ".join([*parts, " x ".join(map(str, self.size))])

    def resized(self, size: tuple[int, ...]) -> Kind:
        """The same kind in another size class."""
        return self._replace(size=size)


def size_class(count: int, least: int = 64) -> int:
    """The power of two nearest to `count` in ratio, not below `least`: calls of one class share a verdict.

    Examples
    --------
    >>> size_class(8704), size_class(4608), size_class(10), size_class(0)
    (8192, 4096, 64, 0)
    """
    return 0 if count <= 0 else max(least, 2 ** round(math.log2(count)))
