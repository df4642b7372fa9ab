"""Module hooks that serve one instance: in a deep copy or a pickle of the module they do nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["InstanceHook"]

_REASON = (
    "sparse_ref_attn's hooks shorten the sequence at every step, so a patched transformer must not be compiled as a "
    "whole with fullgraph=True. Compile its blocks: transformer.compile_repeated_blocks(fullgraph=True)"
)


class InstanceHook:
    """A forward hook or pre-hook of `module`, called as ``call(module, *arguments)``.

    torch copies and pickles a module together with its hooks; the copies of this one are inert. A
    compiler that traces the module steps around it.

    Examples
    --------
    >>> import copy
    >>> seen = []
    >>> layer = nn.Identity()
    >>> handle = layer.register_forward_pre_hook(InstanceHook(layer, lambda module, args: seen.append(args)))
    >>> layer(1), copy.deepcopy(layer)(2), seen
    (1, 2, [(1,)])
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module = weakref.ref(module)
        self._armed = True
        self._call = torch.compiler.disable(call, reason=_REASON)

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        return self._call(module, *arguments) if self._armed and module is self._module() else None

    def disarm(self) -> None:
        """Do nothing from now on: torch still calls a hook that was taken off within the call."""
        self._armed = False

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*arguments: Any) -> None:
    return None
