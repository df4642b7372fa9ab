"""Calls of a model that keeps its references' keys and values, as its pipeline made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Step", "heard"]


@dataclass
class Step:
    """A call of the pipeline, with a copy of the whole cache where it reads one, and what it was given back."""

    given: dict[str, Any]
    mode: str
    sample: torch.Tensor


@contextmanager
def heard(model: torch.nn.Module, step: Callable[[dict[str, Any]], Step | None]) -> Iterator[list[Step]]:
    """What `step` makes of the arguments of each call inside, with hooks around those of a patch that is there."""
    found: list[Step] = []
    now: list[Step | None] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        now[:] = [step(kwargs)]
        found.extend(one for one in now if one is not None)

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if now[0] is not None:
            now[0].sample = output[0].clone()

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
