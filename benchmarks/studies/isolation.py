"""References that run by themselves, with weights that were trained for it and without, against all in every step.

"isolated" was trained so from the weights of "dense", "alongside" as long without it from the same.
"""

from __future__ import annotations

import sparse_ref_attn as sra
from sparse_ref_attn.candidates import CANDIDATES

from .cases import Case, dense, sparse
from .reading import ALIGNED

__all__ = ["ISOLATED", "TASKS", "WAYS", "cases"]

ISOLATED = "run once, by themselves"
TASKS = ("place", "pair", ALIGNED)
WAYS = {
    "run in every step": None,
    "run at halves": CANDIDATES["stored-halves"],
    "run in the first step": CANDIDATES["stored-once"],
    ISOLATED: sra.SparseRef("grid", 1.0, execute=sra.Cache(isolated=True)),
}
"""What becomes of the references, and what it is patched with."""
_WHOLE = next(iter(WAYS))
MODELS = {"dense": tuple(WAYS), "alongside": (_WHOLE,), "isolated": (_WHOLE, ISOLATED)}
"""Weights, and the ways in which they run."""


def cases(steps: int) -> list[Case]:
    """Every way of every model on every task."""
    found = []
    for task in TASKS:
        for model, ways in MODELS.items():
            for way in ways:
                config = WAYS[way]
                answer = dense if config is None else sparse(lambda seed, config=config: config)  # type: ignore[misc]
                found.append(Case(way, 1.0, answer, task, model))
    return found
