"""Verdicts of the kinds of call that a run will make, got at its first pre-hook, before any block runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..errors import ConfigError, UnsupportedModelError
from ..functional import gather_attention
from ..hooks.diffusers import chosen_backend
from ..ops.gather_attention.backends import Call, choose
from ..ops.gather_attention.trial import kind_of
from ..ops.verdicts import JUDGED, Kind, prepare, size_class
from ..reference_cache import RankedCache
from ..run import Run
from ..types import TokenLayout

__all__ = ["attend_to_bank", "computed_dtype", "prefers_bank", "prepare_joined", "prepare_run"]

_SIZES: weakref.WeakKeyDictionary[nn.Module, tuple[int, int] | None] = weakref.WeakKeyDictionary()


def prepare_run(adapter: Adapter, transformer: nn.Module, layout: TokenLayout, kwargs: Kwargs, run: Run) -> None:
    """What measures the attention of a run's profiling steps; rows are packed before blocks run anyway."""
    tokens = kwargs[adapter.tokens]
    sizes = _sizes(adapter, transformer) if tokens.device.type in JUDGED and run.profile.probes else None
    if sizes is None:
        return
    heads, channels = sizes
    items = len(range(tokens.shape[0])[layout.conditional or slice(None)])
    rows = (layout.generation[1], layout.text + layout.rows, layout.reference_tokens)
    size, dtype = tuple(map(size_class, rows)), computed_dtype(tokens)
    prepare(
        Kind("attention_mass", form, tokens.device, dtype, heads, heads, channels, False, items > 1, size)
        for form in ("LSE given", "LSE computed")
    )


def prepare_joined(
    adapter: Adapter, transformer: nn.Module, kwargs: Kwargs, lengths: Sequence[int], padded: int | None
) -> None:
    """What attends in a call for several items of `lengths` rows; `padded` rows in all, None where they are packed."""
    tokens = kwargs[adapter.tokens]
    sizes = _sizes(adapter, transformer) if tokens.device.type in JUDGED else None
    if sizes is None:
        return
    (heads, channels), dtype, live = sizes, computed_dtype(tokens), sum(lengths)
    gradients = torch.is_grad_enabled()
    call = Call(
        tokens.device, dtype, channels, len(lengths), gradients=gradients, heads=heads, key_heads=heads, queries=live,
        keys=live,
    )  # fmt: skip
    kinds = [kind_of(call)]
    if padded is not None:
        width = heads * channels * tokens.dtype.itemsize
        for form, several, wide in (("pack", True, 3 * width), ("unpack", False, width)):
            size = (size_class(padded), size_class(live), size_class(wide))
            kinds.append(Kind("pack_rows", form, tokens.device, tokens.dtype, several=several, size=size))
    prepare(kinds)


def prefers_bank(processor: object, ranked: RankedCache, layer: int, own: int, count: int) -> bool:
    """Whether a cached call attends to `own` rows and the best `count` of a layer by a kernel that reads the bank.

    Not where the user chose an attention backend, nor where plain dense attention over the ranked rows, which lie
    beside the call's own, is as fast.
    """
    k, _ = ranked.prefix(layer, count)
    if k.device.type not in JUDGED or chosen_backend(processor) is not None:
        return False
    items, _, heads, channels = k.shape
    call = Call(
        k.device, k.dtype, channels, items, heads=heads, key_heads=heads, queries=items * own, keys=items * own,
        kept=items * count,
    )  # fmt: skip
    return choose("auto", call) != "sdpa"


def attend_to_bank(ranked: RankedCache, layer: int, count: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (B, S, H, C) to a call's own k and v and to the best `count` stored rows of each item."""
    keys, values, first = ranked.bank(layer, count)
    items, rows = keys.shape[:2]
    indices = torch.arange(first, first + count, dtype=torch.int32, device=q.device).expand(items, -1)
    indices = indices + rows * torch.arange(items, dtype=torch.int32, device=q.device)[:, None]
    return gather_attention(q, k, v, keys, values, indices, distinct=True)


def _sizes(adapter: Adapter, transformer: nn.Module) -> tuple[int, int] | None:
    """Heads and head dim; None where the adapter does not know them."""
    if transformer not in _SIZES:
        try:
            shape = adapter.shape(transformer)
        except (ConfigError, UnsupportedModelError):
            _SIZES[transformer] = None
        else:
            _SIZES[transformer] = (shape.heads, shape.head_dim)
    return _SIZES[transformer]


def computed_dtype(tokens: Tensor) -> torch.dtype:
    """What attention computes in."""
    kind = tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
