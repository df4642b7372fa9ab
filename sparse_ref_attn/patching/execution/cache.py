"""References that run in full steps, and steps between that read the keys and values which those stored."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn

from ...adapters.base import Adapter, Kwargs
from ...adapters.stream import restored, stream_rows
from ...config import SparseRef
from ...cost import ModelShape
from ...errors import ConfigError, IncompatibleError, UnsupportedModelError
from ...hooks.diffusers import Route, routed_attention, splits_the_sequence, step_cache_active
from ...isolation import Isolation
from ...refresh import Never
from ...run import Plan, Refreshing, Run
from ...types import TokenLayout
from ..call import Execution, GenerationCall
from ..proving import computed_dtype
from ..reuse import CacheReuse
from ..steps import RunStep
from . import room
from .branches import Branch, Branches, Held
from .by_rank import ByRank, LayerRows, held_keys
from .by_tile import ByTile
from .held_rows import HeldRows
from .isolated import OwnPass, check_isolates, check_kept, without_references
from .joint import UNCOMPILED, JointAttention, LookedAt
from .model_cache import CacheKeeper
from .tokens import AtInput

__all__ = ["ReferenceStore", "reuse_of"]


class Form(Protocol):
    """How stored rows are held, filled by full calls, and read by cached ones."""

    measures: bool
    """Whether full calls measure attention as they store, and so run uncompiled."""

    def check(self, module: nn.Module, layout: TokenLayout, kwargs: Kwargs) -> None:
        """Raise where the references of a run that begins cannot be stored in this form."""

    def room(self, shape: ModelShape, run: Run, at: RunStep, kwargs: Kwargs) -> tuple[int, int]:
        """Reference tokens that a run holds, and the bytes that they take in the shape's own element size."""

    def empty(self, call: GenerationCall, attention: JointAttention) -> Held:
        """Room for what a full call is about to store."""

    def storing(self, call: GenerationCall, held: Any, attention: JointAttention) -> Route:
        """Attention of a full call, which stores."""

    def reading(self, call: GenerationCall, held: Any, attention: JointAttention) -> Route:
        """Attention of a cached call, which reads the rows of its plan; measured, where the call measures."""


class Computing:
    """A full call: all rows run, or those of a plan that keeps some, and the references' keys and values are stored."""

    def __init__(self, store: ReferenceStore, branch: Branch) -> None:
        self._store, self._branch, self._rows, self.alone = store, branch, AtInput(), store.attention.stays_compiled

    def before(self, call: GenerationCall) -> Kwargs:
        kwargs = call.kwargs if self._store.form.measures else self._rows.before(call)
        held, self._branch.held = self._branch.held, None  # a call that is broken off leaves nothing
        self._held = (
            held if held is not None and _fits(held, call.plan) else self._store.form.empty(call, self._store.attention)
        )
        self._store.listen(call, self._branch, self._held, kwargs)
        return kwargs

    def after(self, call: GenerationCall, output: Any) -> Any:
        self._store.computed(call, self._branch, self._held)
        self._store.over(call, self._branch)
        return self._rows.after(call, output)


class Reading:
    """A cached call: text and generation rows alone, which attend to stored keys and values too.

    Where nothing is stored yet, the references run by themselves first.
    """

    def __init__(self, store: ReferenceStore, branch: Branch) -> None:
        self._store, self._branch, self.alone = store, branch, store.attention.stays_compiled

    def before(self, call: GenerationCall) -> Kwargs:
        if self._branch.held is None:
            self._store.isolate(call, self._branch)
        assert self._branch.held is not None
        kwargs = without_references(call)
        self._store.read(call, self._branch, self._branch.held)
        return kwargs

    def after(self, call: GenerationCall, output: Any) -> Any:
        self._store.over(call, self._branch)
        assert call.shortened is not None
        return restored(call.adapter, output, call.shortened.rows, call.layout)


