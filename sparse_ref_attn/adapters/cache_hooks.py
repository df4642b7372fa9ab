"""What the library must be told of a model family that keeps its references' K/V between steps: one subclass each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..errors import IncompatibleError
from ..types import TokenLayout

__all__ = ["CacheHooks", "LayerCache"]

Kwargs = dict[str, Any]


class LayerCache(Protocol):
    """One layer's stored K/V, (B, rows, H, C) each, after QK-norm and RoPE."""

    def get(self) -> tuple[Tensor, Tensor]: ...

    def store(self, k: Tensor, v: Tensor) -> None: ...


class CacheHooks:
    """How one family computes, brings and returns its cache.

    An *extract* call has the reference rows and fills a cache, a *cached* call has none and attends to
    it. Where references run before the steps, in calls of their own (`before_steps`), there are cached calls alone, and
    the adapter finds in each what its cache holds. The cache is an object which can be referred to weakly; every row
    of it is a reference token, in the references' order. A family whose cache holds other rows too (`text`) gives
    `layers` that show the reference rows alone, and brings the others in `alone` and `reading`.
    """

    whole: ClassVar[str] = ""
    """Where references always run whole, how they do, in words; empty where some of their rows can leave before."""
    before_steps: ClassVar[bool] = False
    """Whether references run in calls of their own before the first step."""
    text: ClassVar[bool] = False
    """Whether text rows are kept beside those of the references, and cached calls run the generation alone."""

    def check_depth(self, name: str) -> None:
        """Raise IncompatibleError for a model called `name` whose references always run `whole`."""
        raise IncompatibleError(
            f"{name}: {self.whole}, and by depth some of their rows would leave at a block. Take them out of what is "
            'read: from_block=0, profile="step"'
        )

    def kept_by(self, transformer: nn.Module) -> bool:
        """Whether this instance keeps a cache: a class may serve pipelines that do and pipelines that do not."""
        raise NotImplementedError

    def of_call(self, kwargs: Kwargs) -> Any:
        """The cache that a cached call brings."""
        raise NotImplementedError

    def of_output(self, kwargs: Kwargs, layout: TokenLayout, output: Any) -> Any:
        """The cache that an extract call filled."""
        raise NotImplementedError

    def of_attention(self, kwargs: Kwargs) -> LayerCache | None:
        """The layer's cache among the arguments of an attention module in an extract call."""
        raise NotImplementedError

    def layers(self, cache: Any) -> Sequence[LayerCache]:
        """The cache's layers in order of execution."""
        raise NotImplementedError

    def passes(self, cache: Any) -> tuple[int, ...]:
        """Reference tokens of each call before the steps that filled the cache."""
        return ()

    def spans(self, layout: TokenLayout) -> tuple[tuple[int, int], ...]:
        """Where each reference's keys lie in the model's own attention to a cache, (first, end)."""
        return tuple(pairwise(accumulate(layout.sizes, initial=layout.text)))

    def make(self, transformer: nn.Module, layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """A cache of the model's own class that holds k and v of each layer."""
        raise NotImplementedError

    def reading(self, kwargs: Kwargs, cache: Any) -> Kwargs:
        """A cached call's arguments with another cache."""
        raise NotImplementedError

    def alone(self, kwargs: Kwargs) -> Kwargs:
        """A cached call's arguments for which attention is given the call's own rows alone, references left out."""
        raise NotImplementedError

    def resumed(self, kwargs: Kwargs, layout: TokenLayout, cache: Any) -> Kwargs:
        """An extract call's arguments as those of a cached call: without reference rows, with `cache`."""
        raise NotImplementedError

    def returned(self, output: Any, cache: Any) -> Any:
        """A cached call's output as the extract call's that it stands for."""
        raise NotImplementedError

    def conditions(self, kwargs: Kwargs) -> str:
        """Arguments of an extract call that change the K/V beside the references, in words (may sync)."""
        raise NotImplementedError
