"""A call in which references run by themselves, and text and generation read their keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.mask_columns import beside, reference_columns
from ..adapters.stream import restored
from ..errors import IncompatibleError
from ..functional import pack_rows
from ..hooks.diffusers import Attention
from ..isolation import Isolation
from ..patching.call import Call
from ..patching.execution.isolated import check_isolates, isolated_layers, without_references
from ..patching.execution.joint import JointAttention
from ..patching.execution.stored import joined

__all__ = ["Isolating", "Isolator"]


class Isolator:
    """Makes the calls of one transformer isolate their references.

    Parameters
    ----------
    transformer : nn.Module
    adapter : Adapter
    isolation : Isolation

    Raises
    ------
    IncompatibleError
        If the model's references cannot run by themselves, or do so without help.
    """

    def __init__(self, transformer: nn.Module, adapter: Adapter, isolation: Isolation) -> None:
        if adapter.cache is not None and adapter.cache.kept_by(transformer):
            raise IncompatibleError(
                f"there is nothing to do: the references of this {adapter.name} run by themselves already, and its "
                "pipeline keeps their keys and values, as Klein-KV's does. Train it as it is"
            )
        self._adapter, self._isolation = adapter, isolation
        self._attention = JointAttention(adapter, transformer)
        check_isolates(adapter, transformer, self._attention)

    def execution(self, module: nn.Module, kept: Tensor | None) -> Isolating:
        """Of a call that reads the reference tokens `kept`, (K,) int64, or all."""
        if not self._attention.serves(module):
            self._attention = JointAttention(self._adapter, module)
        check_isolates(self._adapter, module, self._attention)
        return Isolating(self._attention, self._isolation, kept)


class Isolating:
    """Runs a call's references by themselves, then text and generation alone, which attend to them.

    Parameters
    ----------
    attention : JointAttention
    isolation : Isolation
    kept : Tensor, shape (K,), int64, optional
        Reference tokens that are read, ascending. None: all.
    """

    alone = False

    def __init__(self, attention: JointAttention, isolation: Isolation, kept: Tensor | None) -> None:
        self._attention, self._isolation, self._kept = attention, isolation, kept

    def before(self, call: Call) -> Kwargs:
        layers = isolated_layers(call, self._attention, self._isolation)
        batch, mask = call.kwargs[call.adapter.tokens].shape[0], call.adapter.mask(call.kwargs)
        columns = None if mask is None else reference_columns(mask, batch, call.layout)
        kept = self._kept
        if kept is not None:
            layers = [(pack_rows(k, kept), pack_rows(v, kept)) for k, v in layers]
            columns = None if columns is None else columns.index_select(3, kept.to(columns.device))
        rows = call.layout.text + call.layout.generation[1]
        count = layers[0][0].shape[1]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            seen = beside(mask, columns, count, rows, batch, before=False)
            return own(*joined(layers[layer], (k, v), before=False), seen)

        kwargs = without_references(call)
        self._attention.answer(call, rows, attend, eager=True)
        return kwargs

    def after(self, call: Call, output: Any) -> Any:
        assert call.shortened is not None
        return restored(call.adapter, output, call.shortened.rows, call.layout)
