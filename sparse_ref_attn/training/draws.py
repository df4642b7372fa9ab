"""The planner of a training patch: each call in training mode drops tokens drawn at random."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import torch
from torch import nn

from ..adapters.base import Adapter, Kwargs
from ..errors import IncompatibleError
from ..hooks.compiled import compiled_blocks
from ..hooks.diffusers import splits_the_sequence
from ..hooks.static_blocks import Rows, StaticBlocks
from ..isolation import Isolation
from ..packing import kept_rows
from ..patching.attendance import PARTS
from ..patching.call import Call
from ..patching.execution.ragged import PerItem, Ragged
from ..patching.execution.tokens import AtInput
from ..patching.layouts import Layouts
from ..run import Plan
from ..types import RefSelection, TokenLayout
from .isolating import Isolator
from .random_drop import RandomDrop

__all__ = ["Draws"]

logger = logging.getLogger("sparse_ref_attn")

_PATIENCE = 8  # calls without references that a training may begin with, unsaid: some batches have none


class Draws:
    """Draws one selection a call, or one for each item of its batch.

    A draw follows from the seed, the rank and its number alone.

    Parameters
    ----------
    transformer : nn.Module
    drop : RandomDrop
    adapter : Adapter
    rank : int, optional
        Default the process's rank in ``torch.distributed``.
    isolation : Isolation, optional
        References run by themselves, and what is drawn is what is read of them, in every call but those of other
        layouts; where nothing is drawn, everything.

    Raises
    ------
    IncompatibleError
        If items are to have draws of their own and attention cannot tell them apart, or the model's references cannot
        run by themselves.
    """

    def __init__(
        self,
        transformer: nn.Module,
        drop: RandomDrop,
        adapter: Adapter,
        rank: int | None,
        isolation: Isolation | None = None,
    ) -> None:
        self.drop, self.adapter, self._rank = drop, adapter, rank
        self.drawn = self._without = 0
        self.used = False
        """Whether a call came with references to draw from."""
        self.paused = False
        """Whether calls go as if there were no patch."""
        self.kept: tuple[RefSelection, ...] = ()
        self._ragged = Ragged(transformer, adapter) if drop.per_sample else None
        self._isolator = None if isolation is None else Isolator(transformer, adapter, isolation)
        self._layouts = Layouts(adapter, self._unknown)
        self._said: set[str] = set()

    def install(self, transformer: nn.Module, undo: contextlib.ExitStack) -> None:
        """The hooks that let items differ in length."""
        if self._ragged is not None:
            undo.callback(self._ragged.remove)
            self._ragged.install()

    def forget(self) -> None:
        """The patch is off: say so if it never had anything to draw from."""
        if not self.used and self._isolator is None:
            self._say(
                "the training patch never dropped a token: no call of the transformer in train mode had reference "
                "tokens that its adapter knows"
            )

    def went_past(self, module: nn.Module) -> None:
        """The transformer's parts ran without its own call."""
        if module.training and torch.is_grad_enabled() and not self.paused:
            self.kept = ()
            self._say(PARTS)

    def call(self, module: nn.Module, kwargs: Kwargs) -> Call | None:
        """A training call with its draw; None where nothing is dropped."""
        if self.paused:
            return None
        self.kept = ()
        if not (module.training and torch.is_grad_enabled()) and self._isolator is not None:
            return self._isolated(module, kwargs, self._layout(kwargs), None)
        if not module.training:
            if torch.is_grad_enabled():
                self._say("nothing is dropped while the transformer is in eval mode: call transformer.train()")
            return None
        if not torch.is_grad_enabled():
            self._say(
                "nothing is dropped in calls without gradients, the transformer being in train mode: pictures that are "
                "sampled for validation are the whole model's. Call transformer.eval() for them"
            )
            return None
        if torch._C._current_graph_task_id() != -1:
            raise IncompatibleError(
                "a transformer patched for training must not be checkpointed as a whole, as its second forward would "
                "draw other tokens: checkpoint its blocks, transformer.enable_gradient_checkpointing()"
            )
        layout = self._layout(kwargs)
        drops = layout is not None and bool(layout.references)
        why = self.adapter.cannot_join(kwargs) if drops and self.drop.per_sample else None
        if why is not None:
            raise IncompatibleError(f"{why}. Draw once for the batch (per_sample=False)")
        draw, self.drawn = self.drawn, self.drawn + 1
        self.used = self.used or drops
        if layout is None or not layout.references:
            self._without += layout is not None
            if self._without == _PATIENCE and not self.used:
                self._say(f"nothing was dropped: the first {_PATIENCE} training calls had no reference tokens")
            return None
        tokens, generator = kwargs[self.adapter.tokens], _generator(self.drop.seed, self._stream(), draw)
        draws = tokens.shape[0] if self.drop.per_sample else 1
        self.kept = tuple(self.drop.draw(layout.sizes, generator) for _ in range(draws))
        if self._isolator is not None:
            return self._isolated(module, kwargs, layout, self.kept[0])
        around = None if self.drop.per_sample else self._compiled(module, kwargs, layout)
        if all(selection.kept == layout.reference_tokens for selection in self.kept):
            return None
        here = [RefSelection(s.indices.to(tokens.device), s.sizes) for s in self.kept]
        if len(here) == 1:
            call = Call(self.adapter, module, kwargs, layout, Plan("sparse", here[0]), AtInput())
            if around is not None:
                call.contexts.enter_context(around)
            return call
        return Call(self.adapter, module, kwargs, layout, Plan("sparse"), self._per_item(module, layout, here))

    def _layout(self, kwargs: Kwargs) -> TokenLayout | None:
        told = self.adapter.cache is not None and self.adapter.cache.before_steps
        return self._layouts.of(kwargs) if told or not self.adapter.cached(kwargs) else None

    def _isolated(
        self, module: nn.Module, kwargs: Kwargs, layout: TokenLayout | None, kept: RefSelection | None
    ) -> Call | None:
        """A call whose references run by themselves, and of which `kept` are read, or all."""
        assert self._isolator is not None
        if layout is None or not layout.references:
            return None
        if compiled_blocks(module):
            self._say("compiled blocks run uncompiled while references run by themselves")
        every = kept is None or kept.kept == layout.reference_tokens
        tokens = None if kept is None or every else kept.indices.to(kwargs[self.adapter.tokens].device)
        return Call(self.adapter, module, kwargs, layout, Plan("sparse"), self._isolator.execution(module, tokens))

    def _compiled(
        self, module: nn.Module, kwargs: Kwargs, layout: TokenLayout
    ) -> contextlib.AbstractContextManager[None] | None:
        """For a call on blocks that are compiled for one length each; raises where the draws have too many."""
        if not compiled_blocks(module):
            return None
        static = StaticBlocks(module, [block.module for block in self.adapter.blocks(module)])
        if not static:
            return None
        tokens, whole = kwargs[self.adapter.tokens], layout.reference_tokens
        shape = (True, tokens.shape[0], tokens.dtype, layout.generation[1], layout.text)
        steps = [Rows(count) for count in self.drop.counts(layout.sizes)]
        static.check(steps, whole, shape, self.drop, "one keep ratio")
        return static.running(Rows(self.kept[0].kept), shape)

    def _per_item(self, module: nn.Module, layout: TokenLayout, selections: list[RefSelection]) -> PerItem:
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
        return PerItem(self._ragged, [kept_rows(layout, selection) for selection in selections])

    def _stream(self) -> int:
        """The number of this process, asked late: a process group may be made after the patch."""
        if self._rank is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        return self._rank or 0

    def _unknown(self, what: str) -> None:
        done = "isolated" if self._isolator is not None else "dropped"
        self._say(f"nothing is {done}: the layout of a call is not one that the {self.adapter.name} adapter knows")

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", what)


def _generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on all of `key`."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