class ReferenceStore:
    """The stored references of one patched transformer's runs; those of a run are gone with it, or with its last step.

    Parameters
    ----------
    adapter : Adapter
    config : SparseRef
        With a `Cache`.
    isolation : Isolation, optional
        How the references run by themselves, if they do.
    """

    def __init__(self, adapter: Adapter, config: SparseRef, isolation: Isolation | None = None) -> None:
        self._adapter, self._config = adapter, config
        self.own_pass = None if isolation is None else OwnPass(adapter, config, isolation)
        self.form: Form = ByTile(adapter, config) if config.per == "tile" else ByRank(adapter, config)
        self._looked = LookedAt(adapter)
        self._branches: weakref.WeakKeyDictionary[Run, Branches] = weakref.WeakKeyDictionary()

    def install(self, module: nn.Module) -> None:
        """Keep what answers attention, until `forget`."""
        self._looked.install(module)

    def begin(self, module: nn.Module, at: RunStep, layout: TokenLayout, kwargs: Kwargs) -> Refreshing:
        """The full steps of a run that begins.

        Raises
        ------
        IncompatibleError
            Under context parallelism, beside a step cache unless the references are computed once, and where the
            call's references cannot be stored as the configuration says.
        """
        if not layout.generation[1]:
            raise IncompatibleError(
                "stored reference keys and values are read by the generation's rows, got a layout without: give the "
                f"{self._adapter.name} adapter the argument that holds these (tokens) and the references' own"
            )
        self.form.check(module, layout, kwargs)
        if splits_the_sequence(module):
            raise IncompatibleError(
                "stored reference keys and values need the whole sequence in one process, got context parallelism: "
                'call disable_parallelism(), or drop tokens: "sparse-context", or execute="tokens"'
            )
        if self.own_pass is not None:
            check_isolates(self._adapter, module, self._looked.look_at(module))
            return Refreshing(None, None if at.observed else at.total, isolated=True)
        check_kept(self._config, module)
        if step_cache_active(module) and not isinstance(self._config.refresh, Never):
            raise IncompatibleError(
                "beside a step cache, which skips blocks at steps of its own choice, references can be computed in the "
                f'first step alone ("fast", Cache(refresh=Never())), got {self._config.refresh or "the default"}; or '
                "take the step cache off"
            )
        return Refreshing(self._config.refresh, None if at.observed else at.total)

    def began(self, module: nn.Module, run: Run, at: RunStep, layout: TokenLayout, kwargs: Kwargs) -> None:
        """A run has begun: raise BudgetError where it would store more than there is memory for."""
        self._branches[run] = Branches()
        attention = self._looked.look_at(module)
        if self.own_pass is not None:
            run.record.isolated = ()
            self.own_pass.reuse.note(run.record)
            if self._config.refresh is not None:
                run.record.notes.append(f"{self._config.refresh} has no meaning: the references run by themselves")
        if attention.runs_uncompiled:
            run.record.notes.append(UNCOMPILED)
        tokens = kwargs[self._adapter.tokens]
        if room.free_bytes(tokens.device) is None:
            return
        try:
            shape = self._adapter.shape(module)
        except (ConfigError, UnsupportedModelError):  # a layer of no known stream: nothing can be said
            return
        rows, needed = self.form.room(shape, run, at, kwargs)
        room.check_room(tokens.device, rows, needed * computed_dtype(tokens).itemsize // shape.dtype_bytes)

    def forget(self) -> None:
        """Let go of everything."""
        self._branches.clear()
        self._looked.remove()

    def execution(self, run: Run, at: RunStep, plan: Plan, kwargs: Kwargs) -> tuple[Execution, Plan]:
        """How a call with `plan` runs, and as what: one whose branch has stored nothing yet computes."""
        text = None if self._adapter.text_tokens is None else kwargs.get(self._adapter.text_tokens)
        if self.own_pass is not None:
            return Reading(self, self._branches[run].shared), plan
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
        return self._looked.last

    # -- full calls ----------------------------------------------------------------------------

    def listen(self, call: GenerationCall, branch: Branch, held: Held, kwargs: Kwargs) -> None:
        """Store what the joint attention of each layer is given as the references' keys and values."""
        joint = call.layout.text + stream_rows(self._adapter, kwargs)
        held.moved.clear()
        held.idle = frozenset(map(self.attention.layers.index, self._adapter.idle(kwargs)))
        branch.onlookers.clear()
        self._look_on(call, branch.onlookers.storing(held_keys(call, held.tokens, 0)))
        attend = self.form.storing(call, held, self.attention)
        self.attention.answer(call, joint, attend, eager=call.measures or self.form.measures)

    def computed(self, call: GenerationCall, branch: Branch, held: Held) -> None:
        """A full call has come to its end: what it stored counts from now on."""
        run, step = call.run, call.step
        if not held.complete:
            own = held.layers - len(held.idle)
            raise IncompatibleError(
                f"each of the {own} attention layers must attend over all rows in a full step, for its keys and values "
                "to be stored; got a step in which some did not"
            )
        assert run.refreshing is not None
        branch.held = held
        moved = [held.moved[i] for i in sorted(held.moved)]
        drift = torch.stack([each.to(moved[0].device) for each in moved]) if moved else None
        if step.drift is None:
            step.drift = drift
        run.refreshing.computed(call.at.step, drift)

    # -- references by themselves --------------------------------------------------------------

    def isolate(self, call: GenerationCall, branch: Branch) -> None:
        """Let a run's references run by themselves and store what they give, or store that of an earlier run."""
        assert self.own_pass is not None
        layers = self.own_pass.layers(call, self.attention)
        held = self.form.empty(call, self.attention)
        assert isinstance(held, HeldRows)
        for layer, (k, v) in enumerate(layers):
            held.take(layer, LayerRows(k.detach(), v.detach()))
        branch.held = held

    # -- cached calls --------------------------------------------------------------------------

    def read(self, call: GenerationCall, branch: Branch, held: Held) -> None:
        """Let every joint attention of a call read the rows of its plan, and what looks at these too."""
        own, selection = call.layout.text + call.layout.generation[1], call.plan.selection
        kept = None if selection is None or self._config.per == "tile" else selection.indices
        if kept is not None and held.tokens is not None:
            kept = torch.searchsorted(held.tokens, kept)
        self._look_on(call, branch.onlookers.reading(kept))
        self.attention.answer(call, own, self.form.reading(call, held, self.attention), eager=call.measures)

    def _look_on(self, call: GenerationCall, attend: Route) -> None:
        """Let `attend` answer what looks at the image stream from elsewhere, until the call is over."""
        sites = self._adapter.onlookers(call.module)
        if sites:
            call.contexts.enter_context(routed_attention(sites, attend))

    def over(self, call: GenerationCall, branch: Branch) -> None:
        """A call has come to its end: after the last step nothing is kept."""
        self._account(call)
        steps = call.run.record.steps
        others = branch is self._branches[call.run].shared and call.step.calls < max(step.calls for step in steps)
        if not call.at.observed and call.at.step == call.at.total - 1 and not others:
            branch.forget()

    def _account(self, call: GenerationCall) -> None:
        """Write down the bytes that are held."""
        branches, tokens = list(self._branches[call.run]), call.layout.reference_tokens
        held = [branch.held for branch in branches if branch.held is not None]
        seen = [branch.onlookers for branch in branches]
        call.step.cache_bytes = sum(each.nbytes for each in held) + sum(each.nbytes for each in seen)
        whole = sum(each.bytes_of_all for each in held)
        call.run.record.dense_cache_bytes = whole + sum(each.bytes_of(tokens) for each in seen)


def _fits(held: Held, plan: Plan) -> bool:
    """Whether a call with `plan` computes the tokens that are held."""
    return held.tokens is None if plan.selection is None else held.tokens is plan.selection.indices


def reuse_of(keeper: CacheKeeper | None, store: ReferenceStore | None) -> CacheReuse | None:
    """What is taken from earlier runs, where references are exact: kept by the model, or stored of themselves."""
    return (
        keeper.reuse
        if keeper is not None
        else None
        if store is None or store.own_pass is None
        else store.own_pass.reuse
    )
