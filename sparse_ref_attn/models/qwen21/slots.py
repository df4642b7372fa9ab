"""Where Qwen-Image-2.1's references stand among the words of a prompt, and the same call without them."""

from __future__ import annotations

from collections import UserList
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.instance import InstanceHook

__all__ = ["Slots", "kept_positions", "without_references"]

Kwargs = dict[str, Any]
Shape = tuple[int, int, int]

_CELLS = 4  # latent tokens of one slot of the prompt


@dataclass(frozen=True)
class Slots:
    """The rows of a prompt's joint sequence, references and words in turn.

    Parameters
    ----------
    places : tuple of int
        First joint row of each reference.
    words : Tensor, shape (T,), int64
        Positions in the prompt that are no slots of a picture.
    text : Tensor, shape (T,), int64
        Joint rows of these.

    Examples
    --------
    >>> mask = torch.tensor([[False, True, False, True, True]])
    >>> slots = Slots.of(mask, [(1, 2, 2), (1, 2, 4)])
    >>> slots.places, slots.words.tolist(), slots.text.tolist()
    ((1,), [0, 2], [0, 5])
    """

    places: tuple[int, ...]
    words: Tensor
    text: Tensor

    @classmethod
    def of(cls, mask: Tensor, shapes: Sequence[Shape]) -> Slots:
        """Of the mask (b, prompt) of the slots of pictures, of `shapes`, the generation last (one sync)."""
        starts: list[int] = []
        words: list[int] = []
        text: list[int] = []
        row = first = 0
        sizes = [prod(shape) for shape in shapes]
        for position, picture in enumerate(mask[0].tolist()):
            if not picture:
                words.append(position)
                text.append(row)
            elif len(starts) < len(sizes) and (not starts or row - first >= sizes[len(starts) - 1]):
                starts.append(row)
                first = row
            row += _CELLS if picture else 1
        found = (torch.tensor(rows, dtype=torch.int64, device=mask.device) for rows in (words, text))
        return cls(tuple(starts[:-1]), *found)


class _Whole(UserList[Shape]):
    """The pictures of the call that a shorter one was made of; `prefix`: rows of the shorter one before the last.

    Neither it nor `_Last` is a list: offloading makes lists anew, without what they know.
    """

    prefix: int = 0


class _Last(UserList[Shape]):
    """The generation's shape alone; the call that it was taken of has `whole` and the mask `slots`."""

    whole: _Whole
    slots: Tensor


def without_references(kwargs: Kwargs, slots: Slots, stored: int) -> Kwargs:
    """The arguments of a call that reads a cache of the prompt's words and of `stored` reference tokens behind them.

    These stand as words of the prompt, which the model counts and masks, and does not run.
    """
    shapes, text, mask = kwargs["img_shapes"], kwargs["encoder_hidden_states"], kwargs["encoder_hidden_states_mask"]
    generation, words, prefix = prod(shapes[0][-1]), slots.words, len(slots.words) + stored
    last = _Last(shapes[0][-1:])
    last.whole, last.slots = _Whole(shapes[0]), kwargs["img_mask"]
    last.whole.prefix = prefix
    text = text.index_select(1, words)
    if mask is not None:
        mask = torch.cat([mask[:, words].bool(), mask.new_ones(mask.shape[0], stored, dtype=torch.bool)], 1)
    pictures = torch.zeros(1, prefix + generation // _CELLS, dtype=torch.bool, device=text.device)
    pictures[:, prefix:] = True
    return {
        **kwargs,
        "hidden_states": kwargs["hidden_states"][:, -generation:],
        "encoder_hidden_states": torch.cat([text, text.new_zeros(text.shape[0], stored, text.shape[2])], 1),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [last] * len(shapes),
        "img_mask": pictures,
    }


def kept_positions(module: nn.Module) -> list[Callable[[], None]]:
    """Hooks on the model's positions, as removers, by which the generation of a shorter call stays where it was."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        if not isinstance(args[0], _Last):
            return None
        mask = args[0].slots[0].to(args[1].device)
        return (args[0].whole, mask.repeat_interleave(torch.where(mask, _CELLS, 1))), kwargs

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        shapes = args[0]
        if not isinstance(shapes, _Whole):
            return None
        return torch.cat([output[: shapes.prefix], output[-prod(shapes[-1]) :]])

    return [
        module.register_forward_pre_hook(InstanceHook(module, before), with_kwargs=True).remove,
        module.register_forward_hook(InstanceHook(module, after)).remove,
    ]
