"""One transformer patched for training: the hooks, the draws, and the way back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.hooks import InstanceHook
from ..adapters.ragged import Ragged
from ..adapters.seams import compiled_blocks, splits_the_sequence
from ..errors import ConfigError, IncompatibleError
from ..packing import kept_rows
from ..session import Plan
from ..types import RefSelection, TokenLayout
from .random_drop import RandomDrop

__all__ = ["PURPOSE", "TrainingHandle"]

logger = logging.getLogger("sparse_ref_attn")

PURPOSE = "training"


class _Call:
    """What the post-hook needs of the call that the pre-hook prepared."""

    def __init__(self) -> None:
        self.restore: Callable[[Any], Any] = lambda output: output
        self.short: tuple[Kwargs, Plan, Tensor] | None = None
        self.contexts = contextlib.ExitStack()


class TrainingHandle:
    """What `patch_for_training` returns: what was kept, the state of the draws, and the way back.

    It has ``state_dict`` and ``load_state_dict``, so that
    ``accelerator.register_for_checkpointing(handle)`` saves and restores its draws.
    """

    def __init__(self, drop: RandomDrop, adapter: Adapter, rank: int | None) -> None:
        self._drop, self._adapter, self._rank = drop, adapter, rank
        self._draws = 0
        self._kept: tuple[RefSelection, ...] = ()
        self._call: _Call | None = None
        self._ragged: Ragged | None = None
        self._said: set[str] = set()
        self._undo = contextlib.ExitStack()
        self.removed = False

    def __repr__(self) -> str:
        return f"TrainingHandle({self._adapter.name}: {'removed' if self.removed else self._drop})"

    @property
    def drop(self) -> RandomDrop:
        """The settings of the draws."""
        return self._drop

    @property
    def kept(self) -> tuple[RefSelection, ...]:
        """What the last call in training mode kept: one selection for the batch, or one for each item with
        ``per_sample=True``; none without references."""
        return self._kept

    def state_dict(self) -> dict[str, int]:
        """Number of draws so far. A draw follows from the seed, the rank and its number alone, so that
        one process's state serves all of them."""
        return {"draws": self._draws}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Raises
        ------
        ConfigError
            If it is no such state.
        """
        draws = state.get("draws")
        if set(state) != {"draws"} or isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
            raise ConfigError(f"a training patch's state must be {{'draws': n}} with n >= 0, got {dict(state)}")
        self._draws = draws

    def remove(self) -> None:
        """Take the patch off: the transformer is bit for bit what it was. Calling it again does nothing.

        Not between a forward and its backward where ``per_sample=True`` meets gradient checkpointing:
        blocks that run again then refuse their arguments.
        """
        self.removed = True
        self._close()
        self._undo.close()

    # -- hooks -------------------------------------------------------------------------------

    def install(self, transformer: nn.Module) -> None:
        """Put the hooks on; everything that can be refused was refused before."""
        before, after = (InstanceHook(transformer, hook, PURPOSE) for hook in (self._before, self._after))
        ragged = Ragged(transformer, self._adapter) if self._drop.per_sample else None
        with contextlib.ExitStack() as undo:
            undo.callback(before.disarm)
            undo.callback(after.disarm)
            undo.callback(transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(transformer.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
            for off in self._adapter.hooks(transformer, lambda: None if self._call is None else self._call.short):
                undo.callback(off)
            if ragged is not None:
                undo.callback(ragged.remove)
                ragged.install()
            self._ragged = ragged
            self._undo = undo.pop_all()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        self._close()
        self._kept = ()
        if not module.training:
            if torch.is_grad_enabled():
                self._say("nothing is dropped while the transformer is in eval mode: call transformer.train()")
            return None
        if torch._C._current_graph_task_id() != -1:
            raise IncompatibleError(
                "a transformer patched for training must not be checkpointed as a whole, as its second forward would "
                "draw other tokens: checkpoint its blocks, transformer.enable_gradient_checkpointing()"
            )
        kwargs = self._adapter.bind(module, args, kwargs)
        layout = self._layout(kwargs)
        drops = layout is not None and bool(layout.references)
        why = self._adapter.cannot_join(kwargs) if drops and self._drop.per_sample else None
        if why is not None:
            raise IncompatibleError(f"{why}. Draw once for the batch (per_sample=False)")
        draw, self._draws = self._draws, self._draws + 1
        if layout is None or not layout.references:
            return None
        tokens, generator = kwargs[self._adapter.tokens], _generator(self._drop.seed, self._stream(), draw)
        draws = tokens.shape[0] if self._drop.per_sample else 1
        self._kept = tuple(self._drop.draw(layout.sizes, generator) for _ in range(draws))
        if all(selection.kept == layout.reference_tokens for selection in self._kept):
            return None
        here = [RefSelection(s.indices.to(tokens.device), s.sizes) for s in self._kept]
        return (), self._shorten(module, kwargs, layout, here)

    def _shorten(
        self, module: nn.Module, kwargs: Kwargs, layout: TokenLayout, selections: Sequence[RefSelection]
    ) -> Kwargs:
        """The call with the kept rows, those of one selection or each item's own."""
        rows, call = [kept_rows(layout, selection) for selection in selections], _Call()
        if len(rows) == 1:
            short = self._adapter.drop(kwargs, layout, rows[0])
            call.short = (kwargs, Plan("sparse", selections[0]), rows[0])
            call.restore = lambda output: self._adapter.restore(output, rows[0], layout.rows)
        else:
            assert self._ragged is not None
            if compiled_blocks(module):
                raise IncompatibleError(
                    "items with counts of their own need blocks that are not compiled, got compiled ones: leave them "
                    "uncompiled, or draw once for the batch (per_sample=False)"
                )
            if splits_the_sequence(module):
                raise IncompatibleError(
                    "items with counts of their own need the whole sequence in one process, got context parallelism: "
                    "draw once for the batch (per_sample=False)"
                )
            joined = call.contexts.enter_context(self._ragged.shortened(kwargs, layout, rows))
            short, call.restore = joined.kwargs, joined.restore
        self._call = call
        return short

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> Any:
        call = self._call
        self._close()
        return None if call is None or output is None else call.restore(output)

    def _close(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.contexts.close()

    def _layout(self, kwargs: Kwargs) -> TokenLayout | None:
        """Where this call's tokens are: batches differ in shape, so each call is looked at."""
        if self._adapter.cached(kwargs):
            return None
        x = kwargs.get(self._adapter.tokens)
        found = None if x is None or x.ndim != 3 else self._adapter.find(kwargs)
        if found is None:
            self._say(
                f"nothing is dropped: the layout of a call is not one that the {self._adapter.name} adapter knows"
            )
            return None
        return self._adapter.layout(kwargs, found)

    def _stream(self) -> int:
        """The number of this process, asked late: a process group may be made after the patch."""
        if self._rank is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        return self._rank or 0

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", what)


def _generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on all of `key`."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
