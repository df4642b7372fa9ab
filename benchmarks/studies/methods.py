"""ReCAST's Tables 1 and 2: methods at its mean budget, every one with all tokens in step 0 and the same share after."""

from __future__ import annotations

from collections.abc import Callable

import sparse_ref_attn as sra
from sparse_ref_attn.eval.methods import dense_first
from sparse_ref_attn.rivals import Downscale, ToMe
from sparse_ref_attn.schedules import Budget
from sparse_ref_attn.selection import AttentionMass, Cosine, Reducer, Selector, SelfAttention, SubjectMask

from .budgets import rising
from .cases import Case, dense, sparse
from .generator import Generator, Run
from .questions import Question

__all__ = ["KEEP", "cases", "exact_mask"]

KEEP = 600 / 4096
"""The share of the tokens that both tables keep on average."""

SINGLE_BLOCK = 4  # of 0-5, 2-5 single-stream; the paper does not say which of its 57 it scores by


def cases(steps: int) -> list[Case]:
    """Both tables' rows on "place", and the rules that the tables do not have."""
    first = dense_first(KEEP)
    rules: dict[str, tuple[Selector | Reducer | str, Budget]] = {
        "random": ("random", first),
        "ToMe": (ToMe(), first),
        "self-attention": (SelfAttention(), first),
        "ReCAST fixed": (AttentionMass(), first),
        "ReCAST adaptive": (AttentionMass(), rising(KEEP, steps)),
        "single block": (AttentionMass(blocks=(SINGLE_BLOCK,)), rising(KEEP, steps)),
        "cosine": (Cosine("similar"), first),
        "cosine, distinct": (Cosine("distinct"), first),
        "double blocks": (AttentionMass(blocks="double"), first),
        "all blocks": (AttentionMass(blocks="all"), first),
        "mass x values": (AttentionMass(value_norm=True), first),
        "grid": ("grid", first),
        "edges": ("edges", first),
        "saliency": ("saliency", first),
        "downscaled": (Downscale(), first),
    }
    found = [Case("dense", 1.0, dense)]
    found += [Case(name, KEEP, sparse(_config(select, budget))) for name, (select, budget) in rules.items()]
    return [*found, Case("exact mask", KEEP, exact_mask(first))]


def exact_mask(budget: Budget) -> Callable[[Generator, Question, int], Run]:
    """The subject as it was drawn, which no rule knows."""

    def answer(generator: Generator, question: Question, seed: int) -> Run:
        mask = SubjectMask(generator.model.masks(question.example))
        return generator.run(question, seed, sra.SparseRef(mask, budget))

    return answer


def _config(select: Selector | Reducer | str, budget: Budget) -> Callable[[int], sra.SparseRef]:
    return lambda seed: sra.SparseRef(select, budget, seed=seed)
