"""Masks of joint attention as callers make them: padding, regions, biases, in each shape that diffusers reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.adapters.witnesses import witnessed
from tests.latents import CASES
from tests.pictures import generator
from tests.pipelines import Case

ARGUMENT = {"kontext": "joint_attention_kwargs"}
"""The pipelines' argument that holds the mask, where it is not ``attention_kwargs``."""


def handed(case: Case, mask: Any) -> dict[str, Any]:
    """The pipeline's argument with a mask in it."""
    return {ARGUMENT.get(case.name.partition("_inpaint")[0], "attention_kwargs"): {"attention_mask": mask}}


def text_of(case: Case) -> int:
    """Prompt rows of a case's calls."""
    return 32 if case.name.startswith("kontext") else 48


@cache
def rows_of(case_name: str, batch: int = 1) -> int:
    """Joint rows of a call, as the pipeline makes it."""
    case = CASES[case_name]
    pipe = case.build()
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, steps=1, batch=batch)
    return calls[0].text + calls[0].rows


def padding(batch: int, text: int, rows: int) -> Tensor:
    """(B, S) bool: item i has text/2 + i padded prompt rows, and every fifth reference-side row is hidden."""
    keys = torch.ones(batch, rows, dtype=torch.bool)
    keys[:, text + 64 :: 5] = False
    for i in range(batch):
        keys[i, text - text // 2 - i : text] = False
    return keys


def regions(rows: int, seed: int = 0) -> Tensor:
    """(S, S) bool: each row sees half of the others, and itself."""
    return (torch.rand(rows, rows, generator=generator(seed)) < 0.5) | torch.eye(rows, dtype=torch.bool)


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(len(shape)))


Maker = Callable[[int, int, int, int], Tensor]

KEYS: dict[str, Maker] = {
    "(B, S)": lambda batch, heads, text, rows: padding(batch, text, rows),
    "(1, S)": lambda batch, heads, text, rows: padding(1, text, rows),
    "(B, 1, 1, S)": lambda batch, heads, text, rows: padding(batch, text, rows)[:, None, None],
    "(1, 1, 1, S)": lambda batch, heads, text, rows: padding(1, text, rows)[:, None, None],
    "(1, 1, S)": lambda batch, heads, text, rows: padding(1, text, rows)[:, None],
    "(B, S) of 0 and -inf": lambda batch, heads, text, rows: added(padding(batch, text, rows)),
    "(B, 1, 1, S) of 0 and the lowest": lambda batch, heads, text, rows: added(padding(batch, text, rows))[
        :, None, None
    ].clamp(min=torch.finfo(torch.float32).min),
    "(B, H, S, S) expanded": lambda batch, heads, text, rows: padding(batch, text, rows)[:, None, None].expand(
        -1, heads, rows, -1
    ),
}
"""From (batch, heads, text rows, all rows) to a mask that says which keys may be attended to, and no more."""

BETWEEN: dict[str, Maker] = {
    "(S, S)": lambda batch, heads, text, rows: regions(rows),
    "(1, S, S)": lambda batch, heads, text, rows: regions(rows)[None],
    "(H, S, S) added": lambda batch, heads, text, rows: noise(heads, rows, rows),
    "(1, 1, S, S) of 0 and -inf": lambda batch, heads, text, rows: added(regions(rows))[None, None],
    "(B, 1, S, S)": lambda batch, heads, text, rows: torch.stack([regions(rows, i) for i in range(batch)])[:, None],
    "(B, H, S, S) added": lambda batch, heads, text, rows: noise(batch, heads, rows, rows),
    "(B, H, 1, S)": lambda batch, heads, text, rows: noise(batch, heads, 1, rows) > -1,
    "(B, 1, 1, S) of weights": lambda batch, heads, text, rows: noise(batch, 1, 1, rows),
}
"""Masks that tell rows or heads apart, or weigh keys."""

MASKS = KEYS | BETWEEN


def by_hand(mask: Tensor, rows: Tensor) -> Tensor:
    """A mask with only `rows` of the joint sequence, as the model is called with without this library."""
    size = mask.shape[-1]
    if mask.ndim == 2 and mask.shape[0] != size:
        return mask[:, rows]
    if mask.ndim > 1 and mask.shape[-2] == size:
        return mask[..., rows, :][..., rows]
    return mask[..., rows]
