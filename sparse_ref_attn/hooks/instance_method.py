"""A method of one module, stood in for: for what a model computes in a method that is no module of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["InstanceMethod"]


class InstanceMethod:
    """Stands in for a method of `module`, as ``call(own, *arguments)``, until it is removed.

    In a copy or a pickle of the module it is what it stood in for.

    Examples
    --------
    >>> import copy
    >>> class Doubles(nn.Module):
    ...     def twice(self, x):
    ...         return 2 * x
    >>> model = Doubles()
    >>> method = InstanceMethod(model, "twice", lambda own, x: own(x) + 1)
    >>> model.twice(3), copy.deepcopy(model).twice(3)
    (7, 6)
    >>> method.remove()
    >>> model.twice(3)
    6
    """

    def __init__(self, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        self._module, self._name, self._call = weakref.ref(module), name, call
        self._earlier = vars(module).get(name)
        self._armed = True
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        own = self._earlier or getattr(type(module), self._name).__get__(module)
        return self._call(own, *args, **kwargs) if self._armed else own(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there; where somebody stands in for this one, do nothing from now on."""
        self._armed, module = False, self._module()
        if module is None or vars(module).get(self._name) is not self:
            return
        if self._earlier is None:
            delattr(module, self._name)
        else:
            setattr(module, self._name, self._earlier)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copy is asked for its method before it has a state of its own: that is the class's.
        return (getattr, (self._module(), self._name)) if self._earlier is None else (_same, (self._earlier,))


def _same(call: Callable[..., Any]) -> Callable[..., Any]:
    return call
