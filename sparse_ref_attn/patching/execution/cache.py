"""References that run in full steps, and steps between that read the keys and values which those stored."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter, Kwargs
from ...adapters.mask_columns import reference_columns
from ...adapters.shortened import Shortened
from ...config import SparseRef
from ...errors import ConfigError, IncompatibleError, UnsupportedModelError
from ...hooks.diffusers import Attention, chosen_backend, splits_the_sequence, step_cache_active
from ...reference_cache import RankedCache
from ...refresh import Never
from ...run import Plan, Refreshing, Run, covering
from ...types import TokenLayout
from ..call import Execution, GenerationCall
from ..proving import computed_dtype, prefers_bank
from ..steps import RunStep
from . import room
from .branches import Branch, Branches
from .held import HeldRows
from .joint import JointAttention
from .stored import to_stored
from .tokens import AtInput

__all__ = ["ReferenceStore"]


@dataclass(frozen=True)
class _Rows:
    """A layer's keys and values of every reference token, in order."""

    k: Tensor
    v: Tensor

    def get(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def store(self, k: Tensor, v: Tensor) -> None:
        """They are the call's own, and stay as they are."""


class Computing:
    """A full call: all rows run, or those of a plan that keeps some, and the references' keys and values are stored."""

    def __init__(self, store: ReferenceStore, branch: Branch) -> None:
        self._store, self._branch, self._rows, self.alone = store, branch, AtInput(), store.attention.stays_compiled

    def before(self, call: GenerationCall) -> Kwargs:
        kwargs = self._rows.before(call)
        held, self._branch.held = self._branch.held, None  # a call that is broken off leaves nothing
        self._held = held if held is not None and _fits(held, call.plan) else self._store.empty(call)
        self._store.listen(call, self._held, kwargs)
        return kwargs

    def after(self, call: GenerationCall, output: Any) -> Any:
        self._store.computed(call, self._branch, self._held)
        self._store.over(call, self._branch)
        return self._rows.after(call, output)


class Reading:
    """A cached call: text and generation rows alone, which attend to stored keys and values too."""

    def __init__(self, store: ReferenceStore, branch: Branch) -> None:
        assert branch.held is not None
        self._store, self._branch, self._held, self.alone = store, branch, branch.held, store.attention.stays_compiled

    def before(self, call: GenerationCall) -> Kwargs:
        first, length = call.layout.generation
        rows = torch.arange(first, first + length, device=call.device)
        kwargs = call.adapter.drop(call.kwargs, call.layout, rows)
        call.shortened = Shortened(call.kwargs, rows, call.layout.rows)
        self._store.read(call, self._held)
        return kwargs

    def after(self, call: GenerationCall, output: Any) -> Any:
        self._store.over(call, self._branch)
        assert call.shortened is not None
        return call.adapter.restore(output, call.shortened.rows, call.shortened.size)


class ReferenceStore:
    """The stored references of one patched transformer's runs; those of a run are gone with it, or with its last step.

    Parameters
    ----------
    adapter : Adapter
    config : SparseRef
        With a `Cache`.
    """

    def __init__(self, adapter: Adapter, config: SparseRef) -> None:
        self._adapter, self._config = adapter, config
        self._joints: list[JointAttention] = []
        self._keeps = False
        self._branches: weakref.WeakKeyDictionary[Run, Branches] = weakref.WeakKeyDictionary()

    def look_at(self, module: nn.Module) -> None:
        """Know the model's attention layers; their processors may be others when a run begins."""
        if not self._joints or not self._joints[-1].serves(module):
            self._joints.append(JointAttention(self._adapter, module))
            if self._keeps:
                self._joints[-1].keep()

    def install(self, module: nn.Module) -> None:
        """Keep what answers attention, until `forget`."""
        self._keeps = True
        self.look_at(module)

    def begin(self, module: nn.Module, at: RunStep) -> Refreshing:
        """The full steps of a run that begins.

        Raises
        ------
        IncompatibleError
            Under context parallelism, and beside a step cache unless the references are computed once.
        """
        if splits_the_sequence(module):
            raise IncompatibleError(
                "stored reference keys and values need the whole sequence in one process, got context parallelism: "
                'call disable_parallelism(), or use execute="tokens"'
            )
        if step_cache_active(module) and not isinstance(self._config.refresh, Never):
            raise IncompatibleError(
                "beside a step cache, which skips blocks at steps of its own choice, references can be computed in the "
                f"first step alone, Cache(refresh=Never()), got {self._config.refresh or 'the default'}; or take the "
                "step cache off"
            )
        return Refreshing(self._config.refresh, None if at.observed else at.total)

    def began(self, module: nn.Module, run: Run, at: RunStep, layout: TokenLayout, kwargs: Kwargs) -> None:
        """A run has begun: raise BudgetError where it would store more than there is memory for."""
        self._branches[run] = Branches()
        self.look_at(module)
        if self.attention.runs_uncompiled:
            run.record.notes.append("compiled blocks run uncompiled where keys and values are stored or read")
        tokens = kwargs[self._adapter.tokens]
        if room.free_bytes(tokens.device) is None:
            return
        try:
            shape = self._adapter.shape(module)
        except (ConfigError, UnsupportedModelError):  # a layer of no known stream: nothing can be said
            return
        kept = sum(covering(run.needed(range(at.total)))) if run.ranking.known else layout.reference_tokens
        rows = layout.reference_tokens if self._config.cache_rows == "all" else kept
        room.check_room(
            tokens.device, shape, rows, layout.text + layout.generation[1], tokens.shape[0], computed_dtype(tokens)
        )

    def forget(self) -> None:
        """Let go of everything."""
        self._branches.clear()
        while self._joints:
            self._joints.pop().remove()

    def execution(self, run: Run, at: RunStep, plan: Plan, kwargs: Kwargs) -> tuple[Execution, Plan]:
        """How a call with `plan` runs, and as what: one whose branch has stored nothing yet computes."""
        text = None if self._adapter.text_tokens is None else kwargs.get(self._adapter.text_tokens)
        branch = self._branches[run].of(at.step, text)
        if plan.reads and branch.held is not None:
            return Reading(self, branch), plan
        if plan.reads:
            plan = Plan("profile" if plan.kind == "profile" else "dense")
        return Computing(self, branch), plan

    def stays_compiled(self, run: Run) -> bool:
        """Whether a run's compiled blocks run compiled: it stores nothing, or their attention allows it."""
        return run not in self._branches or self.attention.stays_compiled

    @property
    def attention(self) -> JointAttention:
        """The layers as they were last looked at."""
        return self._joints[-1]

    # -- full calls ----------------------------------------------------------------------------

    def empty(self, call: GenerationCall) -> HeldRows:
        """Room for what a full call is about to store."""
        run, selection = call.run, call.plan.selection
        needs = run.needed(range(call.at.step, call.at.total))
        limit = run.budgeting.full if selection is None else covering(needs)
        tokens = None if selection is None else selection.indices
        held = HeldRows(run, len(self.attention.layers), tokens, limit)
        if self._config.cache_rows == "all":
            needs.append(limit)
        held.prepare(needs, call.layout.text + call.layout.generation[1])
        return held

    def listen(self, call: GenerationCall, held: HeldRows, kwargs: Kwargs) -> None:
        """Store what the joint attention of each layer is given as the references' keys and values."""
        joint, whole = call.layout.text + kwargs[self._adapter.tokens].shape[1], _reference_keys(call, held)
        held.moved.clear()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            held.take(layer, _Rows(k.detach()[:, whole], v.detach()[:, whole]))
            return own()

        self.attention.answer(call, joint, attend)

    def computed(self, call: GenerationCall, branch: Branch, held: HeldRows) -> None:
        """A full call has come to its end: what it stored counts from now on."""
        run, step = call.run, call.step
        if not held.complete:
            raise IncompatibleError(
                f"each of the {held.layers} attention layers must attend over all rows in a full step, for its keys "
                "and values to be stored; got a step in which some did not"
            )
        assert run.refreshing is not None
        branch.held = held
        moved = [held.moved[i] for i in sorted(held.moved)]
        drift = torch.stack([each.to(moved[0].device) for each in moved]) if moved else None
        if step.drift is None:
            step.drift = drift
        run.refreshing.computed(call.at.step, drift)
        self._account(call)

    # -- cached calls --------------------------------------------------------------------------

    def read(self, call: GenerationCall, held: HeldRows) -> None:
        """Let every joint attention of a call read the rows of its plan; measured, where the call measures."""
        run = call.run
        needs = run.needed([call.at.step] if call.at.observed else range(call.at.step, call.at.total))
        counts = run.counts(call.at.step) if run.ranking.known else run.budgeting.full
        if call.at.observed or self._config.cache_rows == "all":
            needs.append(held.limit)
        own = call.layout.text + call.layout.generation[1]
        held.arrange((), [counts, *needs], own, release=False)
        assert held.ranked is not None
        reads = held.reads(counts)
        if self._config.layers is not None:
            call.step.layers = tuple(reads)
        by_bank = self._by_bank(held.ranked, own, reads)
        mask, batch = self._adapter.mask(call.kwargs), call.kwargs[self._adapter.tokens].shape[0]
        columns = None if mask is None else reference_columns(mask, batch, call.layout)
        answer = to_stored(call, held.ranked, reads, by_bank, call.layout.text, columns)
        self.attention.answer(call, own, answer)
        self._account(call)

    def _by_bank(self, ranked: RankedCache, own: int, reads: Sequence[int]) -> list[bool]:
        """Whether each layer's rows are read where they lie; layers that read as many are alike."""
        known: dict[tuple[object, int], bool] = {}
        found = []
        for i, (site, count) in enumerate(zip(self.attention.layers, reads, strict=True)):
            processor = self.attention.sites[site].processor
            key = (chosen_backend(processor), count)
            if key not in known:
                known[key] = processor is not None and prefers_bank(processor, ranked, i, own, count)
            found.append(known[key])
        return found

    def over(self, call: GenerationCall, branch: Branch) -> None:
        """A call has come to its end: after the last step nothing is kept."""
        if not call.at.observed and call.at.step == call.at.total - 1:
            branch.held = None

    def _account(self, call: GenerationCall) -> None:
        """Write down the bytes that are held."""
        held = [branch.held for branch in self._branches[call.run]]
        ranked = [each.ranked for each in held if each is not None and each.ranked is not None]
        call.step.cache_bytes = sum(each.row_bytes + each.room_bytes for each in ranked)
        total = call.run.layout.reference_tokens
        call.run.record.dense_cache_bytes = sum(each.bytes_of(total) for each in ranked)


def _fits(held: HeldRows, plan: Plan) -> bool:
    """Whether a call with `plan` computes the tokens that are held."""
    return held.tokens is None if plan.selection is None else held.tokens is plan.selection.indices


def _reference_keys(call: GenerationCall, held: HeldRows) -> slice | Tensor:
    """Where the keys of the held tokens lie in a full call's joint attention, in order."""
    layout, references = call.layout, call.layout.references
    if call.shortened is not None:
        rows = layout.reference_rows(call.device)[held.tokens]
        return layout.text + torch.searchsorted(call.shortened.rows, rows)
    first, last = references[0].start, references[-1].start + references[-1].length
    if last - first == layout.reference_tokens:
        return slice(layout.text + first, layout.text + last)
    return layout.text + layout.reference_rows(call.device)
