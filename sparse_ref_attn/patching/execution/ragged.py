"""Calls with different numbers of rows, run as one: each item attends to its own rows alone.

Where modulation depends on the timestep only (FLUX.2), items lie end to end through whole blocks:

    [text 0 | text 1 | ... | image 0 | image 1 | ...]

Elsewhere they are padded to one length side by side, and attention takes the live rows out, turns each item by its own
rotary tables and puts the rows back. What attention must know travels as an argument of the blocks, so a block that is
run again for its gradient (gradient checkpointing) finds the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter, Kwargs
from ...adapters.collate import sample_of, with_sample
from ...adapters.masks import without_mask
from ...adapters.shortened import Shortened
from ...adapters.stream import stream_rows
from ...errors import IncompatibleError, LayoutError
from ...functional import unpack_rows
from ...hooks.diffusers import SLOT, answered_layer, layers_of, splits_the_sequence
from ...types import TokenLayout
from ..call import Call
from ..proving import prepare_joined
from .ragged_rows import ItemTap, RaggedRows, packed_rows, padded_rows

__all__ = ["Item", "PerItem", "Ragged", "RaggedCall", "RaggedRows"]


@dataclass(frozen=True)
class Item:
    """One call with a batch of one.

    Parameters
    ----------
    kwargs : dict
        Its arguments by name, with the rows that take part.
    short : Shortened, optional
        Where rows were dropped or replaced.
    """

    kwargs: Kwargs
    short: Shortened | None = None


class RaggedCall:
    """One call for several items.

    Attributes
    ----------
    kwargs : dict
        What the transformer is to be called with.
    text, images : tuple of int
        Rows of each item in the text and the image stream.
    rows, live : int
        Rows that the transformer runs on, and how many of them are the items' own.
    """

    def __init__(self, kwargs: Kwargs, text: Sequence[int], images: Sequence[int], packed: bool) -> None:
        self.kwargs = kwargs
        self.text, self.images, self._packed = tuple(text), tuple(images), packed
        self.live = sum(text) + sum(images)
        self.rows = self.live if packed else len(images) * (max(text) + max(images))
        self._restore: tuple[Sequence[Tensor], int] | None = None

    def samples(self, output: Any) -> list[Tensor]:
        """Each item's output rows (1, rows, D), in the order of the items."""
        sample = sample_of(output)
        if self._packed:
            return list(sample.split(self.images, dim=1))
        return [sample[i : i + 1, :rows] for i, rows in enumerate(self.images)]

    def outputs(self, output: Any) -> list[Any]:
        """What each item's own call would have returned."""
        return [with_sample(output, sample) for sample in self.samples(output)]

    def restore(self, output: Any) -> Any:
        """The output of the batched call that `Ragged.shortened` took apart: full length, dropped rows zero."""
        if self._restore is None:
            raise LayoutError("only a call made by Ragged.shortened has an output to restore")
        rows, size = self._restore
        full = [unpack_rows(x, at, size) for x, at in zip(self.samples(output), rows, strict=True)]
        return with_sample(output, torch.cat(full))


