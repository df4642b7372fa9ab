"""The two verbs of the library: `patch` and `patched`."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Iterator
from typing import Any, Literal, overload

from torch import nn

from ..config import SparseRef
from ..errors import ConfigError, HandleRemovedError, IncompatibleError, SparseRefError, UnsupportedModelError
from ..overlay import save_budget_strip, save_overlay
from ..presets import ReCAST
from ..record import RunRecord
from ..reference_cache import ReferenceCache
from ..report import FlopSummary, attention_table, summary
from ..selection import Ranking
from ..selection.ranking import fingerprint
from . import seams
from .base import Adapter, adapter_for, full_name
from .flops import summarise
from .handle import Patch
from .hooks import check_free
from .reuse import CacheReuse
from .serving import check_serves

__all__ = ["PatchHandle", "patch", "patch_of", "patched", "resolve"]

logger = logging.getLogger("sparse_ref_attn")

_PATCHES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Patch]] = weakref.WeakKeyDictionary()


class PatchHandle:
    """What `patch` returns: the report of the last run, and the way back.

    Examples
    --------
    See `patch`.
    """

    def __init__(self, patch: Patch, name: str) -> None:
        self._patch = patch
        self._name = name

    def __repr__(self) -> str:
        state = "removed" if self._patch.removed else self._patch.config.describe()
        return f"PatchHandle({self._name}: {state})"

    @property
    def config(self) -> SparseRef:
        """The configuration the pipeline was patched with."""
        return self._patch.config

    @property
    def record(self) -> RunRecord:
        """What happened in the last run that had references.

        Raises
        ------
        SparseRefError
            If no run with references has taken place.
        """
        record = self._patch.record
        if record is None or not record.steps:
            raise SparseRefError("a run with reference images must have taken place; got none since the patch")
        return record

    @property
    def notes(self) -> list[str]:
        """What the library decided on its own in the last run, in words."""
        return list(self.record.notes)

    def begin(self, steps: int) -> None:
        """Start a run of `steps` steps, 1 to 100000, of a bare transformer in somebody else's loop.

        It lasts until the next `begin`, a step below the last one (a new run), or a run of the
        patched pipeline itself.

        Raises
        ------
        HandleRemovedError, ConfigError
        """
        self._patch.begin(steps)

    def step(self, index: int) -> None:
        """Say that the next calls belong to step `index`, 0 first."""
        self._patch.step(index)

    def flops(self) -> FlopSummary | None:
        """Work of the last run, dense and as it ran; None when the model's shape is not known."""
        transformer = self._patch.transformer()
        if transformer is None:
            return None
        try:
            return summarise(self._patch.adapter.shape(transformer), self.record)
        except (ConfigError, UnsupportedModelError):  # such as a layer that somebody added, of no known stream
            return None

    @overload
    def summary(
        self, format: Literal["text", "markdown", "json"] = "text", *, dense_seconds: float | None = None
    ) -> str: ...

    @overload
    def summary(self, format: Literal["dict"], *, dense_seconds: float | None = None) -> dict[str, Any]: ...

    def summary(
        self,
        format: Literal["text", "markdown", "json", "dict"] = "text",
        *,
        dense_seconds: float | None = None,
    ) -> str | dict[str, Any]:
        """The last run in numbers.

        Parameters
        ----------
        format : {"text", "markdown", "dict", "json"}
        dense_seconds : float, optional
            Measured time of the same run without the patch, to print the whole run's speed-up.

        Returns
        -------
        str or dict
            Per reference: grid, tokens, kept min/mean/max, share of the mass kept. Steps, measured
            transformer time, FLOP ratio, the library's own host time, notes.
        """
        return summary(self.record, format, flops=self.flops(), dense_seconds=dense_seconds)

    def attention_table(self) -> dict[str, Any]:
        """The paper's diagnostics: mass in the top 25 %, entropy in bits, by step, reference, block and head."""
        return attention_table(self.record)

    def save_overlay(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        """A PNG of the references with the kept tokens bright, the scores, and the budget over the steps."""
        save_overlay(self.record, path, step)

    def save_budget_strip(self, path: str | os.PathLike[str]) -> None:
        """A PNG of the number of tokens at each step."""
        save_budget_strip(self.record, path)

    @property
    def ranking(self) -> Ranking:
        """The last run's ranking, to save and use again with `SavedRanking`.

        Raises
        ------
        SparseRefError
            If the last run made none.
        HandleRemovedError
        """
        if self._patch.removed:
            raise HandleRemovedError("the ranking must be read before remove(), which forgets the references")
        record, references = self.record, self._patch.session.references
        if record.scores is None or references is None:
            raise SparseRefError("the last run must have ranked its references; it ran dense or with a rival")
        return Ranking(
            scores=tuple(s.detach().cpu() for s in record.scores),
            grids=tuple(r.grid for r in record.layout.references),
            model=self._name,
            fingerprint=fingerprint(references.tokens),
        )

    def capture(self, on: bool = True) -> None:
        """Keep the reference K/V of the runs to come, each in place of the last one's, for `reference_cache`.

        They are kept whole, as the step that computes them stores them: that costs the memory which
        ranked rows save.

        Raises
        ------
        IncompatibleError
            If the model keeps no reference K/V.
        """
        self._reuse().capturing = on

    @property
    def reference_cache(self) -> ReferenceCache:
        """Keys and values of the last captured run's references, to save and use again with `reuse`.

        With ``execute="both"`` those of the tokens that the ranking kept, and the ranking.

        Raises
        ------
        SparseRefError
            If no run was captured.
        """
        captured = self._reuse().captured
        if captured is None:
            raise SparseRefError("capture() must be called before the run whose reference cache is wanted")
        return captured

    def reuse(self, cache: ReferenceCache | None) -> None:
        """Use a cache in the runs to come, instead of computing the references' keys and values; None to stop.

        The prompt, the seed and the number of images may differ. A run whose references, weights or
        call are not those that the cache is of is refused. Where the cache holds a part of the tokens,
        its ranking goes before the selector's, and the run's notes say so.

        Raises
        ------
        ConfigError
            If it is no `ReferenceCache`.
        IncompatibleError
            If the model keeps no reference K/V.
        """
        if cache is not None and not isinstance(cache, ReferenceCache):
            raise ConfigError(f"reuse takes a ReferenceCache (see ReferenceCache.load), got {type(cache).__name__}")
        self._reuse().given = cache

    def _reuse(self) -> CacheReuse:
        if self._patch.removed:
            raise HandleRemovedError("a handle must not be used after remove(); patch again")
        transformer, seam = self._patch.transformer(), self._patch.adapter.cache
        if self._patch.cache is None or seam is None or transformer is None or not seam.kept_by(transformer):
            raise IncompatibleError(
                "a reference cache needs a model that computes its references' keys and values once and keeps them "
                f"(FLUX.2 Klein-KV), got {self._name}"
            )
        return self._patch.cache.reuse

    def remove(self) -> None:
        """Take the patch off: the pipeline is bit for bit what it was. Calling it again does nothing."""
        self._patch.remove()


def patch(pipe: Any, config: SparseRef | None = None, *, adapter: Adapter | None = None) -> PatchHandle:
    """Run a pipeline on the reference tokens that matter.

    Parameters
    ----------
    pipe : diffusers pipeline or torch.nn.Module
        A pipeline with a supported transformer, or the transformer itself.
    config : SparseRef, optional
        Default ``ReCAST()``: training-free, one dense profiling step, then 1/16 to 1/4 of each
        reference.
    adapter : Adapter, optional
        For a model that is not registered; see `register_adapter`.

    Returns
    -------
    PatchHandle
        `summary()` after a run, `save_overlay(path)`, `remove()`.

    Raises
    ------
    UnsupportedModelError
        If nothing can be patched, or the adapter was not written for such a transformer.
    VersionError
        If diffusers is outside the supported range.
    IncompatibleError
        If the transformer was compiled as a whole, or its attention cannot be measured.
    ConfigError
        If the configuration does not fit the model, or the adapter is none.

    Notes
    -----
    Only this instance is changed, by torch's own forward hooks, and only while the handle lives on
    it: patching again replaces the patch. Pipelines that share the transformer (``from_pipe``)
    share the patch. Items of a batch share one selection: their scores are averaged. One host sync
    a run for the layout, one to match its references to what the VAE encoded, and one for the
    ranking; none a step.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> pipe = kontext_pipeline(size="tiny")
    >>> handle = sra.patch(pipe, sra.SparseContext(0.25, "grid"))
    >>> handle
    PatchHandle(FLUX.1 Kontext: Grid, Constant(keep=0.25, per='reference'), tokens)
    >>> handle.remove()
    """
    config = ReCAST() if config is None else config
    if not isinstance(config, SparseRef):
        raise ConfigError(f"config must be a SparseRef (ReCAST(...), SparseContext(...)), got {type(config).__name__}")
    transformer, adapter = resolve(pipe, adapter)
    check_free(transformer, "inference")
    state = Patch(transformer, None if isinstance(pipe, nn.Module) else pipe, config, adapter)
    replaced = patch_of(transformer)
    state.install()
    if replaced is not None:
        replaced.remove()
    _PATCHES[transformer] = weakref.ref(state)
    logger.info("patched %s: %s", adapter.name, config.describe())
    return PatchHandle(state, adapter.name)


def resolve(pipe: Any, adapter: Adapter | None = None) -> tuple[nn.Module, Adapter]:
    """The transformer of a pipeline, or out of its wrappers, and the adapter that serves it.

    Raises
    ------
    UnsupportedModelError, VersionError, IncompatibleError, ConfigError
        As `patch` does.
    """
    model = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"there must be a pipeline with a transformer, or a transformer, got {full_name(type(pipe))}"
        )
    seams.check_not_compiled(model)
    transformer = seams.unwrap(model)
    seams.check_not_compiled(transformer)
    if adapter is None:
        adapter = adapter_for(transformer)
    elif isinstance(adapter, Adapter):
        check_serves(adapter, transformer)
    else:
        raise ConfigError(f"adapter must be an Adapter, such as PlainAdapter(...), got {adapter!r}")
    if full_name(type(transformer)).startswith("diffusers.") or not isinstance(pipe, nn.Module):
        seams.check_diffusers()
    return transformer, adapter


def patch_of(transformer: nn.Module) -> Patch | None:
    """The patch that a transformer has, if any."""
    known = _PATCHES.get(transformer)
    living = None if known is None else known()
    return None if living is None or living.removed else living


@contextlib.contextmanager
def patched(pipe: Any, config: SparseRef | None = None, *, adapter: Adapter | None = None) -> Iterator[PatchHandle]:
    """As `patch`, taken off at the end of the block, also after an exception.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> with sra.patched(kontext_pipeline(size="tiny"), sra.SparseContext(0.5, "grid")) as handle:
    ...     handle.config.budget.keep
    0.5
    """
    handle = patch(pipe, config, adapter=adapter)
    try:
        yield handle
    finally:
        handle.remove()
