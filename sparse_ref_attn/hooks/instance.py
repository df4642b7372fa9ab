"""Module hooks that serve one instance: in a deep copy or a pickle of the module they do nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import IncompatibleError

__all__ = ["InstanceHook", "check_free", "is_patched"]

_REASON = (
    "sparse_ref_attn's hooks shorten the sequence at every step, so a patched transformer must not be compiled as a "
    "whole with fullgraph=True. Compile its blocks: transformer.compile_repeated_blocks(fullgraph=True)"
)


class InstanceHook:
    """A forward hook or pre-hook of `module`, called as ``call(module, *arguments)``.

    A module's hooks that change its tokens have one `purpose`, which `check_free` guards.

    torch copies and pickles a module together with its hooks; the copies of this one are inert. A
    compiler that traces the module steps around it, or, with ``traced=False``, leaves it out.

    Examples
    --------
    >>> import copy
    >>> seen = []
    >>> layer = nn.Identity()
    >>> handle = layer.register_forward_pre_hook(InstanceHook(layer, lambda module, args: seen.append(args)))
    >>> layer(1), copy.deepcopy(layer)(2), seen
    (1, 2, [(1,)])
    """

    def __init__(
        self, module: nn.Module, call: Callable[..., Any], purpose: str | None = None, traced: bool = True
    ) -> None:
        self._module = weakref.ref(module)
        self._purpose = purpose
        self._armed, self._traced = True, traced
        self._call = torch.compiler.disable(call, reason=_REASON)

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        if not self._traced and torch.compiler.is_compiling():
            return None
        return self._call(module, *arguments) if self._armed and module is self._module() else None

    def serves_another(self, module: nn.Module, purpose: str) -> bool:
        """Whether it changes the tokens of `module` for something else than `purpose`."""
        return self._armed and module is self._module() and self._purpose not in (None, purpose)

    def disarm(self) -> None:
        """Do nothing from now on: torch still calls a hook that was taken off within the call."""
        self._armed = False

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert, ()


def is_patched(module: nn.Module) -> bool:
    """Whether hooks change the module's tokens, for whatever purpose."""
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, InstanceHook) and hook.serves_another(module, "") for hook in hooks)


def check_free(module: nn.Module, purpose: str) -> None:
    """Raise IncompatibleError where a hook of another purpose already changes the module's tokens."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, InstanceHook) and hook.serves_another(module, purpose):
            raise IncompatibleError(
                f"a transformer must be patched for {purpose} alone, got one that is patched for {hook._purpose}: "
                "call remove() on that handle first"
            )


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*arguments: Any) -> None:
    return None
