"""Step caches, which reuse activations of earlier steps, and context parallelism, which splits the sequence."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from torch import nn

from ...errors import IncompatibleError, VersionError

__all__ = ["cached_modules", "check_no_step_cache", "reset_step_cache", "splits_the_sequence", "step_cache_active"]


def step_cache_active(module: nn.Module) -> bool:
    """Whether a cache that reuses activations of earlier steps is on (diffusers' own, or cache-dit's)."""
    return bool(getattr(module, "is_cache_enabled", False) or getattr(module, "_is_cached", False))


def cached_modules(module: nn.Module) -> list[str]:
    """Names of the modules that an active cache of diffusers runs, reuses or forecasts; "" is the model itself."""
    return [name for name, part in module.named_modules() if _states(part)]


def splits_the_sequence(module: nn.Module) -> bool:
    """Whether diffusers' context parallelism gives each process a part of the sequence."""
    parallel = getattr(module, "_parallel_config", None)
    return parallel is not None and getattr(parallel, "context_parallel_config", None) is not None


def check_no_step_cache(module: nn.Module) -> None:
    """Raise IncompatibleError where a step cache is on: it keeps activations of one call."""
    if step_cache_active(module):
        raise IncompatibleError(
            "calls that run together must not go through a step cache, which keeps activations of one call; got one "
            f"on {type(module).__name__}. Disable it"
        )


def reset_step_cache(module: nn.Module, for_good: bool = False) -> None:
    """Forget what an active step cache has stored; its next step computes in full.

    It may run inside the pipeline's ``cache_context``, which the reset would end. `for_good`: whatever comes next.

    Raises
    ------
    IncompatibleError
        If cache-dit is told to reuse the coming step in any case.
    VersionError
        If it is a cache-dit without the parts that are needed.
    """
    if getattr(module, "_is_cached", False):
        _reset_cache_dit(module, for_good)
    if not getattr(module, "is_cache_enabled", False):
        return
    reset: Any = getattr(module, "_reset_stateful_cache", None)
    if reset is None:
        return
    states = [state for part in module.modules() for state in _states(part)]
    contexts = [_context(state) for state in states]
    reset()
    for state, context in zip(states, contexts, strict=True):
        state.set_context(context)


def _states(module: nn.Module) -> list[Any]:
    """What caches of diffusers keep at one module."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
    return [state for hook in hooks for state in vars(hook).values() if hasattr(state, "set_context")]


def _context(state: Any) -> Any:
    """What diffusers' pipeline last told a state of a step cache; `_current_context` before 0.41."""
    return vars(state).get("_context", vars(state).get("_current_context"))


def _reset_cache_dit(module: nn.Module, for_good: bool) -> None:
    """Forget the activations of cache-dit's contexts, one for each stack of blocks; its counts of steps go on.

    ``cache_dit.refresh_context`` would begin the counts anew, and a pipeline's contexts it passes over.
    """
    manager: Any = getattr(module, "_context_manager", None)
    names: Any = getattr(module, "_context_names", None)
    absent = importlib.import_module("cache_dit.caching.cache_contexts.cache_manager").ContextNotExistError
    if manager is None or not names:
        version = importlib.metadata.version("cache-dit")
        raise VersionError(f"cache-dit {version} must keep its contexts at the transformer; they are gone")
    for name in names:
        try:
            context = manager.get_context(name)
        except absent:  # outside of a pipeline's call, where nothing is cached either
            continue
        config, coming = context.cache_config, context.get_current_step() + 1
        mask = config.steps_computation_mask
        static = mask is not None and config.steps_computation_policy == "static"
        if static and not for_good and not any(mask[coming : coming + 1]):
            raise IncompatibleError(
                'where the number of kept tokens changes, cache-dit must compute in full, got a "static" '
                f'steps_computation_mask that reuses step {coming}: use a 1 there, or the policy "dynamic"'
            )
        context.clear_buffers()
        for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
            if calibrator is not None:
                calibrator.reset_cache()
