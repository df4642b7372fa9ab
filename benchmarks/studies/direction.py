"""Which way a schedule should go: rising, flat and falling budgets of one mean."""

from __future__ import annotations

import sparse_ref_attn as sra
from sparse_ref_attn.eval.methods import dense_first
from sparse_ref_attn.schedules import Budget, Constant

from .budgets import falling, rising
from .cases import Answer, Case, dense, sparse
from .methods import exact_mask

__all__ = ["KEEPS", "cases"]

KEEPS = (0.15, 0.25)


def cases(steps: int) -> list[Case]:
    """The three schedules, by mass after a step with all tokens, and by the exact mask from the first step on."""
    found = [Case("dense", 1.0, dense)]
    for keep in KEEPS:
        measured: dict[str, Budget] = {
            "rising": rising(keep, steps), "flat": dense_first(keep), "falling": falling(keep, steps),
        }  # fmt: skip
        known: dict[str, Budget] = {
            "rising": rising(keep, steps, first=0), "flat": Constant(keep), "falling": falling(keep, steps, first=0),
        }  # fmt: skip
        found += [Case(f"mass, {way}", keep, _by_mass(budget)) for way, budget in measured.items()]
        found += [Case(f"exact mask, {way}", keep, exact_mask(budget)) for way, budget in known.items()]
    return found


def _by_mass(budget: Budget) -> Answer:
    return sparse(lambda seed: sra.SparseRef("mass", budget))
