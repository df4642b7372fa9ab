"""Ramps that keep as many tokens as a flat share does after a step 0 with all of them, as profiling has."""

from __future__ import annotations

from sparse_ref_attn.schedules import Budget, Clock, Descending, Polynomial

__all__ = ["falling", "rising"]

RANGE = 4.0  # ReCAST's 1,024 over its 256


def rising(keep: float, steps: int, *, first: int = 1, gamma: float = 2.0) -> Polynomial:
    """ReCAST eq. (4) with N_max = 4 N_min, its mean over the steps from `first` on the share `keep`."""
    low = _low(keep, Polynomial(0.25, 1.0, gamma), steps, first)
    return Polynomial(low, RANGE * low, gamma)


def falling(keep: float, steps: int, *, first: int = 1, gamma: float = 2.0) -> Descending:
    """The same run backwards, at the same mean."""
    low = _low(keep, Descending(1.0, 0.25, gamma), steps, first)
    return Descending(RANGE * low, low, gamma)


def _low(keep: float, budget: Budget, steps: int, first: int) -> float:
    """N_min of the share `keep`, from a budget whose N_min is a quarter."""
    shares = [budget.tokens_at(Clock.uniform(i, steps), 1) for i in range(first, steps)]
    low = 0.25 * keep * len(shares) / sum(shares)
    if RANGE * low > 1:
        raise ValueError(f"N_max must be at most all tokens, got {RANGE * low:.3g} of them at a mean of {keep}")
    return low
