"""Attention that the reference's tokens get in a dense run: every step, every block."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparse_ref_attn.functional import attention_mass
from sparse_ref_attn.toy.words import LENGTH

from .generator import TOKENS, Generator
from .questions import Question

__all__ = ["SINGLE", "masses"]

SINGLE = slice(2, None)
"""The single-stream blocks, over which ReCAST sums (eq. 3)."""


@lru_cache(maxsize=16)
def masses(generator: Generator, question: Question, seed: int) -> Tensor:
    """Mean attention of the generation tokens to each reference token, (steps, blocks, R) float32, mean of the heads.

    ReCAST eq. (2); each row sums to the share of the attention that the references get.
    """
    found: list[Tensor] = []
    sites = generator.adapter.sites(generator.pipe.transformer)
    first = LENGTH + TOKENS

    def tap(site: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        found.append(attention_mass(q[:, LENGTH:first], k, (first, k.shape[1]), reduce_heads=True)[0])

    with generator.adapter.listen(generator.pipe.transformer, tap):
        generator.picture(question, seed)
    return torch.stack(found).unflatten(0, (generator.steps, len(sites)))
