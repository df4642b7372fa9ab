"""Attention of compiled blocks, answered from outside of their graphs.

One backend serves every processor, and it is one registered op: a graph holds no layer's number and no layer's buffers,
so that all blocks of a class share it, without a break. Which layer asks is known by the order of the calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import IncompatibleError
from ...ops.shared.namespace import NAMESPACE
from .attention import AttentionSite, Route
from .private_backend import list_backend, unlist
from .versions import dispatcher

__all__ = ["AnsweredAttention"]

_HERE = threading.local()
_LOCK = threading.RLock()
_UNSET = object()


class _Backend:
    """The backend in diffusers' tables, as long as anybody needs it."""

    def __init__(self) -> None:
        self.users = 0
        self.member: Any = None

    def acquire(self) -> None:
        with _LOCK:
            self.users += 1
            if self.users == 1:
                self._register()

    def release(self) -> None:
        with _LOCK:
            self.users -= 1
            if not self.users:
                unlist(self.member)

    def _register(self) -> None:
        def backend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
            _parallel_config: Any = None,
        ) -> Tensor:
            if dropout_p or is_causal or scale is not None or enable_gqa:
                raise IncompatibleError("attention is answered with a mask and nothing else, got other settings")
            return _answered(query, key, value, attn_mask)

        self.member = list_backend(f"{NAMESPACE}_answered", backend)


_BACKEND = _Backend()


@torch.library.custom_op(f"{NAMESPACE}::answered", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _answered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return _HERE.answer(q, k, v, mask).contiguous()


@_answered.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class AnsweredAttention:
    """Answers the attention of one model's compiled blocks, of one call at a time; to be removed.

    Each of `sites` must attend once in a call of the model, in their order, with nothing but a mask. No gradients.

    Parameters
    ----------
    sites : sequence of AttentionSite
    """

    def __init__(self, sites: Sequence[AttentionSite]) -> None:
        self._sites = tuple(sites)
        _BACKEND.acquire()

    def remove(self) -> None:
        """Diffusers' tables forget the backend if nobody else needs it; once."""
        _BACKEND.release()

    @contextlib.contextmanager
    def route(self, attend: Route) -> Iterator[None]:
        """Inside, `attend` answers every attention call, as in `attention.routed_attention`."""
        processors = [site.processor for site in self._sites]
        own = [vars(processor).get("_attention_backend", _UNSET) for processor in processors]
        inner = [processor._attention_backend for processor in processors]
        calls = iter(range(len(processors)))

        def answer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            i = next(calls, None)
            if i is None:
                raise IncompatibleError(
                    f"each of the {len(processors)} attention layers must attend once in a call, got more"
                )

            def user(keys: Tensor = k, values: Tensor = v, given: Tensor | None = mask) -> Tensor:
                return dispatcher().dispatch_attention_fn(q, keys, values, attn_mask=given, backend=inner[i])

            return attend(i, q, k, v, mask, user)

        _HERE.answer = answer
        for processor in processors:
            processor._attention_backend = _BACKEND.member
        try:
            yield
        finally:
            _HERE.answer = None
            for processor, backend in zip(processors, own, strict=True):
                if backend is _UNSET:
                    del processor._attention_backend
                else:
                    processor._attention_backend = backend
