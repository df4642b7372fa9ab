"""Caches that reuse what earlier steps computed: diffusers' own and cache-dit (1.5), switched on for one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["STEP_CACHES", "step_cached"]


On = Callable[[Any, int], contextlib.AbstractContextManager[None]]


def _diffusers(config: str, settings: Callable[[int], dict[str, Any]]) -> On:
    @contextlib.contextmanager
    def on(pipe: Any, steps: int) -> Iterator[None]:
        import diffusers

        model = pipe.transformer
        model.enable_cache(getattr(diffusers, config)(**settings(steps)))
        try:
            with model.cache_context("cond"):  # Kontext and FLUX.2 dev do not enter one themselves
                yield
        finally:
            model.disable_cache()

    return on


@contextlib.contextmanager
def _cache_dit(pipe: Any, steps: int) -> Iterator[None]:
    if find_spec("cache_dit") is None:
        raise RuntimeError("cache-dit needs the package cache_dit, which is not installed")
    import cache_dit  # type: ignore[import-not-found]

    settings = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2)
    model = pipe.transformer
    own, children = dict(vars(model)), dict(model.named_children())
    cache_dit.enable_cache(pipe, cache_config=settings)
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


STEP_CACHES: dict[str, On] = {
    "FirstBlockCache": _diffusers("FirstBlockCacheConfig", lambda steps: {"threshold": 0.1}),
    "TaylorSeer": _diffusers(
        "TaylorSeerCacheConfig", lambda steps: {"cache_interval": 3, "disable_cache_before_step": 2}
    ),
    "MagCache": _diffusers(
        "MagCacheConfig", lambda steps: {"num_inference_steps": steps, "mag_ratios": torch.ones(steps)}
    ),
    "cache-dit": _cache_dit,
}
"""Name -> ``on(pipe, steps)``, inside which the pipeline's calls of `steps` steps are cached.

MagCache's ratios of magnitudes are those of a calibration run of the real model; on random weights they are ones, so
its quality means nothing here and its speed is that of its settings.
"""


@contextlib.contextmanager
def step_cached(name: str | None, pipe: Any, steps: int) -> Iterator[None]:
    """Inside, the step cache of that name is on; None changes nothing.

    Raises
    ------
    RuntimeError
        If its package is not installed.
    """
    if name is None:
        yield
        return
    with STEP_CACHES[name](pipe, steps):
        yield
