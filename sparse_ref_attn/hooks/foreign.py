"""Forwards that somebody replaced, as step caches of the TeaCache kind do, and the errors that come out of them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import IncompatibleError
from .instance import InstanceHook

__all__ = ["ExplainedSizes", "foreign_code"]

_SIZES = re.compile(r"size|shape|dimension", re.IGNORECASE)


def foreign_code(module: nn.Module) -> str | None:
    """What somebody put into a model's forward: the first forward replaced in an object or in its class, or hook.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> foreign_code(model)
    >>> model[0].forward = lambda x: x
    >>> foreign_code(model)
    'the forward of 0 (Linear)'
    """
    for name, part in module.named_modules():
        place = f"{name} ({type(part).__name__})" if name else type(part).__name__
        home = next((cls for cls in type(part).__mro__ if "forward" in vars(cls)), None)
        defined = None if home is None else getattr(vars(home)["forward"], "__module__", None)
        if "forward" in vars(part) or (home is not None and defined != home.__module__):
            return f"the forward of {place}"
        hooks = (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        if any(not isinstance(hook, InstanceHook) for hook in hooks):
            return f"a hook of {place}"
    return None


class ExplainedSizes(TorchFunctionMode):
    """Inside, an error of torch's about sizes is raised as an IncompatibleError with `words` before it.

    torch offers no hook that may turn a forward's error into another one; a function mode sees each operation.
    """

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:  # running out of memory has a class of its own
            if type(error) is not RuntimeError or not _SIZES.search(str(error)):
                raise
            raise IncompatibleError(f"{self._words}: {error}") from error
