"""Where the time of one call goes: attention, the rest of the transformer, everything else."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..errors import IncompatibleError
from ..hooks.diffusers import AttentionSite, check_measurable, tapped_attention
from ..timing import Stopwatch

__all__ = ["CallTimes", "time_call", "timed", "timed_sites"]


@dataclass(frozen=True)
class CallTimes:
    """Seconds of one call.

    Parameters
    ----------
    whole : float
        From the call to the finished result, on the host's clock.
    transformer : float
        Of it inside the transformer, all steps.
    attention : float, optional
        Of that inside attention; None where it was not measured.
    """

    whole: float
    transformer: float
    attention: float | None = None

    @property
    def fixed(self) -> float:
        """Outside the transformer: text encoders, VAE, scheduler."""
        return max(self.whole - self.transformer, 0.0)


def timed_sites(adapter: Adapter, transformer: nn.Module) -> list[AttentionSite]:
    """The attention of a transformer whose time can be taken; none where it cannot be."""
    sites = adapter.sites(transformer)
    try:
        check_measurable(sites, adapter.name)
    except IncompatibleError:
        return []
    return sites


def time_call(call: Callable[[], Any], transformer: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, CallTimes]:
    """Make a call and take its times; what it computes is not changed by a bit.

    Parameters
    ----------
    call : callable
        Runs the pipeline, or any part of it that has the transformer in it.
    transformer : nn.Module
        The pipeline's transformer, or the block whose time is asked for.
    sites : sequence of AttentionSite
        Its attention (``Adapter.sites``); empty when attention cannot be measured.

    Returns
    -------
    result : object
        What the call gives.
    times : CallTimes

    Notes
    -----
    Waits for the device before and after the call, not in between: CUDA events are read at the end.
    """
    inside: list[Stopwatch] = []
    attending: list[Stopwatch] = []
    with _transformer_watches(transformer, inside), _attention_watches(sites, attending):
        whole, result = timed(call, next(transformer.parameters()).device)
    attention = sum(watch.seconds() for watch in attending) if sites else None
    return result, CallTimes(whole, sum(watch.seconds() for watch in inside), attention)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, from a device that has nothing to do to one that has finished, and what the call gives.

    Garbage is collected before, so that it is not during the call.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


@contextmanager
def _transformer_watches(transformer: nn.Module, watches: list[Stopwatch]) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        watches.append(Stopwatch(next(module.parameters()).device))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watches[-1].stop(next(module.parameters()).device)

    handles = [transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _attention_watches(sites: Sequence[AttentionSite], watches: list[Stopwatch]) -> Iterator[None]:
    device: list[Any] = [None]

    def before(site: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        device[0] = q.device
        watches.append(Stopwatch(q.device))

    def after(site: int) -> None:
        watches[-1].stop(device[0])

    with tapped_attention(sites, before, after):
        yield
