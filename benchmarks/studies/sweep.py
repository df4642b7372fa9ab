"""ReCAST's budget sweep (section 3.4): a fixed share after the first step, from a half to a sixteenth."""

from __future__ import annotations

import sparse_ref_attn as sra
from sparse_ref_attn.eval.methods import dense_first
from sparse_ref_attn.rivals import Downscale
from sparse_ref_attn.selection import Reducer

from .cases import Answer, Case, dense, sparse

__all__ = ["KEEPS", "RULES", "cases"]

KEEPS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Of 4,096 tokens the paper's 2,048, 1,024, 512 and 256."""


RULES: dict[str, Reducer | str] = {"ReCAST fixed": "mass", "random": "random", "downscaled": Downscale()}


def cases(steps: int) -> list[Case]:
    """ReCAST fixed and its rivals, each after a step with all tokens."""
    found = [Case("dense", 1.0, dense)]
    for keep in KEEPS:
        found += [Case(name, keep, _answer(select, keep)) for name, select in RULES.items()]
    return found


def _answer(select: Reducer | str, keep: float) -> Answer:
    budget = dense_first(keep)
    return sparse(lambda seed: sra.SparseRef(select, budget, seed=seed))
