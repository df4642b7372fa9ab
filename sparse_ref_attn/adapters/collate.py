"""Calls of a transformer taken apart into their items, and put together side by side.

An item is a call with a batch of one. Items are padded to one length, or laid end to end.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import IncompatibleError, LayoutError

__all__ = ["flat_ids", "pad", "same", "sample_of", "split_items", "stack", "with_sample"]

Kwargs = dict[str, Any]


def split_items(kwargs: Kwargs, tokens: str, names: Collection[str]) -> list[Kwargs]:
    """One call for each item of a batch; `names` are the arguments that hold an entry an item."""
    count = kwargs[tokens].shape[0]

    def part(name: str, value: Any, i: int) -> Any:
        if name not in names or value is None:
            return value
        if isinstance(value, Tensor):
            value = value[None] if value.ndim == 0 else value
        if len(value) not in (1, count):
            raise LayoutError(f"{name} must hold one entry for each of the {count} items, got {len(value)}")
        return value if len(value) == 1 else value[i : i + 1]

    return [{name: part(name, value, i) for name, value in kwargs.items()} for i in range(count)]


def same(items: Sequence[Kwargs], differing: Collection[str]) -> Kwargs:
    """The arguments all items share, without those in `differing`.

    Raises
    ------
    IncompatibleError
        If the items disagree in any other argument.
    """
    first = items[0]
    for name in sorted({name for item in items for name in item} - set(differing)):
        values = [item.get(name) for item in items]
        if any(not _equal(value, values[0]) for value in values[1:]):
            shown = ", ".join(dict.fromkeys(_show(value) for value in values))
            raise IncompatibleError(f"items that run as one call must have the same {name}, got {shown}")
    return {name: value for name, value in first.items() if name not in differing}


def _equal(a: Any, b: Any) -> bool:
    """Tensors are equal to themselves alone, also inside of dictionaries and lists."""
    if a is b:
        return True
    if isinstance(a, Tensor) or type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _show(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def stack(items: Sequence[Kwargs], name: str) -> Tensor | None:
    """An argument of all items one after another along the batch (B, ...); None where no item has it."""
    values: list[Any] = [item.get(name) for item in items]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise IncompatibleError(f"items that run as one call must all have {name} or none of them, got both")
    return torch.cat(values)


def pad(items: Sequence[Kwargs], name: str) -> Tensor:
    """Rows (1, rows, D) of all items side by side, (B, most rows, D); what is missing is zero."""
    return pad_sequence([item[name][0] for item in items], batch_first=True)


def flat_ids(ids: Tensor) -> Tensor:
    """Position ids (rows, axes); of a batch the first, as the models read them."""
    return ids[0] if ids.ndim == 3 else ids


def sample_of(output: Any) -> Tensor:
    """The tensor in what a transformer returned.

    Raises
    ------
    LayoutError
        If it is neither a tensor, nor a tuple that starts with one, nor has it as ``sample``.
    """
    sample = output[0] if isinstance(output, tuple) else output.sample if hasattr(output, "sample") else output
    if not isinstance(sample, Tensor):
        raise LayoutError(
            f"a transformer's output must be a tensor, a tuple that starts with one, or have it as sample, "
            f"got {type(output).__name__}"
        )
    return sample


def with_sample(output: Any, sample: Tensor) -> Any:
    """What a transformer returned, with another tensor."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    if hasattr(output, "sample"):
        output = copy.copy(output)
        output.sample = sample
        return output
    return sample
