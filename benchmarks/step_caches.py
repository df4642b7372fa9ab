"""Caches that reuse what earlier steps computed, by the names of rows: diffusers' own and cache-dit (1.5)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from sparse_ref_attn.eval.step_caches import StepCache, diffusers_cache, step_cached

__all__ = ["STEP_CACHES", "on"]


def _mag_cache(pipe: Any, steps: int) -> contextlib.AbstractContextManager[None]:
    from diffusers import MagCacheConfig

    return diffusers_cache(pipe, MagCacheConfig(num_inference_steps=steps, mag_ratios=torch.ones(steps)))


STEP_CACHES: dict[str, Callable[[Any, int], contextlib.AbstractContextManager[None]]] = {
    "FirstBlockCache": lambda pipe, steps: step_cached(pipe, StepCache("FirstBlockCache", threshold=0.1)),
    "TaylorSeer": lambda pipe, steps: step_cached(pipe, StepCache("TaylorSeer", every=3)),
    "TaylorSeer lite": lambda pipe, steps: step_cached(pipe, StepCache("TaylorSeer lite", every=3)),
    "MagCache": _mag_cache,
    "cache-dit": lambda pipe, steps: step_cached(pipe, StepCache("cache-dit")),
}
"""Name -> ``on(pipe, steps)``, inside which one call of `steps` steps is cached.

MagCache's ratios of magnitudes are those of a calibration run of the real model; on random weights they are ones, so
its quality means nothing here and its speed is that of its settings.
"""


def on(name: str | None, pipe: Any, steps: int) -> contextlib.AbstractContextManager[None]:
    """Inside, the step cache of that name is on; None changes nothing."""
    return contextlib.nullcontext() if name is None else STEP_CACHES[name](pipe, steps)
