"""Step caches, the other way to save work: diffusers' own and cache-dit's, switched on for some calls."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..checks import is_int, is_number
from ..errors import ConfigError, IncompatibleError, VersionError
from ..hooks.compiled import unwrap
from ..hooks.diffusers import cached_modules
from ..vocabulary import STEP_CACHES, chosen

__all__ = ["StepCache", "diffusers_cache", "step_cached"]

_FORECASTS = ("TaylorSeer", "TaylorSeer lite")
_BEFORE = 2  # steps that a forecast needs
_DEFAULTS = {"FirstBlockCache": 0.1, "cache-dit": 0.08}


@dataclass(frozen=True)
class StepCache:
    """One step cache and its one setting.

    Parameters
    ----------
    kind : {"TaylorSeer", "TaylorSeer lite", "FirstBlockCache", "cache-dit"}
        "TaylorSeer" forecasts the output of each attention of diffusers' pipelines and computes everything else,
        "TaylorSeer lite" forecasts the transformer's output. "FirstBlockCache" and "cache-dit" compute the first block
        and decide by its output whether the others run.
    every : int, optional
        Of the forecasts: steps from one that is computed to the next, at least 2; default 3.
    threshold : float, optional
        Of the others: relative change of the first block's output below which a step is reused, above 0; default 0.1
        and, of cache-dit, 0.08.

    Raises
    ------
    ConfigError
        For another kind, a number outside its range, or the setting of another kind.

    Examples
    --------
    >>> StepCache("taylorseer").name, StepCache("FirstBlockCache", threshold=0.2).name
    ('TaylorSeer every 3', 'FirstBlockCache 0.2')
    >>> [step for step in range(9) if StepCache("TaylorSeer").computes(step)]
    [0, 1, 3, 6]
    """

    kind: str
    every: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        kind = chosen("a step cache", self.kind, STEP_CACHES)
        object.__setattr__(self, "kind", kind)
        if kind in _FORECASTS:
            if self.threshold is not None:
                raise ConfigError(f"{kind} has an interval, every, and no threshold, got {self.threshold!r}")
            object.__setattr__(self, "every", 3 if self.every is None else self.every)
            if not is_int(self.every, 2):
                raise ConfigError(f"every must be an int of at least 2, got {self.every!r}")
            return
        if self.every is not None:
            raise ConfigError(f"{kind} decides at each step by its threshold, got every={self.every!r}")
        threshold = _DEFAULTS[kind] if self.threshold is None else self.threshold
        if not is_number(threshold) or not (threshold > 0 and math.isfinite(threshold)):
            raise ConfigError(f"threshold must be a finite number above 0, got {threshold!r}")
        object.__setattr__(self, "threshold", float(threshold))

    @property
    def name(self) -> str:
        """Kind and setting, in words."""
        return f"{self.kind} every {self.every}" if self.every else f"{self.kind} {self.threshold:g}"

    @property
    def code(self) -> str:
        """What a user writes to switch it on, one line."""
        if self.kind == "cache-dit":
            return f"cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig({_words(self._dit)}))"
        config = "FirstBlockCacheConfig" if self.every is None else "TaylorSeerCacheConfig"
        return f"pipe.transformer.enable_cache(diffusers.{config}({_words(self._diffusers)}))"

    def computes(self, step: int) -> bool | None:
        """Whether it computes in full the step of this number, counted from 0 or from where it last forgot all.

        None where it decides while it runs.
        """
        if self.every is None:
            return None
        return step < _BEFORE or (step - _BEFORE - 1) % self.every == 0

    @property
    def _diffusers(self) -> dict[str, Any]:
        if self.every is None:
            return {"threshold": self.threshold}
        found = {"cache_interval": self.every, "disable_cache_before_step": _BEFORE, "max_order": 1}
        return found | ({"use_lite_mode": True} if self.kind == "TaylorSeer lite" else {})

    @property
    def _dit(self) -> dict[str, Any]:
        return {
            "Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2,
            "residual_diff_threshold": self.threshold,
        }  # fmt: skip


@contextlib.contextmanager
def step_cached(pipe: Any, cache: StepCache | None) -> Iterator[None]:
    """Inside, the pipeline's call runs with the cache; afterwards the model is as it was. None changes nothing.

    One call: its state is not emptied in between.

    Raises
    ------
    VersionError
        If cache-dit is not installed.
    IncompatibleError
        If the model's class does not allow the cache.
    """
    if cache is None:
        yield
    elif cache.kind == "cache-dit":
        with _cache_dit(pipe, cache):
            yield
    else:
        import diffusers

        kind = diffusers.FirstBlockCacheConfig if cache.every is None else diffusers.TaylorSeerCacheConfig
        with diffusers_cache(pipe, kind(**cache._diffusers)):
            yield


@contextlib.contextmanager
def diffusers_cache(pipe: Any, config: Any) -> Iterator[None]:
    """Inside, one of diffusers' caches is on, by its configuration.

    Raises
    ------
    IncompatibleError
        If the model's class does not allow it.
    """
    model: Any = unwrap(pipe.transformer)
    name = type(model).__name__
    if not hasattr(model, "enable_cache"):
        raise IncompatibleError(f"a step cache needs a model of diffusers with enable_cache, which {name} has not")
    try:
        model.enable_cache(config)
    except (ValueError, KeyError) as error:  # a class that diffusers' cache has no entry for, or a cache that is on
        raise IncompatibleError(f"{type(config).__name__} must fit {name}, got: {error}") from error
    try:
        if not cached_modules(model):
            raise IncompatibleError(f"{type(config).__name__} must find modules to cache, got none in {name}")
        with model.cache_context("cond"):  # Kontext and FLUX.2 dev do not enter one themselves
            yield
    finally:
        model.disable_cache()


@contextlib.contextmanager
def _cache_dit(pipe: Any, cache: StepCache) -> Iterator[None]:
    if find_spec("cache_dit") is None:
        raise VersionError("cache-dit needs the package cache-dit: pip install 'sparse-ref-attn[step-caches]'")
    import cache_dit

    model = unwrap(pipe.transformer)
    own, children = dict(vars(model)), dict(model.named_children())
    try:
        cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**cache._dit))
    except (ValueError, KeyError, AssertionError) as error:
        raise IncompatibleError(f"cache-dit must know {type(model).__name__}, got: {error}") from error
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)
        # It leaves its own forward on the model, and the lists of blocks in another order, by which diffusers' caches
        # tell the first block from the last.
        for name in vars(model).keys() - own.keys():
            delattr(model, name)
        for name, child in children.items():
            delattr(model, name)
            model.add_module(name, child)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
