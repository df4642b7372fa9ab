"""Step caches, which reuse activations of earlier steps, and context parallelism, which splits the sequence."""

from __future__ import annotations

from torch import nn

from ...errors import IncompatibleError

__all__ = ["check_no_step_cache", "reset_step_cache", "splits_the_sequence", "step_cache_active"]


def step_cache_active(module: nn.Module) -> bool:
    """Whether a cache that reuses activations of earlier steps is on (diffusers' own, or cache-dit's)."""
    return bool(getattr(module, "is_cache_enabled", False) or getattr(module, "_is_cached", False))


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


def reset_step_cache(module: nn.Module) -> None:
    """Forget what an active step cache (diffusers' or cache-dit's) has stored; its next step computes in full.

    It may run inside the pipeline's ``cache_context``, which the reset would end.
    """
    _reset_cache_dit(module)
    reset = getattr(module, "_reset_stateful_cache", None)
    if reset is None:
        return
    hooks = [h for m in module.modules() for h in getattr(getattr(m, "_diffusers_hook", None), "hooks", {}).values()]
    states = [state for hook in hooks for state in vars(hook).values() if hasattr(state, "set_context")]
    contexts = [state._context for state in states]
    reset()
    for state, context in zip(states, contexts, strict=True):
        state.set_context(context)


def _reset_cache_dit(module: nn.Module) -> None:
    """Empty the buffers of cache-dit's contexts; the steps that they have counted stay, as the run goes on."""
    contexts = getattr(getattr(module, "_context_manager", None), "_cached_context_manager", {})
    for name in getattr(module, "_context_names", ()):
        context = contexts.get(name)
        if context is None:
            continue
        context.clear_buffers()
        if context.has_calibrators():
            for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
                if calibrator is not None:
                    calibrator.reset_cache()
