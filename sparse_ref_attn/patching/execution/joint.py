"""Which attention layers of a model are joint attention that can be answered, so that keys can be stored and read."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter
from ...adapters.joint_order import in_order, order_of_kept
from ...config import SparseRef
from ...errors import ConfigError, IncompatibleError
from ...execution import Cache
from ...hooks.compiled import compiled_blocks, eager_blocks
from ...hooks.diffusers import (
    AnsweredAttention,
    Attention,
    KeptRoute,
    Route,
    answerable,
    around_reruns,
    routed_attention,
)
from ..call import Call

__all__ = ["UNCOMPILED", "JointAttention", "LookedAt", "check_cache"]

UNCOMPILED = "compiled blocks run uncompiled where keys and values are stored or read"
"""Said of a run in which they do."""


def check_cache(config: SparseRef, adapter: Adapter, transformer: nn.Module) -> None:
    """Raise where keys and values of the references cannot be stored, or other layers are named than there are."""
    if not isinstance(config.execute, Cache):
        return
    sites, name = joint_layers(adapter, transformer), config.execute.name
    if not sites:
        raise IncompatibleError(
            f'execute="{name}" stores keys and values of the references, for which {adapter.name}\'s attention must be '
            "known and go through processors that dispatch to attention backends, or be named to a PlainAdapter: "
            'attention=["single"] * len(blocks). Else drop tokens: "sparse-context", or execute="tokens"'
        )
    if config.layers is not None and len(config.layers) != len(sites):
        raise ConfigError(
            f"layers must be a factor for each of the {len(sites)} attention layers, got {len(config.layers)}"
        )


def joint_layers(adapter: Adapter, transformer: nn.Module) -> list[int]:
    """Which of the adapter's attention sites are joint attention that can be answered; none unless all of them."""
    sites = adapter.sites(transformer)
    if not adapter.routable(transformer):
        return []
    return [i for i, site in enumerate(sites) if site.kind != "other"]


class JointAttention:
    """The joint attention of one model: looked up once, answered in every call.

    Parameters
    ----------
    adapter : Adapter
    transformer : nn.Module
    """

    def __init__(self, adapter: Adapter, transformer: nn.Module) -> None:
        self._adapter = adapter
        self.sites = adapter.sites(transformer)
        self.layers = joint_layers(adapter, transformer)
        self._places = {site: layer for layer, site in enumerate(self.layers)}
        self._once = all(type(site.processor).__name__ in adapter.processors for site in self.sites)
        self._kept: KeptRoute | None = None
        self._shared: AnsweredAttention | None = None
        self._off: list[Callable[[], object]] = []
        self._compiled = compiled_blocks(transformer)

    def serves(self, transformer: nn.Module) -> bool:
        """At the beginning of a run: whether the model still has these processors; looks for compiled blocks."""
        self._compiled = compiled_blocks(transformer)
        now = self._adapter.sites(transformer)
        return [id(site.processor) for site in now] == [id(site.processor) for site in self.sites]

    def keep(self) -> None:
        """Hold on to what answers the calls of this thread, to be removed."""
        if answerable(self.sites):
            self._kept = KeptRoute(self.sites)
            self._off.append(weakref.finalize(self, self._kept.remove))
        if self._once:
            self._shared = AnsweredAttention(self.sites)
            self._off.append(weakref.finalize(self, self._shared.remove))

    def remove(self) -> None:
        """Leave nothing behind, as at the end of a model that is collected while it is patched."""
        self._kept = self._shared = None
        while self._off:
            self._off.pop()()

    @property
    def stays_compiled(self) -> bool:
        """Whether compiled blocks run compiled while their attention is answered; no other call may run meanwhile."""
        return self._compiled and self._shared is not None and not torch.is_grad_enabled()

    @property
    def runs_uncompiled(self) -> bool:
        """Whether they never do."""
        return self._compiled and self._shared is None

    def answer(
        self, call: Call, rows: int, attend: Route, eager: bool, keys: int | None = None, again: bool = True
    ) -> None:
        """Let ``attend(layer, ...)`` answer attention of `rows` joint rows until the call is over.

        Parameters
        ----------
        call : Call
        rows : int
        attend : Route
        eager : bool
            Whether compiled blocks run uncompiled.
        keys : int, optional
            What the rows attend to; default `rows`, their own.
        again : bool
            Whether it answers a checkpointed block that runs again in the backward pass too; the model's own attention
            does otherwise.
        """
        keys = rows if keys is None else keys
        asked = self._adapter.ordered(attend, call.layout.text)
        ways: dict[str, tuple[tuple[int, int], Route]] = {}
        for kind in {site.kind for site in self.sites}:
            order = self._order(call, kind)
            ways[kind] = ((rows, keys), asked) if order is None else ((order.shape[1],) * 2, in_order(attend, order))

        def route(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            wanted, answer = ways[self.sites[i].kind]
            joint = i in self._places and (q.shape[1], k.shape[1]) == wanted
            return answer(self._places[i], q, k, v, mask, own) if joint else own()

        if self.stays_compiled and not eager:
            assert self._shared is not None
            call.contexts.enter_context(self._shared.route(route))
            return
        if self._compiled:
            call.contexts.enter_context(eager_blocks(call.module))
        call.contexts.enter_context(around_reruns(call.module, self._rerun(call.module, route if again else None)))
        if self._kept is not None and self._kept.thread == threading.get_ident():
            call.contexts.enter_context(self._kept.route(route))
        else:
            call.contexts.enter_context(self._adapter.route(call.module, route))

    def _order(self, call: Call, kind: str) -> Tensor | None:
        """As `Adapter.order`, of the rows that the call runs."""
        order = self._adapter.order(call.kwargs, call.layout, kind)
        if order is None or call.shortened is None:
            return order
        return order_of_kept(order, call.shortened.rows, call.shortened.size)

    def _rerun(
        self, module: nn.Module, route: Route | None
    ) -> Callable[[nn.Module], contextlib.AbstractContextManager[None]]:
        """Around one block that runs again: as in the call, on whatever thread."""
        sites, compiled = self.sites, self._compiled

        @contextlib.contextmanager
        def around(block: nn.Module) -> Iterator[None]:
            inside = {id(each) for each in block.modules()}
            own = [i for i, site in enumerate(sites) if id(site.module) in inside]
            with contextlib.ExitStack() as contexts:
                if compiled:
                    contexts.enter_context(eager_blocks(module))
                if route is not None:
                    contexts.enter_context(
                        routed_attention([sites[i] for i in own], lambda j, *given: route(own[j], *given))
                    )
                yield

        return around


class LookedAt:
    """A model's joint attention as it was last looked at; what runs in other threads began with is kept beside it.

    Parameters
    ----------
    adapter : Adapter
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._found: list[JointAttention] = []
        self._keeps = False

    def look_at(self, transformer: nn.Module) -> JointAttention:
        """Know the attention layers; their processors may be others when a run begins."""
        if not self._found or not self._found[-1].serves(transformer):
            self._found.append(JointAttention(self._adapter, transformer))
            if self._keeps:
                self._found[-1].keep()
        return self._found[-1]

    def install(self, transformer: nn.Module) -> None:
        """Keep what answers attention, until `remove`."""
        self._keeps = True
        self.look_at(transformer)

    @property
    def last(self) -> JointAttention:
        """What was found last."""
        return self._found[-1]

    def remove(self) -> None:
        """Leave nothing behind."""
        while self._found:
            self._found.pop().remove()
