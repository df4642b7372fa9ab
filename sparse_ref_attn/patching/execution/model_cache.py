"""Reference K/V that a model itself keeps between steps: who follows its caches."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter, Kwargs
from ...adapters.stream import reference_tokens
from ...config import SparseRef
from ...errors import IncompatibleError, LayoutError
from ...execution import Cache
from ...hooks.diffusers import splits_the_sequence
from ...run import Plan, Run
from ..call import Execution, GenerationCall
from ..reuse import CacheReuse
from ..steps import RunStep
from .tokens import AtInput

__all__ = ["CacheKeeper"]


class Held(Protocol):
    """What is held of one cache."""

    tokens: Tensor | None

    def are_of(self, run: Run) -> bool:
        """Whether its rows are a run's."""


H = TypeVar("H", bound=Held)


class Storing:
    """A call that runs the reference rows and fills a cache."""

    def __init__(self, keeper: CacheKeeper[Any]) -> None:
        self._keeper, self._rows, self.alone = keeper, AtInput(), keeper.alone

    def before(self, call: GenerationCall) -> Kwargs:
        self._held = self._keeper.fill(call)
        return call.kwargs if self._keeper.measures else self._rows.before(call)

    def after(self, call: GenerationCall, output: Any) -> Any:
        self._keeper.take_charge(call, self._held, output)
        return self._rows.after(call, output)


class Reading:
    """A call on text and generation rows that attends to stored K/V; `resumes`: to those of an earlier run."""

    def __init__(self, keeper: CacheKeeper[Any], resumes: bool) -> None:
        self._keeper, self._resumes, self.alone = keeper, resumes, keeper.alone
        self._cache: Any = None

    def before(self, call: GenerationCall) -> Kwargs:
        kwargs = call.kwargs
        if self._resumes:
            kwargs, self._cache = self._keeper.resume(call)
        return self._keeper.read(call, kwargs)

    def after(self, call: GenerationCall, output: Any) -> Any:
        return self._keeper.hooks.returned(output, self._cache) if self._resumes else output


