"""The items of a batch around one transformer, in lockstep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.collate import with_sample
from ..config import SparseRef
from ..hooks.compiled import eager_blocks, unwrap
from ..patching.execution.ragged import Item, Ragged
from ..patching.pixels import PixelTap
from ..timing import Stopwatch
from .item import BatchItem

__all__ = ["BatchRun"]


class BatchRun:
    """The items of a batch around one transformer."""

    def __init__(self, pipe: Any, model: nn.Module, adapter: Adapter, config: SparseRef, count: int) -> None:
        self.model, self.transformer, self.adapter = model, unwrap(model), adapter
        self.ragged = Ragged(self.transformer, adapter)
        self.items = [BatchItem(i, pipe, self.transformer, adapter, config) for i in range(count)]
        self.joined = self.alone = self.rows = self.live = 0

    def run(self, tap: PixelTap | None) -> None:
        """All items to their end, in lockstep."""
        live = [(item, None) for item in self.items]
        while live:
            waiting = []
            for item, answer in live:
                asks = item.lockstep.resume(answer)
                if item.lockstep.error is not None:
                    with item.named():
                        raise item.lockstep.error
                if asks:
                    waiting.append(item)
                    item.generations.pixels = None if tap is None else tap.handed_over()
            live = list(zip(waiting, self._serve(waiting), strict=True))

    def end(self) -> None:
        for item in self.items:
            item.lockstep.end()

    def _serve(self, waiting: Sequence[BatchItem]) -> list[Any]:
        """What each waiting item's transformer call returns."""
        calls, answers = {}, {}
        for item in waiting:
            args, kwargs, grad = item.lockstep.request
            calls[item.index] = (self.adapter.bind(self.transformer, args, kwargs), grad)
        meeting = [
            item
            for item in waiting
            if item.generations.store is None and self.adapter.cannot_join(calls[item.index][0]) is None
        ]
        if len(meeting) == 1:
            meeting = []
        for item in waiting:
            if item not in meeting:
                with item.named():
                    answers[item.index] = self._run_alone(item, *calls[item.index])
        if meeting:
            answers |= self._run_joined(meeting, calls)
        return [answers[item.index] for item in waiting]

    def _run_alone(self, item: BatchItem, kwargs: Kwargs, grad: bool) -> Any:
        self.alone += 1
        with torch.set_grad_enabled(grad):
            output = None
            ((call,),) = [item.before(self.transformer, kwargs, together=False)]
            try:
                with self.ragged.alone(call.short):
                    output = self.model(**call.kwargs)
            finally:
                output = item.after(output)
            return output

    def _run_joined(self, meeting: Sequence[BatchItem], calls: Mapping[int, tuple[Kwargs, bool]]) -> dict[int, Any]:
        self.joined += 1
        parts: list[tuple[BatchItem, int]] = []
        flat: list[Item] = []
        for item in meeting:
            with item.named():
                own = item.before(self.transformer, calls[item.index][0], together=True)
            parts += [(item, len(own))] * len(own)
            flat += own
        seen: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]] = {}

        def tap(at: int, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor | None) -> None:
            item, count = parts[at]
            if not item.looks:
                return
            own = seen.setdefault(item.index, [])
            own.append((q, k, v, mask, lse))
            if len(own) == count:
                with item.named():
                    item.look(block, seen.pop(item.index))

        profiles = any(item.looks for item in meeting)
        with (
            torch.set_grad_enabled(calls[meeting[0].index][1]),
            eager_blocks(self.transformer),
            self.ragged.joined(flat, tap=tap if profiles else None) as call,
        ):
            device = call.kwargs[self.adapter.tokens].device
            self.rows, self.live = self.rows + call.rows, self.live + call.live
            watch = Stopwatch(device)
            output = self.model(**call.kwargs)
            watch.stop(device)
            samples = iter(call.samples(output))
            answers = {}
            for item in meeting:
                rows = torch.cat([next(samples) for other, _ in parts if other is item])
                with item.named():
                    answers[item.index] = item.after(with_sample(output, rows), watch)
        return answers
