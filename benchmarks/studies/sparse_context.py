"""Sparse Context's comparison: three models, rules at equal budget, one reference and two, tokens gone at all steps."""

from __future__ import annotations

import sparse_ref_attn as sra

from .cases import Case, dense, sparse

__all__ = ["KEEPS", "MODELS", "RULES", "TASKS", "cases"]

MODELS = ("dense", "control", "drop")
TASKS = ("place", "pair")
RULES = ("random", "edges", "saliency", "mass")
KEEPS = (0.25, 0.10, 0.05)


def cases(steps: int) -> list[Case]:
    """Each rule at each share, on each model that there is; "mass" alone runs its first step with all tokens."""
    return [
        case
        for model in MODELS
        for task in TASKS
        for case in [
            Case("dense", 1.0, dense, task, model),
            *(Case(rule, keep, _answer(rule, keep), task, model) for keep in KEEPS for rule in RULES),
        ]
    ]


def _answer(rule: str, keep: float):
    return sparse(lambda seed: sra.SparseRef(rule, keep, seed=seed))
