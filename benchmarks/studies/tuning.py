"""Fine-tuning with tokens dropped, by several recipes: what it loses with every token and gains with few.

"drop" is the recipe that Sparse Context describes and "control" the same steps without dropping; the others change
one thing of "drop" each: half of the draws have every token ("drop-full"), the target is what the model predicted
from every token before ("drop-distill"), the rates are a third ("drop-slow"), a LoRA is trained ("drop-lora").
"drop-both" has half of its draws with every token, and half of its target from that prediction.
"""

from __future__ import annotations

import sparse_ref_attn as sra

from .cases import Answer, Case, dense, sparse
from .reading import ALIGNED

__all__ = ["MODELS", "TASKS", "WAYS", "cases"]

MODELS = ("dense", "control", "drop", "drop-full", "drop-distill", "drop-slow", "drop-lora", "drop-both")
TASKS = ("place", "pair", ALIGNED)
KEEP = 0.25


def _kept(rule: str) -> Answer:
    return sparse(lambda seed: sra.SparseRef(rule, KEEP, seed=seed))


WAYS: dict[str, tuple[float, Answer]] = {
    "every token": (1.0, dense),
    "random 25%": (KEEP, _kept("random")),
    "mass 25%": (KEEP, _kept("mass")),
}
"""The share that is kept, and how; "mass" alone runs its first step with every token."""


def cases(steps: int) -> list[Case]:
    """Every way of every model on every task."""
    return [
        Case(way, keep, answer, task, model)
        for task in TASKS
        for model in MODELS
        for way, (keep, answer) in WAYS.items()
    ]
