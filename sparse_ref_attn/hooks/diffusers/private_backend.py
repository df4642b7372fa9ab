"""Attention backends of one processor each, which diffusers' tables hold for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .versions import dispatcher

__all__ = ["Attention", "PrivateBackend", "list_backend", "note_thread", "unlist"]

Attention = Callable[..., Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Attention], Tensor]

_LOCK = threading.RLock()
_INSIDE: set[int] = set()  # threads inside a call of a patched transformer
_RETIRED: list[PrivateBackend] = []  # off, but another thread may just be looking one up


def note_thread(inside: bool) -> None:
    """This thread enters or leaves a call of a patched transformer."""
    with _LOCK:
        (_INSIDE.add if inside else _INSIDE.discard)(threading.get_ident())
        _clear_tables()


def _clear_tables() -> None:
    """Take private backends that nobody can use any more out of diffusers' tables."""
    if _RETIRED and not _INSIDE - {threading.get_ident()}:
        while _RETIRED:
            unlist(_RETIRED.pop()._member)


def list_backend(value: str, backend: Callable[..., Tensor]) -> Any:
    """Put a function with the arguments of diffusers' backends into its tables; the unlisted name under which it is."""
    dispatch = dispatcher()
    member = str.__new__(dispatch.AttentionBackendName, value)
    member._name_, member._value_ = value.upper(), value
    dispatch._AttentionBackendRegistry.register(member)(backend)
    return member


def unlist(member: Any) -> None:
    """Take it out again."""
    registry = dispatcher()._AttentionBackendRegistry
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        table.pop(member, None)


class PrivateBackend:
    """An attention backend for one processor, in force from `enter` to `leave`.

    It is an unlisted ``AttentionBackendName``, so the public enum stays as it is. It answers the thread that entered
    it; calls of other threads go on to what was there before. Those of one processor may leave in
    any order: a call that was broken off leaves when the next one comes, which may have entered by then.

    Parameters
    ----------
    processor : object
        A processor that dispatches to attention backends.
    attend : callable
        ``attend(q, k, v, mask, user)`` with q, k, v (B, S, H, C); ``user()`` is what the processor's
        own backend makes of the same call, ``user(k, v, mask)`` of other keys and values, and of another mask.
    """

    def __init__(self, processor: Any, attend: Attend) -> None:
        self._dispatch = dispatcher()
        self._processor = processor
        self._inner: Any = None
        self._own: bool | None = None
        self._thread: int | None = None

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
            def user(k: Tensor = key, v: Tensor = value, mask: Tensor | None = attn_mask) -> Tensor:
                return self._dispatch.dispatch_attention_fn(
                    query,
                    k,
                    v,
                    attn_mask=mask,
                    dropout_p=dropout_p,
                    is_causal=is_causal,
                    scale=scale,
                    enable_gqa=enable_gqa,
                    backend=self._inner,
                    parallel_config=_parallel_config,
                )

            return user() if self._thread != threading.get_ident() else attend(query, key, value, attn_mask, user)

        self._member = list_backend(f"sparse_ref_attn_{id(processor)}_{id(self)}", backend)
        self._member.owner = self

    def enter(self) -> None:
        """Serve the processor's attention from now on."""
        with _LOCK:
            self._thread = threading.get_ident()
            if self._own is None:
                self._own = "_attention_backend" in vars(self._processor)
                self._inner = self._processor._attention_backend
                self._processor._attention_backend = self._member

    def leave(self) -> None:
        """Give the processor its own backend back."""
        with _LOCK:
            if self._own is not None:
                self._leave()

    def _leave(self) -> None:
        later = self._entered_on_top()
        if later is not None:
            later._own, later._inner = self._own, self._inner
        elif self._own:
            self._processor._attention_backend = self._inner
        else:
            del self._processor._attention_backend
        self._own = None

    def _entered_on_top(self) -> PrivateBackend | None:
        """The backend that this one would have to be given back to."""
        backend = getattr(self._processor._attention_backend, "owner", None)
        while backend is not None and backend._inner is not self._member:
            backend = getattr(backend._inner, "owner", None)
        return backend

    def remove(self) -> None:
        """Leave for good."""
        with _LOCK:
            self.leave()
            _RETIRED.append(self)
            _clear_tables()
