"""Attention of compiled blocks, answered from outside of their graphs.

One attention backend serves every processor, and it is one registered op: a graph holds no layer's number and no
layer's buffers, so that all blocks of a class share it. Which layer asks is known by the order of the calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import IncompatibleError
from .attention import AttentionSite, Route
from .versions import dispatcher

__all__ = ["CompiledAttention"]

Answer = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
_HERE = threading.local()


@torch.library.custom_op("sparse_ref_attn::answered", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _answered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    answer: Answer = getattr(_HERE, "answer", None) or _BACKEND.pass_on
    return answer(q, k, v, mask).contiguous()


@_answered.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class _Backend:
    """The backend in diffusers' tables, as long as anybody needs it."""

    def __init__(self) -> None:
        self.users = 0
        self.member: Any = None
        self.inner: Any = None

    def acquire(self) -> None:
        self.users += 1
        if self.users > 1:
            return
        dispatch = dispatcher()
        self.member = str.__new__(dispatch.AttentionBackendName, "sparse_ref_attn_answered")
        self.member._name_, self.member._value_ = "SPARSE_REF_ATTN_ANSWERED", "sparse_ref_attn_answered"

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
                raise IncompatibleError("compiled attention is answered as plain attention alone, got other settings")
            return _answered(query, key, value, attn_mask)

        dispatch._AttentionBackendRegistry.register(self.member)(backend)

    def release(self) -> None:
        self.users -= 1
        if self.users:
            return
        registry = dispatcher()._AttentionBackendRegistry
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(self.member, None)

    def own(self, inner: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What the user's own backend makes of a call."""
        return dispatcher().dispatch_attention_fn(q, k, v, attn_mask=mask, backend=inner)

    def pass_on(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """A call of a thread that answers none."""
        return self.own(self.inner, q, k, v, mask)


_BACKEND = _Backend()


class CompiledAttention:
    """Answers the attention of one model's compiled blocks; to be removed.

    Each of `sites` must attend once in a call of the model, in their order, with nothing but a mask. No gradients.
    """

    def __init__(self) -> None:
        _BACKEND.acquire()

    def remove(self) -> None:
        """Take the backend out of diffusers' tables, if nobody else needs it."""
        _BACKEND.release()

    @contextlib.contextmanager
    def route(self, sites: Sequence[AttentionSite], attend: Route) -> Iterator[None]:
        """Inside, `attend` answers every attention call of this thread, as in `attention.routed_attention`."""
        own = [vars(site.processor).get("_attention_backend", _UNSET) for site in sites]
        inner = [site.processor._attention_backend for site in sites]
        _BACKEND.inner = inner[0]
        calls = iter(range(len(sites)))

        def answer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            i = next(calls, None)
            if i is None:
                raise IncompatibleError(f"each of the {len(sites)} attention layers must attend once, got more calls")
            first = (k, v, mask)

            def user(k: Tensor = k, v: Tensor = v, mask: Tensor | None = mask) -> Tensor:
                return _BACKEND.own(inner[i], q, k, v, mask)

            return attend(i, q, *first, user)

        before = getattr(_HERE, "answer", None)
        _HERE.answer = answer
        for site in sites:
            site.processor._attention_backend = _BACKEND.member
        try:
            yield
        finally:
            _HERE.answer = before
            for site, backend in zip(sites, own, strict=True):
                if backend is _UNSET:
                    del site.processor._attention_backend
                else:
                    site.processor._attention_backend = backend


_UNSET = object()
