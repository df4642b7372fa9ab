"""References that run by themselves, with weights that were trained for it and without, against all in every step.

"isolated" was trained so, "alongside" as long without, from the same weights.
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


def cases(steps: int) -> list[Case]:
    """Every way with the weights that were not trained for it; of those that were, theirs and the pipeline as it is."""
    found = []
    for task in TASKS:
        for way, config in WAYS.items():
            answer = dense if config is None else sparse(lambda seed, config=config: config)  # type: ignore[misc]
            models = ("alongside", "isolated") if way in (ISOLATED, "run in every step") else ("alongside",)
            found += [Case(way, 1.0, answer, task, model) for model in models]
    return found
