"""Activations that somebody keeps from one call to the next: a step cache that nobody can recognise by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["stored_activations"]

_OWN = ("_parameters", "_buffers", "_modules", "forward")


def stored_activations(model: nn.Module, rows: Collection[int]) -> str | None:
    """Where a tensor (B, rows, ...) is kept that has one of `rows`, in words; None where none is found.

    Looked at are plain attributes of the model, of its class and of its blocks, and what a `forward` that somebody
    put in place of the class's own has in its closure and its defaults: that is where step caches of the TeaCache kind
    keep the last step's input and residual.

    Examples
    --------
    >>> import torch
    >>> layer = nn.Linear(4, 4)
    >>> stored_activations(layer, {96})
    >>> layer.previous_residual = torch.zeros(1, 96, 4)
    >>> stored_activations(layer, {96})
    'previous_residual of Linear'
    """
    for name, value in vars(type(model)).items():
        if _holds(value, rows):
            return f"{name} of {type(model).__name__}"
    blocks = {id(block) for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack}
    for path, module in model.named_modules():
        if module is not model and id(module) not in blocks:
            continue
        label = path or type(model).__name__
        for name, value in vars(module).items():
            if name not in _OWN and _holds(value, rows):
                return f"{name} of {label}"
        for value in _remembered(vars(module).get("forward", type(module).forward)):
            if _holds(value, rows):
                return f"the forward of {label}"
    return None


def _remembered(function: Any) -> Iterator[Any]:
    """What a function keeps from call to call."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue
    yield from getattr(function, "__defaults__", None) or ()
    yield from (getattr(function, "__kwdefaults__", None) or {}).values()


def _holds(value: Any, rows: Collection[int], depth: int = 2) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 2 and any(size in rows for size in value.shape[1:-1])
    if depth and isinstance(value, dict):
        return any(_holds(each, rows, depth - 1) for each in value.values())
    return bool(depth) and isinstance(value, list | tuple) and any(_holds(each, rows, depth - 1) for each in value)
