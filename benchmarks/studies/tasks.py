"""Where the reference is needed whole: ReCAST by task, with the guard against near-uniform attention and without."""

from __future__ import annotations

import sparse_ref_attn as sra
from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.eval.methods import dense_first
from sparse_ref_attn.selection import AttentionMass

from .budgets import rising
from .cases import Case, dense, sparse

__all__ = ["GUARD", "KEEP", "TASKS", "cases"]

KEEP = 0.25
TASKS = ("place", "pair", "swap", "local", "global")
GUARD = UniformGuard(top_quarter=0.345)
"""For the mass of all blocks: between what this model showed for recolours and for placed subjects."""


def cases(steps: int) -> list[Case]:
    """Dense, random, grid, ReCAST, and ReCAST guarded as it comes and by the mass of all blocks, on every task."""
    first, curve = dense_first(KEEP), rising(KEEP, steps)
    everywhere = AttentionMass(blocks="all")
    rules = {
        "random": lambda seed: sra.SparseRef("random", first, seed=seed),
        "grid": lambda seed: sra.SparseRef("grid", first),
        "ReCAST": lambda seed: sra.SparseRef("mass", curve),
        "ReCAST, guarded": lambda seed: sra.SparseRef("mass", curve, guard=UniformGuard()),
        "ReCAST of all blocks": lambda seed: sra.SparseRef(everywhere, curve),
        "ReCAST of all blocks, guarded": lambda seed: sra.SparseRef(everywhere, curve, guard=GUARD),
    }
    return [
        case
        for task in TASKS
        for case in [
            Case("dense", 1.0, dense, task),
            *(Case(name, KEEP, sparse(config), task) for name, config in rules.items()),
        ]
    ]
