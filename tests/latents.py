"""The cases for tests that look at no picture: their calls return latents unless asked for pictures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tests import pipelines

__all__ = ["CASES", "FIRST", "each_case", "in_turn"]

CASES = {name: replace(case, output_type="latent") for name, case in pipelines.CASES.items()}
each_case = partial(pipelines.each_case, cases=CASES)
FIRST = ("kontext", "klein", "klein_kv", "qwen_edit", "qwen_edit_plus_2511", "longcat")
"""A pipeline of each transformer."""


def in_turn(place: int, of: int) -> list[str]:
    """The names in `FIRST`, and of the others, whose transformers these have too, every `of`-th from `place` on."""
    others = [name for name in CASES if name not in FIRST]
    return [name for name in CASES if name in FIRST or name in others[place::of]]
