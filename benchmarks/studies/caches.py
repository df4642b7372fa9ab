"""Beside a step cache: ReCAST's ToCa row, with diffusers' caches, whose executed work is counted.

The pipeline of FLUX.1 Kontext never enters a cache context, so that it is entered around the whole call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import sparse_ref_attn as sra
from sparse_ref_attn.cost import step_flops
from sparse_ref_attn.cost.tokens import StepTokens
from sparse_ref_attn.eval.methods import dense_first
from sparse_ref_attn.toy.words import LENGTH

from .budgets import rising
from .cases import Answer, Case, dense
from .generator import TOKENS, Generator, Run
from .questions import Question

__all__ = ["CACHES", "KEEP", "OURS", "cases"]

KEEP = 0.15
CACHES: dict[str, Callable[[], Any]] = {
    "FirstBlockCache 0.2": lambda: FirstBlockCacheConfig(threshold=0.2),
    "FirstBlockCache 0.4": lambda: FirstBlockCacheConfig(threshold=0.4),
    "TaylorSeer every 2": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1),
    "TaylorSeer every 3": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=1),
}
OURS: dict[str, Callable[[int], sra.SparseRef]] = {
    "ReCAST fixed": lambda steps: sra.SparseRef("mass", dense_first(KEEP)),
    "ReCAST in 2 pieces": lambda steps: sra.SparseRef("mass", rising(KEEP, steps).piecewise(2)),
}
"""A cache needs a count that seldom changes, so that ReCAST's curve is cut into two constant pieces."""


def cases(steps: int) -> list[Case]:
    """Dense, each cache, ours, and ours under each cache; a method under a cache is named "ours + cache"."""
    found = [Case("dense", 1.0, dense)]
    found += [Case(name, KEEP, _counted(None, make(steps))) for name, make in OURS.items()]
    for cache, config in CACHES.items():
        found.append(Case(cache, 1.0, _counted(config, None)))
        found += [Case(f"{name} + {cache}", KEEP, _counted(config, make(steps))) for name, make in OURS.items()]
    return found


def _counted(cache: Callable[[], Any] | None, ours: sra.SparseRef | None) -> Answer:
    """Runs whose operations inside the transformer are counted as they are executed, the measuring of attention too."""

    def answer(generator: Generator, question: Question, seed: int) -> Run:
        pipe, references = generator.pipe, TOKENS * len(question.example.references)
        every = step_flops(generator.shape, StepTokens(LENGTH, TOKENS, references)).total * generator.steps
        with sra.patched(pipe, ours) if ours is not None else nullcontext() as handle:
            if cache is not None:
                pipe.transformer.enable_cache(cache())
            try:
                with pipe.transformer.cache_context("run") if cache is not None else nullcontext():
                    picture, work = _executed(generator, lambda: generator.picture(question, seed))
            finally:
                if cache is not None:
                    pipe.transformer.disable_cache()
        return Run(picture, float(references) if handle is None else handle.record.mean_tokens, every / work)

    return answer


def _executed(generator: Generator, call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and the FLOPs of the matrix products and attention inside its transformer."""
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_SDPA: _cpu_sdpa})
    root = type(generator.pipe.transformer).__name__
    with counter:
        result = call()
    return result, sum(counter.get_flop_counts()[root].values())


_CPU_SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _cpu_sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)
