"""What a patched pipeline's owner holds: the report of the last run, and the way back."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from ..config import SparseRef
from ..errors import ConfigError, HandleRemovedError, IncompatibleError, SparseRefError, UnsupportedModelError
from ..overlay import overlay, save_budget_strip, tile_overlay
from ..overlay.canvas import save
from ..record import RunRecord
from ..reference_cache import ReferenceCache
from ..report import FlopSummary, attention_table, summary
from ..report.page import plain
from ..report.work import summarise
from ..selection import Ranking
from ..selection.ranking import fingerprint
from .execution.cache import reuse_of
from .generations import Generations
from .reuse import CacheReuse

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PatchHandle"]


class PatchHandle:
    """What `patch` returns: the report of the last run, and the way back.

    Examples
    --------
    See `patch`.
    """

    def __init__(self, generations: Generations, transformer: nn.Module, remove: Callable[[], None]) -> None:
        self._generations, self._remove = generations, remove
        self._transformer = weakref.ref(transformer)
        self._name = generations.adapter.name

    def __repr__(self) -> str:
        state = "removed" if self._generations.removed else self.config.describe()
        return f"PatchHandle({self._name}: {state})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the configuration and, after a run, its report."""
        run = self._generations.record
        return plain(repr(self)) + (self.summary("html") if run is not None and run.steps else "")

    @property
    def config(self) -> SparseRef:
        """The configuration the pipeline was patched with."""
        return self._generations.config

    @property
    def record(self) -> RunRecord:
        """What happened in the last run that had references.

        Raises
        ------
        SparseRefError
            If no run with references has taken place, or a later one went past the patch.
        """
        return self._generations.report()

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
        self._generations.begin(steps)

    def step(self, index: int) -> None:
        """Say that the next calls belong to step `index`, 0 first."""
        self._generations.step(index)

    def flops(self) -> FlopSummary | None:
        """Work of the last run, dense and as it ran; None when the model's shape or its rows are not known."""
        transformer = self._transformer()
        if transformer is None or not self.record.layout.generation[1]:
            return None
        try:
            return summarise(self._generations.adapter.shape(transformer), self.record)
        except (ConfigError, UnsupportedModelError):  # such as a layer that somebody added, of no known stream
            return None

    @overload
    def summary(
        self, format: Literal["text", "markdown", "html", "json"] = "text", *, dense_seconds: float | None = None
    ) -> str: ...

    @overload
    def summary(self, format: Literal["dict"], *, dense_seconds: float | None = None) -> dict[str, Any]: ...

    def summary(
        self,
        format: Literal["text", "markdown", "html", "json", "dict"] = "text",
        *,
        dense_seconds: float | None = None,
    ) -> str | dict[str, Any]:
        """The last run in numbers.

        Parameters
        ----------
        format : {"text", "markdown", "html", "dict", "json"}
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

    def overlay(
        self, step: int | None = None, *, layer: int | None = None, tile: int | tuple[int, int] | None = None
    ) -> Image.Image:
        """The references with the kept tokens bright, the scores, and the budget over the steps, as a PIL image.

        Parameters
        ----------
        step : int, optional
            From 0; default the last that drops any.
        layer : int, optional
            With ``Cache(per="tile")``: how often each token is read in this attention layer, from 0, in the last step
            that read a part.
        tile : int or (int, int), optional
            With `layer`: where this tile of the generation looks, by its number or its row and column, from 0.

        Raises
        ------
        ConfigError
            For a step, layer or tile that there is not.
        """
        if layer is None:
            if tile is not None:
                raise ConfigError(f"tile must come with the layer in which it reads, got {tile!r} without")
            return overlay(self.record, step)
        if step is not None:
            raise ConfigError(f"a layer is drawn of the last step that read a part, got step={step!r} with it")
        return tile_overlay(self.record, layer, tile)

    def save_overlay(
        self,
        path: str | os.PathLike[str],
        step: int | None = None,
        *,
        layer: int | None = None,
        tile: int | tuple[int, int] | None = None,
    ) -> None:
        """Write `overlay` in the format that the name ends in (.png, .jpg, .webp, .tiff)."""
        save(self.overlay(step, layer=layer, tile=tile), path)

    def save_budget_strip(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the number of tokens at each step."""
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
        if self._generations.removed:
            raise HandleRemovedError("the ranking must be read before remove(), which forgets the references")
        record, run = self.record, self._generations.run
        if record.scores is None or run is None:
            raise SparseRefError("the last run must have ranked its references; it ran dense or with a rival")
        return Ranking(
            scores=tuple(s.detach().cpu() for s in record.scores),
            grids=tuple(r.grid for r in record.layout.references),
            model=self._name,
            fingerprint=fingerprint(run.references.tokens),
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
        if self._generations.removed:
            raise HandleRemovedError("a handle must not be used after remove(); patch again")
        transformer, cache = self._transformer(), self._generations.cache
        if cache is not None and cache.hooks.whole:
            raise IncompatibleError(
                f"{self._name}: {cache.hooks.whole}, and keys and values of an earlier run cannot stand in for them"
            )
        kept = cache is not None and transformer is not None and cache.hooks.kept_by(transformer)
        reuse = reuse_of(cache if kept else None, self._generations.store)
        if reuse is None:
            raise IncompatibleError(
                "a reference cache needs a model that computes its references' keys and values once and keeps them "
                f"(FLUX.2 Klein-KV), or references that run by themselves (Cache(isolated=True)), got {self._name}"
            )
        return reuse

    def remove(self) -> None:
        """Take the patch off: the pipeline is bit for bit what it was. Calling it again does nothing."""
        self._generations.leave()
        self._remove()
