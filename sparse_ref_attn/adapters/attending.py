"""How the attention of a model is heard and answered, of the sites that its adapter names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..hooks.diffusers import AttentionSite, Route, Tap, answerable, check_measurable, routed_attention, tapped
from ..types import TokenLayout

__all__ = ["Attending"]

Kwargs = dict[str, Any]


class Attending:
    """The part of an `Adapter` that follows from its `sites`."""

    def sites(self, transformer: nn.Module) -> list[AttentionSite]:
        """Attention of each block, in order of execution; empty when it cannot be measured."""
        raise NotImplementedError

    def check_measurable(self, transformer: nn.Module) -> None:
        """Raise IncompatibleError when attention cannot be measured on this instance."""
        check_measurable(self.sites(transformer), type(transformer).__name__)

    def routable(self, transformer: nn.Module) -> bool:
        """Whether every attention of this instance can be answered (see `route`)."""
        return answerable(self.sites(transformer))

    def route(self, transformer: nn.Module, attend: Route) -> Any:
        """Context in which `attend` answers every attention call (see `hooks.diffusers.routed_attention`)."""
        return routed_attention(self.sites(transformer), attend)

    def onlookers(self, transformer: nn.Module) -> list[AttentionSite]:
        """Attention of other rows, such as those of sound, whose keys are the image stream's rows and no others."""
        return []

    def idle(self, kwargs: Kwargs) -> frozenset[int]:
        """Which of `sites` do not attend in this call."""
        return frozenset()

    def ordered(self, attend: Route, text: int) -> Route:
        """`attend`, which has `text` rows before those of the image stream, for attention as the model does it."""
        return attend

    def order(self, kwargs: Kwargs, layout: TokenLayout, kind: str) -> Tensor | None:
        """Where a full call's attention at sites of `kind` has its rows, (B or 1, S) int64, the image stream's last;
        None: text first, then the image stream, in the model too."""
        return None

    def listen(self, transformer: nn.Module, tap: Tap) -> Any:
        """Context in which `tap` sees every attention call (see `hooks.diffusers.tapped`)."""
        return self.route(transformer, tapped(tap))
