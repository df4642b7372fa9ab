"""The blocks of a transformer, and the cutting of their arguments where references leave by depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import LayoutError
from ..functional import pack_rows
from ..types import TokenLayout
from .joint_order import pick, places_of_kept

__all__ = ["Block", "DepthCut", "blocks_of"]


@dataclass(frozen=True)
class Block:
    """One block of a transformer: where it stands, its name among the modules, and its kind ("double", "single")."""

    stack: nn.ModuleList
    index: int
    name: str
    kind: str

    @property
    def module(self) -> nn.Module:
        return self.stack[self.index]


def blocks_of(transformer: nn.Module, stacks: Mapping[str, str]) -> list[Block]:
    """The blocks of the ModuleLists named in `stacks` (name -> kind), in order.

    Examples
    --------
    >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Identity(), nn.Identity()])})
    >>> [block.name for block in blocks_of(model, {"blocks": "single"})]
    ['blocks.0', 'blocks.1']
    """
    found: list[Block] = []
    for path, kind in stacks.items():
        stack = cast(nn.ModuleList, transformer.get_submodule(path))
        found.extend(Block(stack, i, f"{path}.{i}", kind) for i in range(len(stack)))
    return found


class DepthCut:
    """The rows of one call that stay, and the cutting of block arguments to them.

    Parameters
    ----------
    layout : TokenLayout
        Of the whole call.
    choose : callable returning Tensor or None
        The kept rows of the image stream (ascending), or None to keep all; asked at the first block that cuts.
    order : callable, optional
        From a kind of blocks to `Adapter.order` of the call.
    """

    def __init__(
        self,
        layout: TokenLayout,
        choose: Callable[[], Tensor | None],
        order: Callable[[str], Tensor | None] = lambda kind: None,
    ) -> None:
        self._layout, self.full, self._order = layout, layout.rows, order
        self._places: dict[str, tuple[Tensor, int]] = {}
        self._choose: Callable[[], Tensor | None] | None = choose
        self._joint: Tensor | None = None
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.kept: Tensor | None = None

    @property
    def reached(self) -> bool:
        """Whether a block that cuts has run."""
        return self._choose is None

    def arrive(self) -> bool:
        """Choose the rows, once; whether there is anything to cut."""
        if self._choose is not None:
            self.kept, self._choose = self._choose(), None
        return self.kept is not None

    def rows(self, x: Tensor, axis: int = 1, joint: bool = False) -> Tensor:
        """The kept rows of a stream; as it is when an earlier block has cut it.

        Parameters
        ----------
        x : Tensor
            With the rows of the image stream along `axis`, or with `joint` the text's rows before them.

        Raises
        ------
        LayoutError
            If it has another number of rows: a split sequence, or tokens that somebody added.
        """
        assert self.kept is not None
        text = self._layout.text if joint else 0
        full, short = text + self._layout.rows, text + self.kept.shape[0]
        if x.shape[axis] == short:
            return x
        if x.shape[axis] != full:
            raise LayoutError(
                f"where references leave by depth, a block must get all {full} rows of its stream or the {short} kept "
                f"ones, got {x.shape[axis]}"
            )
        return pack_rows(x, self._stream_rows(joint).to(x.device), axis)

    def joint(self, x: Tensor, kind: str) -> Tensor:
        """As `rows`, of joint rows (B, S, ...) that lie as the model has them, of a block of `kind`."""
        places, full = self.places(kind)
        if x.shape[1] == places.shape[1]:
            return x
        if x.shape[1] != full:
            raise LayoutError(
                f"where references leave by depth, a block must get all {full} joint rows or the {places.shape[1]} "
                f"kept ones, got {x.shape[1]}"
            )
        return pick(x, places)

    def places(self, kind: str) -> tuple[Tensor, int]:
        """Where the kept joint rows lie as the model has them, (B or 1, rows) ascending, and how many there were."""
        if kind not in self._places:
            order = self._order(kind)
            assert order is not None
            assert self.kept is not None
            kept = places_of_kept(order, self.kept, self.full)
            self._places[kind] = (kept.sort(1).values, order.shape[1])
        return self._places[kind]

    def table(self, x: Tensor, axis: int = 0, joint: bool = False) -> Tensor:
        """As `rows`, of a tensor that every block gets anew: cut once a call."""
        if id(x) not in self._tables:
            self._tables[id(x)] = (x, self.rows(x, axis, joint))
        return self._tables[id(x)][1]

    def _stream_rows(self, joint: bool) -> Tensor:
        assert self.kept is not None
        if not joint:
            return self.kept
        if self._joint is None:
            text = self._layout.text
            self._joint = torch.cat([torch.arange(text, device=self.kept.device), self.kept + text])
        return self._joint
