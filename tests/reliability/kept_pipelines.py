"""Pipelines and transformers that all trials share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tests.latents import CASES


@cache
def pipeline(name: str) -> Any:
    """One for all trials: whatever a trial leaves behind, the next one trips over."""
    pipe = CASES[name].build()
    CASES[name].call(pipe, steps=1)
    return pipe


@cache
def transformer(name: str, dtype: torch.dtype) -> Any:
    return CASES[name].build().transformer.to(dtype)