class Ragged:
    """Makes one transformer able to run items of different lengths as one call.

    `install` puts hooks on its attention layers that do nothing but for joined calls. They must
    stay until the backward pass is done, since a checkpointed block runs again there.

    Parameters
    ----------
    transformer : nn.Module
    adapter : Adapter

    Examples
    --------
    A batch of two, of which the first item keeps rows 0 and 2 and the second one all four:

    >>> from sparse_ref_attn.models import adapter_for
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> model = kontext_pipeline(size="tiny").transformer
    >>> adapter = adapter_for(model)
    >>> ids = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])
    >>> config = model.config
    >>> kwargs = {
    ...     "hidden_states": torch.randn(2, 4, config.in_channels), "timestep": torch.ones(2),
    ...     "encoder_hidden_states": torch.randn(2, 3, config.joint_attention_dim), "txt_ids": torch.zeros(3, 3),
    ...     "pooled_projections": torch.randn(2, config.pooled_projection_dim), "img_ids": ids,
    ...     "guidance": torch.ones(2), "return_dict": False,
    ... }
    >>> layout = TokenLayout(4, 3, (0, 2), (Reference(2, 2, (1, 2)),))
    >>> ragged = Ragged(model, adapter)
    >>> ragged.install()
    >>> with ragged.shortened(kwargs, layout, [torch.tensor([0, 2]), torch.arange(4)]) as call:
    ...     out = call.restore(model(**call.kwargs))
    >>> out[0].shape[:2], bool(out[0][0, [1, 3]].any())
    (torch.Size([2, 4]), False)
    >>> ragged.remove()
    """

    def __init__(self, transformer: nn.Module, adapter: Adapter) -> None:
        self._transformer, self._adapter = transformer, adapter
        self._layers = layers_of(transformer)
        known = adapter.processors
        other = sorted({type(m.processor).__name__ for m in self._layers} - set(known))
        if other or not self._layers:
            raise IncompatibleError(
                f"to run calls together, the attention of {type(transformer).__name__} must go through "
                f"{' or '.join(known) or 'processors that its adapter names'}, got {other or 'none'}"
            )
        self._running: RaggedCall | None = None
        self._short: Shortened | None = None
        self._undo = contextlib.ExitStack()

    def install(self) -> None:
        """Put the hooks on."""
        with contextlib.ExitStack() as undo:
            for i, layer in enumerate(self._layers):
                for off in answered_layer(layer, RaggedRows, partial(_attend, i)):
                    undo.callback(off)
            for off in self._adapter.joined_hooks(self._transformer, lambda: self._running):
                undo.callback(off)
            for off in self._adapter.hooks(self._transformer, lambda: self._short):
                undo.callback(off)
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Take the hooks off; calling it again does nothing."""
        self._undo.close()

    @contextlib.contextmanager
    def joined(
        self, items: Sequence[Item], shared_time: bool | None = None, tap: ItemTap | None = None
    ) -> Iterator[RaggedCall]:
        """Inside, the transformer may be called once with the returned call's `kwargs`.

        Parameters
        ----------
        items : sequence of Item
        shared_time : bool, optional
            Whether all have one timestep and guidance. None asks the tensors (a host sync on CUDA).
        tap : callable, optional
            See `RaggedRows`.

        Raises
        ------
        IncompatibleError
            If the items cannot run together; the message says why.
        """
        if splits_the_sequence(self._transformer):
            raise IncompatibleError(
                "calls that run together must lie in one process, got context parallelism, which splits their rows"
            )
        adapter, calls = self._adapter, [item.kwargs for item in items]
        for kwargs in calls:
            why = adapter.cannot_join(kwargs)
            if why is not None:
                raise IncompatibleError(why)
        images = [stream_rows(adapter, kwargs) for kwargs in calls]
        text = [0 if adapter.text_tokens is None else kwargs[adapter.text_tokens].shape[1] for kwargs in calls]
        kwargs = adapter.join([without_mask(call, adapter.attention_arguments) for call in calls], shared_time)
        device = kwargs[adapter.tokens].device
        if adapter.packs:
            rows = packed_rows(text, images, adapter.key_masks(calls), device, tap)
        else:
            rotary = [torch.cat(tables) for tables in zip(*map(self._rotary, items), strict=True)]
            rows = padded_rows(text, images, adapter.key_masks(calls), partial(adapter.rotate, rotary), device, tap)
        handed = kwargs.get(adapter.attention_arguments) or {}
        lengths = [a + b for a, b in zip(text, images, strict=True)]
        padded = None if adapter.packs else len(images) * (max(text) + max(images))
        prepare_joined(adapter, self._transformer, kwargs, lengths, padded)
        call = RaggedCall({**kwargs, adapter.attention_arguments: {**handed, SLOT: rows}}, text, images, adapter.packs)
        self._running = call
        try:
            yield call
        finally:
            self._running = None

    @contextlib.contextmanager
    def shortened(
        self, kwargs: Kwargs, layout: TokenLayout, rows: Sequence[Tensor], shared_time: bool | None = None
    ) -> Iterator[RaggedCall]:
        """A batched call, item i with only `rows[i]` of its image stream; `RaggedCall.restore` undoes it.

        Parameters
        ----------
        kwargs : dict
            All arguments by name, batch B.
        layout : TokenLayout
            Of `kwargs`.
        rows : sequence of B tensors, shape (rows_i,), int64
            Ascending.
        shared_time : bool, optional
            As for `joined`.
        """
        parts = self._adapter.items(kwargs)
        if len(parts) != len(rows):
            raise LayoutError(f"rows must be given for each of the batch's {len(parts)} items, got {len(rows)}")
        items = [
            Item(self._adapter.drop(part, layout, at), Shortened(part, at, layout.rows))
            for part, at in zip(parts, rows, strict=True)
        ]
        with self.joined(items, shared_time) as call:
            call._restore = rows, layout.rows
            yield call

    @contextlib.contextmanager
    def alone(self, short: Shortened | None) -> Iterator[None]:
        """Inside, the transformer may be called once with the shortened arguments of `short` (see `Item`)."""
        self._short = short
        try:
            yield
        finally:
            self._short = None

    def _rotary(self, item: Item) -> Any:
        with self.alone(item.short):
            return self._adapter.rotary(self._transformer, item.kwargs)


class PerItem:
    """Runs a batched call with rows of its own for each item.

    Parameters
    ----------
    ragged : Ragged
    rows : sequence of Tensor, shape (rows_i,), int64
        Rows of the image stream that each item keeps, ascending.
    """

    alone = False

    def __init__(self, ragged: Ragged, rows: Sequence[Tensor]) -> None:
        self._ragged, self._rows = ragged, rows

    def before(self, call: Call) -> Kwargs:
        self._joined = call.contexts.enter_context(self._ragged.shortened(call.kwargs, call.layout, self._rows))
        return self._joined.kwargs

    def after(self, call: Call, output: Any) -> Any:
        return self._joined.restore(output)


def _attend(site: int, rows: RaggedRows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rows.attend(site, q, k, v)
