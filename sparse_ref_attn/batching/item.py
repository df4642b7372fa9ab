"""One item of a batch: its copy of the pipeline, its thread, its generation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..config import SparseRef
from ..errors import BatchError
from ..patching.call import GenerationCall
from ..patching.execution.ragged import Item
from ..patching.generations import Generations
from ..patching.measuring import view_with_lse
from ..timing import Stopwatch
from .lockstep import Lockstep
from .progress import SharedBar
from .proxy import TransformerProxy

__all__ = ["BatchItem"]


class _Frozen(Stopwatch):
    """The time of a joined call, which each of its items reports."""

    def __init__(self, watch: Stopwatch) -> None:
        self._first, self._last = watch._first, watch._last

    def stop(self, device: torch.device) -> None:
        return None


class BatchItem:
    """One item: its copy of the pipeline, its thread, its generation."""

    def __init__(self, index: int, pipe: Any, model: nn.Module, adapter: Adapter, config: SparseRef) -> None:
        self.index = index
        self.pipe = copy.copy(pipe)
        self.own = vars(self.pipe)  # set past the pipeline's __setattr__, which would note the proxy in its config
        self.own["scheduler"] = copy.deepcopy(pipe.scheduler)
        self.own["maybe_free_model_hooks"] = lambda: None  # the batch does it once, at its end
        self.generations = Generations(model, self.pipe, config, adapter)
        self._adapter = adapter
        self._call: GenerationCall | None = None
        self.looks = False
        """Whether the attention of the joined call that runs is to be shown to `look`."""

    def start(self, model: nn.Module, bar: SharedBar, arguments: Kwargs) -> None:
        def call(ask: Callable[[Any], Any]) -> Any:
            self.own["transformer"] = TransformerProxy(model, ask)
            return self.pipe(**arguments)

        self.own["progress_bar"] = bar.part
        self.lockstep = Lockstep(call)

    def before(self, transformer: nn.Module, kwargs: Kwargs, together: bool) -> list[Item]:
        """The item's call with the rows that take part, one `Item` for each picture it makes at once."""
        call = self._call = self.generations.call(transformer, kwargs, eager=together)
        if call is not None:
            self.looks, call.measures = together and call.measures, call.measures and not together
            kwargs = call.enter()
        short = None if call is None else call.shortened
        return [Item(part, short) for part in (self._adapter.items(kwargs) if together else [kwargs])]

    def after(self, output: Any, watch: Stopwatch | None = None) -> Any:
        """The output as the item's call expects it."""
        call, self._call, self.looks = self._call, None, False
        if call is None:
            return output
        if watch is not None:
            call.watch = _Frozen(watch)
        return call.leave(output)

    def look(self, block: int, parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]) -> None:
        """Measure one attention call of a profiling step, all of the item's pictures."""
        assert self._call is not None
        q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))  # type: ignore[misc]
        masks = [part[3] for part in parts if part[3] is not None]
        lses = [part[4] for part in parts if part[4] is not None]
        mask, lse = (torch.cat(given) if given else None for given in (masks, lses))
        view = view_with_lse(self._adapter, self._call.layout, q, k, v, mask, lse)
        if view is not None:
            self._call.run.observe(self._call.at.step, block, view)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors inside say which item they come from."""
        try:
            yield
        except BatchError:
            raise
        except Exception as error:
            raise BatchError(
                f"item {self.index} of the batch failed: {type(error).__name__}: {error}", self.index
            ) from error
