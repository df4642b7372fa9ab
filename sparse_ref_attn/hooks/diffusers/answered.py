"""Attention of a whole model, answered through one backend that costs nothing to put on and that compiled blocks share.

Which layer asks is known by the order of the calls. In compiled blocks the backend is one registered op: a graph holds
no layer's number and no layer's buffers, so that all blocks of a class have one graph, without a break.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import IncompatibleError
from .attention import AttentionSite, Route
from .versions import dispatcher

__all__ = ["AnsweredAttention"]

Answer = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
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
                registry = dispatcher()._AttentionBackendRegistry
                for table in (registry._backends, registry._constraints, registry._supported_arg_names):
                    table.pop(self.member, None)

    def _register(self) -> None:
        dispatch, name = dispatcher(), "sparse_ref_attn_answered"
        self.member = str.__new__(dispatch.AttentionBackendName, name)
        self.member._name_, self.member._value_ = name.upper(), name

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
            if torch.compiler.is_compiling():
                return _answered(query, key, value, attn_mask)
            return _answer(query, key, value, attn_mask)

        dispatch._AttentionBackendRegistry.register(self.member)(backend)


_BACKEND = _Backend()
_OTHERS: list[Any] = []
"""The backend that calls of threads go on to which answer none; the last one that a model had."""


def _answer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    answer: Answer | None = getattr(_HERE, "answer", None)
    return _own(_OTHERS[-1], q, k, v, mask) if answer is None else answer(q, k, v, mask)


def _own(inner: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What the user's own backend makes of a call."""
    return dispatcher().dispatch_attention_fn(q, k, v, attn_mask=mask, backend=inner)


@torch.library.custom_op("sparse_ref_attn::answered", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _answered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return _answer(q, k, v, mask).contiguous()


@_answered.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class AnsweredAttention:
    """Answers the attention of one model; to be removed.

    Each of `sites` must attend once in a call of the model, in their order, with nothing but a mask.

    Parameters
    ----------
    sites : sequence of AttentionSite
    """

    def __init__(self, sites: Sequence[AttentionSite]) -> None:
        self.sites = tuple(sites)
        self._inside = 0
        self._before: list[Any] = []
        self._inner: list[Any] = []
        _BACKEND.acquire()
        self._release = weakref.finalize(self, _BACKEND.release)

    def remove(self) -> None:
        """Give the processors their own backends back; diffusers' tables forget this one if nobody else needs it."""
        with _LOCK:
            if self._inside:
                self._inside = 1
                self._leave()
        self._release()

    @contextlib.contextmanager
    def route(self, attend: Route) -> Iterator[None]:
        """Inside, `attend` answers every attention call of this thread, as in `attention.routed_attention`."""
        self._enter()
        inner, calls, count = self._inner, iter(range(len(self.sites))), len(self.sites)

        def answer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            i = next(calls, None)
            if i is None:
                raise IncompatibleError(f"each of the {count} attention layers must attend once in a call, got more")

            def user(keys: Tensor = k, values: Tensor = v, given: Tensor | None = mask) -> Tensor:
                return _own(inner[i], q, keys, values, given)

            return attend(i, q, k, v, mask, user)

        before, _HERE.answer = getattr(_HERE, "answer", None), answer
        try:
            yield
        finally:
            _HERE.answer = before
            with _LOCK:
                if self._inside:
                    self._leave()

    def _enter(self) -> None:
        """Put the backend on; calls in other threads may be inside already."""
        with _LOCK:
            self._inside += 1
            if self._inside > 1:
                return
            processors = [site.processor for site in self.sites]
            self._before = [vars(processor).get("_attention_backend", _UNSET) for processor in processors]
            self._inner = [processor._attention_backend for processor in processors]
            _OTHERS.append(self._inner[0])
            for processor in processors:
                processor._attention_backend = _BACKEND.member

    def _leave(self) -> None:
        self._inside -= 1
        if self._inside:
            return
        _OTHERS.remove(self._inner[0])
        for site, backend in zip(self.sites, self._before, strict=True):
            if backend is _UNSET:
                del site.processor._attention_backend
            else:
                site.processor._attention_backend = backend
