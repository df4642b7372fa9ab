"""Blocks that diffusers checkpoints: what stood around their forward stands around them when they run again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["around_reruns"]

_CHECKPOINT = "_gradient_checkpointing_func"


@contextlib.contextmanager
def around_reruns(
    module: nn.Module, around: Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
) -> Iterator[None]:
    """Inside, each checkpointed block of a transformer is told to run within ``around(block)`` in its backward pass.

    A block's first run is left as it is. `around` is held by the graph for as long as the block may run again.
    """
    own = vars(module).get(_CHECKPOINT)
    if own is None or not torch.is_grad_enabled():
        yield
        return

    def checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ran = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            again, ran = ran, True
            with around(block) if again else contextlib.nullcontext():
                return block(*args, **kwargs)

        return own(run, *args, **kwargs)

    setattr(module, _CHECKPOINT, checkpointed)
    try:
        yield
    finally:
        setattr(module, _CHECKPOINT, own)
