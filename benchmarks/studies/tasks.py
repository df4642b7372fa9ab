"""Where the reference is needed whole: ReCAST by task, with the guard against near-uniform attention and without."""

from __future__ import annotations

import sparse_ref_attn as sra
from sparse_ref_attn.config import UniformGuard

from .budgets import dense_first, rising
from .cases import Case, dense, sparse

__all__ = ["KEEP", "cases"]

KEEP = 0.25
TASKS = ("place", "pair", "swap", "local", "global")


def cases(steps: int) -> list[Case]:
    """Dense, random, grid, ReCAST and ReCAST with `UniformGuard` on every task."""
    first, curve = dense_first(KEEP, steps), rising(KEEP, steps)
    found = []
    for task in TASKS:
        found += [
            Case("dense", 1.0, dense, task),
            Case("random", KEEP, sparse(lambda seed: sra.SparseRef("random", first, seed=seed)), task),
            Case("grid", KEEP, sparse(lambda seed: sra.SparseRef("grid", first)), task),
            Case("ReCAST", KEEP, sparse(lambda seed: sra.SparseRef("mass", curve)), task),
            Case(
                "ReCAST, guarded", KEEP,
                sparse(lambda seed: sra.SparseRef("mass", curve, guard=UniformGuard())), task,
            ),
        ]  # fmt: skip
    return found
