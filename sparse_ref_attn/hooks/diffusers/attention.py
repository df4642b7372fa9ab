"""Attention processors, and private backends that see or answer their calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...errors import IncompatibleError
from ...ops.with_lse import attention_with_lse
from ..instance import InstanceHook
from .private_backend import Attention, PrivateBackend

__all__ = [
    "SLOT",
    "AttentionSite",
    "KeptRoute",
    "Route",
    "Tap",
    "answerable",
    "answered_layer",
    "attention_sites",
    "check_measurable",
    "chosen_backend",
    "dispatches",
    "gives_lse",
    "layers_of",
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
Route = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None", Attention], Tensor]


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the transformer: its processor, the kind of its block, its module if it has one.

    Kinds are "double" and "single" for joint attention, a family's own where blocks see another part of the rows (see
    `Adapter.order`), and "other", which is passed over.
    """

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


def answerable(sites: Sequence[AttentionSite]) -> bool:
    """Whether every attention can be answered by itself: its processor dispatches, and is no other layer's too."""
    return bool(sites) and all(dispatches(site.processor) for site in sites) and not _shared(sites)


def _shared(sites: Sequence[AttentionSite]) -> bool:
    return len({id(site.processor) for site in sites}) < len(sites)


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
    if _shared(sites):
        raise IncompatibleError(
            f"this selector looks at attention, so each attention of {model} must have a processor of its own, got one "
            f"{type(sites[0].processor).__name__} for several: set_attn_processor with a dictionary sets one each"
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


class KeptRoute:
    """As `routed_attention`, of one thread, with backends that are made once and cost little to put on; to be removed.

    Parameters
    ----------
    sites : sequence of AttentionSite
    """

    def __init__(self, sites: Sequence[AttentionSite]) -> None:
        self.thread = threading.get_ident()
        self._attend: Route | None = None
        self._backends = [PrivateBackend(site.processor, partial(self._answer, i)) for i, site in enumerate(sites)]

    def _answer(self, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, user: Attention) -> Tensor:
        return user() if self._attend is None else self._attend(i, q, k, v, mask, user)

    @contextlib.contextmanager
    def route(self, attend: Route) -> Iterator[None]:
        """Inside, `attend` answers every attention call of this thread."""
        self._attend = attend
        try:
            for backend in self._backends:
                backend.enter()
            yield
        finally:
            self._attend = None
            for backend in self._backends:
                backend.leave()

    def remove(self) -> None:
        """Take the backends out of diffusers' tables."""
        for backend in self._backends:
            backend.remove()
