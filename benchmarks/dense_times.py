"""How long an unpatched pipeline takes, and how long its transformer and its attention do."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from sparse_ref_attn.adapters.base import adapter_for
from sparse_ref_attn.adapters.seams import tapped_attention
from sparse_ref_attn.timing import Stopwatch

__all__ = ["DenseTimes", "timed"]


class DenseTimes:
    """Times the transformer and its attention on an unpatched pipeline, while used as a context."""

    def __init__(self, transformer: Any) -> None:
        self._transformer, self._device = transformer, transformer.device
        self._forward: list[Stopwatch] = []
        self._attention: list[Stopwatch] = []

    def __enter__(self) -> DenseTimes:
        def start(*_: Any) -> None:
            self._forward.append(Stopwatch(self._device))

        def stop(*_: Any) -> None:
            self._forward[-1].stop(self._device)

        sites = adapter_for(self._transformer).sites(self._transformer)
        self._tap = tapped_attention(
            sites,
            lambda *_: self._attention.append(Stopwatch(self._device)),
            lambda site: self._attention[-1].stop(self._device),
        )
        self._tap.__enter__()
        self._handles = [
            self._transformer.register_forward_pre_hook(start),
            self._transformer.register_forward_hook(stop),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        self._tap.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()

    def seconds(self) -> tuple[float, float]:
        """In the transformer, and in its attention."""
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