class CacheKeeper(ABC, Generic[H]):
    """Follows the caches of one patched transformer; a cache is forgotten with the model's own object.

    Parameters
    ----------
    adapter : Adapter
        Of a family with a `CacheHooks`.
    config : SparseRef
    """

    measures = False
    """Whether calls that store, and those of profiling steps, measure attention themselves, and so run uncompiled."""

    def __init__(self, adapter: Adapter, config: SparseRef) -> None:
        assert adapter.cache is not None
        self._adapter, self._config, self.hooks = adapter, config, adapter.cache
        self._held: weakref.WeakKeyDictionary[Any, H] = weakref.WeakKeyDictionary()
        self._sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._stored: tuple[Run, Plan] | None = None
        self.reuse = CacheReuse(adapter, config, adapter.cache.conditions)

    @property
    def alone(self) -> bool:
        """Whether the model's modules are changed in a call, so that no other may run."""
        return False

    def plan(self, run: Run, at: RunStep, plan: Plan, reads: bool) -> tuple[Plan, int]:
        """What a call of a step with `plan` does that reads a cache, or stores; and the reference tokens in it."""
        if not reads and plan.kind == "sparse":
            first = isinstance(self._config.execute, Cache) and self._config.execute.first == "all"
            whole = first or bool(self.hooks.whole)
            plan = Plan("dense") if whole else run.largest(range(at.step, at.total))
            self._stored = (run, plan)
        if reads and plan.reduced is not None:  # the rows of the step that stored; changed tokens have no fewer
            stored = self._stored[1] if self._stored is not None and self._stored[0] is run else Plan("dense")
            return plan, stored.kept(run.layout)
        return plan, plan.kept(run.layout)

    def install(self, module: nn.Module) -> None:
        """Keep what answers attention, until `forget`."""

    def begin(self, module: nn.Module, run: Run, kwargs: Kwargs) -> None:
        """A run has begun, with a call that stores: raise where its references cannot be read as configured."""
        self.reuse.note(run.record)

    def forget(self) -> None:
        """Let go of everything."""
        self._stored = None

    def execution(self, reads: bool) -> Execution:
        """Of a call that reads a cache, or of one that stores; where an earlier run's cache is given, it is read."""
        return Reading(self, resumes=not reads) if reads or self.reuse.given is not None else Storing(self)

    # -- the call that fills a cache -----------------------------------------------------------

    def fill(self, call: GenerationCall) -> H:
        """Before a call that stores.

        Raises
        ------
        IncompatibleError
            Under context parallelism.
        """
        if splits_the_sequence(call.module):
            raise IncompatibleError(
                "a model that keeps its references' keys and values cannot run under context parallelism: diffusers "
                "splits their rows over the ranks, and each rank's attention sees its own alone. Call "
                "disable_parallelism(), or use a pipeline without the cache"
            )
        run = call.run
        return self._empty(call, self.reuse.wants(call.module, call.kwargs, run.layout, run.references.tokens))

    def resume(self, call: GenerationCall) -> tuple[Kwargs, Any]:
        """The arguments of a call that stores as those of one that reads the K/V of an earlier run, and their cache."""
        assert self.reuse.given is not None
        cache = self.hooks.make(call.module, self.reuse.layers(call.kwargs[self._adapter.tokens].shape[0]))
        self._held[cache] = self._resumed(call, cache)
        return self.hooks.resumed(call.kwargs, call.run.layout, cache), cache

    def take_charge(self, call: GenerationCall, held: H, output: Any) -> None:
        """After a call that stores: follow its cache."""
        cache = self.hooks.of_output(call.kwargs, call.layout, output)
        if cache is not None:
            self._held[cache] = held
            self._filled(held, cache)
            self._account(call, held, cache)
            layers = [layer.get() for layer in self.hooks.layers(cache)]
            self.reuse.keep(layers, held.tokens, call.run.record, call.run.references.tokens)

    @abstractmethod
    def _empty(self, call: GenerationCall, whole: bool) -> H:
        """What a call that stores is to fill; listens where it must. `whole`: the model's own cache is to stay."""

    @abstractmethod
    def _resumed(self, call: GenerationCall, cache: Any) -> H:
        """What is held of a cache with the K/V of an earlier run."""

    @abstractmethod
    def _found(self, call: GenerationCall, cache: Any) -> H:
        """What is held of a cache with the K/V of every token that the model filled before the steps."""

    def _filled(self, held: H, cache: Any) -> None:
        """A call has filled the model's cache."""

    # -- the calls that read it ----------------------------------------------------------------

    def read(self, call: GenerationCall, kwargs: Kwargs) -> Kwargs:
        """Arguments of a cached call that attends to the tokens of its plan alone; listens where it measures.

        Raises
        ------
        LayoutError
            If the call brings a cache that this run did not fill.
        BudgetError
            If the plan keeps tokens that are not held.
        """
        cache = self.hooks.of_call(kwargs)
        held = self._held.get(cache)
        if self.hooks.before_steps and (held is None or not held.are_of(call.run)):
            held = self._adopted(call, kwargs, cache)
        if held is None or not held.are_of(call.run):
            raise LayoutError(
                "a cached call must bring the reference keys and values that this run's first step stored, got others: "
                "the tokens kept were chosen for this run's references"
            )
        return self._read(call, kwargs, held, cache)

    def _adopted(self, call: GenerationCall, kwargs: Kwargs, cache: Any) -> H | None:
        """What is held of a cache that was filled before the steps; None where it is of other references (syncs)."""
        run, rows = call.run, self.hooks.layers(cache)[0].get()[0].shape[1]
        if not torch.equal(reference_tokens(self._adapter, kwargs, run.layout), run.references.tokens):
            return None
        if rows != run.layout.reference_tokens:
            raise LayoutError(
                f"a run must begin on the keys and values of all {run.layout.reference_tokens} reference tokens, got "
                f"{rows}: an earlier run gave the others up. Fill the cache anew"
            )
        run.record.passes = self.hooks.passes(cache)
        self._held[cache] = self._found(call, cache)
        return self._held[cache]

    @abstractmethod
    def _read(self, call: GenerationCall, kwargs: Kwargs, held: H, cache: Any) -> Kwargs:
        """As `read`, of what is held of its cache."""

    @abstractmethod
    def _bytes(self, held: H, cache: Any) -> int:
        """Bytes that are held of one cache, the model's own included."""

    def _account(self, call: GenerationCall, held: H, cache: Any) -> None:
        """Write down the bytes that are held."""
        own = [layer.get()[0] for layer in self.hooks.layers(cache)]
        row = own[0][:, :1].numel() * own[0].element_size()
        call.run.record.dense_cache_bytes = 2 * len(own) * row * call.run.layout.reference_tokens
        self._sizes[cache] = self._bytes(held, cache)
        mine = [size for each, size in self._sizes.items() if self._held[each].are_of(call.run)]
        call.step.cache_bytes = sum(mine)
