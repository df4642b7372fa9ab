"""How long an unpatched pipeline takes, and how long its transformer and its attention do."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from sparse_ref_attn.hooks.diffusers import tapped_attention
from sparse_ref_attn.timing import Stopwatch

from .work import sites_of

__all__ = ["DenseTimes", "timed"]


class DenseTimes:
    """Times the transformer and its attention on an unpatched pipeline, while used as a context.

    Parameters
    ----------
    transformer : torch.nn.Module
    module : torch.nn.Module, optional
        A part of it, to be timed instead.
    site : int, optional
        The one attention of that part; default all.
    """

    def __init__(self, transformer: Any, module: Any = None, site: int | None = None) -> None:
        self._module, self._device = module or transformer, transformer.device
        self._sites = sites_of(transformer, site)
        self._forward: list[Stopwatch] = []
        self._attention: list[Stopwatch] = []

    def __enter__(self) -> DenseTimes:
        def start(*_: Any) -> None:
            self._forward.append(Stopwatch(self._device))

        def stop(*_: Any) -> None:
            self._forward[-1].stop(self._device)

        self._tap = tapped_attention(
            self._sites,
            lambda *_: self._attention.append(Stopwatch(self._device)),
            lambda site: self._attention[-1].stop(self._device),
        )
        self._tap.__enter__()
        self._handles = [
            self._module.register_forward_pre_hook(start),
            self._module.register_forward_hook(stop),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        self._tap.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()

    def seconds(self) -> tuple[float, float]:
        """In the transformer or its part, and in its attention."""
        return sum(w.seconds() for w in self._forward), sum(w.seconds() for w in self._attention)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, device finished."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    images = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, images
