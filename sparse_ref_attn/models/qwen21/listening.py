"""The generation's attention in the step that fills Qwen-Image-2.1's cache, whose processors go past their backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...adapters.cache_hooks import Kwargs
from ...hooks.diffusers import AttentionSite, Tap, internal
from ...hooks.instance import InstanceHook

__all__ = ["heard_generation"]


@contextlib.contextmanager
def heard_generation(sites: list[AttentionSite], tap: Tap) -> Iterator[None]:
    """Inside, ``tap(i, q, k, v, mask)`` is given what the generation attends to in site i, where it wants it.

    The keys and values before it are those that the layer has just stored; its own are computed once more.
    """
    wants = getattr(tap, "wants_lse", lambda i: True)
    with contextlib.ExitStack() as undo:
        for i, site in enumerate(sites):

            def hear(attn: Any, args: tuple[Any, ...], kwargs: Kwargs, output: Tensor, i: int = i) -> None:
                if kwargs.get("kv_cache_mode") == "extract" and wants(i):
                    valid = kwargs.get("key_valid")
                    mask = None if valid is None else valid[:, None, None, :]
                    tap(i, *_generation(attn, kwargs), mask)

            if site.module is not None:
                hook = InstanceHook(site.module, hear)
                undo.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _generation(attn: Any, kwargs: Kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the generation (B, G, H, C), and keys and values of all rows."""
    turned = internal("models.transformers.transformer_qwenimage21", "apply_rotary_emb_qwen")
    k, v = kwargs["layer_cache"].get()
    own, rotary = kwargs["hidden_states"][:, k.shape[1] :], kwargs["rotary_emb"][k.shape[1] :]
    queries, keys, values = (part(own).unflatten(-1, k.shape[2:]) for part in (attn.to_q, attn.to_k, attn.to_v))
    queries, keys = (turned(x.to(v.dtype), rotary, use_real=False) for x in (attn.norm_q(queries), attn.norm_k(keys)))
    return queries, torch.cat([k, keys], 1), torch.cat([v, values], 1)
