"""Attention processors, and private backends that see or answer their calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import IncompatibleError
from ...ops.with_lse import attention_with_lse
from ..instance import InstanceHook
from .versions import dispatcher

__all__ = [
    "SLOT",
    "Attention",
    "AttentionSite",
    "PrivateBackend",
    "Route",
    "Tap",
    "answered_layer",
    "attention_sites",
    "check_measurable",
    "chosen_backend",
    "dispatches",
    "gives_lse",
    "layers_of",
    "note_thread",
    "of_heads",
    "routed_attention",
    "tapped",
    "tapped_attention",
]

SLOT = "attention_mask"
"""Argument of an attention layer that every processor has, and refuses what is no mask should the hooks be gone."""

# Backends under which `ops.with_lse.attention_with_lse` finds the LSE of a call without a mask.
_LSE_BACKENDS = ("native", "_native_flash", "flash", "_flash_3")

Tap = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None"], None]
Attention = Callable[..., Tensor]
Route = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None", Attention], Tensor]


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the transformer: its processor, the kind of its block, its module if it has one."""

    processor: Any
    kind: str
    module: nn.Module | None = None


def attention_sites(blocks: Sequence[tuple[nn.Module, str]]) -> list[AttentionSite]:
    """One site for each (attention module, kind), in order of execution."""
    return [AttentionSite(attn.processor, kind, attn) for attn, kind in blocks if hasattr(attn, "processor")]


def layers_of(transformer: nn.Module) -> list[nn.Module]:
    """The attention layers whose processors hand their attention to a backend, in the order of the modules."""
    return [m for m in transformer.modules() if dispatches(getattr(m, "processor", None))]


def answered_layer(
    layer: nn.Module, kind: type[Any], attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
) -> list[Callable[[], None]]:
    """Hooks that answer a layer's attention where its mask argument (`SLOT`) is a `kind`, as removers.

    ``attend(value, q, k, v)`` gets that argument's value. Where the value has a ``rotate``, the layer does not turn q
    and k itself.
    """
    current: list[Any] = []

    def answer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, user: Attention) -> Tensor:
        return attend(current[-1], q, k, v)

    backend = PrivateBackend(layer.processor, answer)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(SLOT)
        if not isinstance(value, kind):
            return None
        current.append(value)
        backend.enter()
        turned = {} if value.rotate is None else {"image_rotary_emb": None}
        return args, {**kwargs, SLOT: None, **turned}

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if current:
            current.pop()
            backend.leave()

    return [
        backend.remove,
        layer.register_forward_pre_hook(InstanceHook(layer, before), with_kwargs=True).remove,
        layer.register_forward_hook(InstanceHook(layer, after), with_kwargs=True, always_call=True).remove,
    ]


def dispatches(processor: object) -> bool:
    """Whether an attention processor hands its attention to a backend."""
    return hasattr(processor, "_attention_backend")


def chosen_backend(processor: object) -> object:
    """The attention backend that a processor was set to, None where it goes by diffusers' default."""
    return getattr(processor, "_attention_backend", None)


def gives_lse(processor: object) -> bool:
    """Whether a processor's attention is of a kind that says its LSE; None stands for PyTorch's own."""
    backend = chosen_backend(processor)
    return backend is None or str(getattr(backend, "value", backend)) in _LSE_BACKENDS


def check_measurable(sites: Sequence[AttentionSite], model: str) -> None:
    """Raise IncompatibleError when attention cannot be measured on this model."""
    blind = [type(site.processor).__name__ for site in sites if not dispatches(site.processor)]
    if not sites or blind:
        raise IncompatibleError(
            f"this selector looks at attention, so {model}'s attention must go through processors that dispatch to "
            f"attention backends; got {sorted(set(blind)) or 'no attention sites'}. Use a selector that does not"
        )


@contextlib.contextmanager
def tapped_attention(
    sites: Sequence[AttentionSite], tap: Tap, after: Callable[[int], None] = lambda site: None
) -> Iterator[None]:
    """Inside, `tap(i, q, k, v, mask)` sees every attention call of site i (see `tapped`)."""
    with routed_attention(sites, tapped(tap, after)):
        yield


def tapped(tap: Tap, after: Callable[[int], None] = lambda site: None) -> Route:
    """The route on which `tap(i, q, k, v, mask)` sees every attention call, q, k, v (B, S, H, C) after RoPE.

    `after(i)` is called when the attention itself is done. A tap with a method ``wants_lse(i)`` is called with the LSE
    (B, H, S) of the attention as well, or None, at the sites where it says so. Grouped keys are given to each head.
    """
    wants = getattr(tap, "wants_lse", None)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
        given: list[Tensor | None] = []
        if wants is not None and wants(i):
            out, *given = attention_with_lse(own, q, k, mask)
        k, v = (of_heads(x, q.shape[2]) for x in (k, v))
        tap(i, q, k, v, mask, *given)
        if not given:
            out = own()
        after(i)
        return out

    return attend


def of_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, S, H', C) of grouped-query attention as those of each head (B, S, H, C)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


@contextlib.contextmanager
def routed_attention(sites: Sequence[AttentionSite], attend: Route) -> Iterator[None]:
    """Inside, `attend(i, q, k, v, mask, own)` answers every attention call of site i, q, k, v (B, S, H, C) after RoPE.

    ``own(k, v, mask)`` is the user's own attention of q, by default over the call's own k and v under its own mask.
    Each processor gets a private backend.
    """
    with contextlib.ExitStack() as undo:
        for i, site in enumerate(sites):

            def answer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, user: Attention, i: int = i) -> Tensor:
                return attend(i, q, k, v, mask, user)

            backend = PrivateBackend(site.processor, answer)
            undo.callback(backend.remove)
            backend.enter()
        yield


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
        registry = dispatcher()._AttentionBackendRegistry
        while _RETIRED:
            member = _RETIRED.pop()._member
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
        value = f"sparse_ref_attn_{id(processor)}_{id(self)}"
        self._member = str.__new__(self._dispatch.AttentionBackendName, value)
        self._member._name_, self._member._value_, self._member.owner = value.upper(), value, self

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

        self._dispatch._AttentionBackendRegistry.register(self._member)(backend)

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
