"""FLUX.2's modulation by row, for items of different timesteps that lie end to end.

Blocks modulate by (batch, 1, D) and as well by (batch, rows, D); the output norm only by batch, so there the rows stand
in for the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.instance import InstanceHook

__all__ = ["per_row_modulation"]


def per_row_modulation(transformer: Any, running: Callable[[], Any]) -> list[Callable[[], None]]:
    """Hooks, as removers, that repeat each item's modulation over its rows; `running()` is the joined call or None."""

    def lengths(*streams: str) -> list[int] | None:
        """Rows of the items in `streams`, one after another; None where all share one modulation."""
        call = running()
        if call is None or call.kwargs["timestep"].shape[0] == 1:
            return None
        return [rows for name in streams for rows in getattr(call, name)]

    def spread(values: Tensor, counts: list[int]) -> Tensor:
        times = torch.tensor(counts, device=values.device)
        values = values.repeat(len(counts) // values.shape[0], 1)
        return values.repeat_interleave(times, 0, output_size=sum(counts))

    def by_row(*streams: str) -> Callable[..., Any]:
        def call(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            counts = lengths(*streams)
            return None if counts is None else spread(output, counts)[None]

        return call

    def rows_as_batch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if lengths("images") is None else (args[0].transpose(0, 1), *args[1:])

    def norm_by_row(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        counts = lengths("images")
        return None if counts is None else spread(output, counts)

    def batch_as_rows(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if lengths("images") is None else output.transpose(0, 1)

    norm = transformer.norm_out
    after = [
        (transformer.double_stream_modulation_img, by_row("images")),
        (transformer.double_stream_modulation_txt, by_row("text")),
        (transformer.single_stream_modulation, by_row("text", "images")),
        (norm.linear, norm_by_row),
        (norm, batch_as_rows),
    ]
    hooks = [module.register_forward_hook(InstanceHook(module, call)).remove for module, call in after]
    return [norm.register_forward_pre_hook(InstanceHook(norm, rows_as_batch)).remove, *hooks]
