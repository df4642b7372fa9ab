"""Which adapter serves which class of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters import Adapter, FunctionModel
from ..adapters.classes import full_name, nearest
from ..adapters.serving import check_serves
from ..errors import UnsupportedModelError
from .refused import REFUSED

__all__ = ["adapter_for", "families", "register_adapter", "register_family", "supported"]

_REGISTRY: dict[str, Adapter] = {}
_FAMILIES: list[Adapter] = []


def register_adapter(cls: type[nn.Module] | str, adapter: Adapter) -> None:
    """Serve transformers of class `cls` with `adapter`; a later registration replaces an earlier one.

    The name of a function stands for each `FunctionModel` of it.

    Parameters
    ----------
    cls : class or str
        The class, or its full name "module.qualname" (nothing is imported then).
    adapter : Adapter
        An instance, for example of `PlainAdapter`.

    Examples
    --------
    >>> from sparse_ref_attn.adapters import PlainAdapter
    >>> from sparse_ref_attn.types import Reference
    >>> class MyDiT(nn.Module): ...
    >>> layout = lambda kwargs: ((0, 16), (Reference(16, 16, (4, 4)),))
    >>> register_adapter(MyDiT, PlainAdapter(tokens="x", rows={"ids": 0}, find=layout))
    """
    _REGISTRY[cls if isinstance(cls, str) else full_name(cls)] = adapter


def supported() -> dict[str, str]:
    """Class name and adapter name of everything registered."""
    return {name: adapter.name for name, adapter in sorted(_REGISTRY.items())}


def register_family(family: Adapter) -> None:
    """Serve the classes of a family with it; what it says of pipelines and sizes stays known if others serve them."""
    _FAMILIES.append(family)
    for name in family.classes:
        register_adapter(name, family)


def families() -> list[Adapter]:
    """Every adapter once, the library's own first."""
    return list(dict.fromkeys([*_FAMILIES, *_REGISTRY.values()]))


def adapter_for(transformer: nn.Module) -> Adapter:
    """The adapter of a transformer, by its class or a base class; of a `FunctionModel` by its function.

    Raises
    ------
    UnsupportedModelError
        Naming the class, what is supported, and how to add it; what the class lacks that its adapter needs; or why no
        family serves it.
    """
    function = _function_of(transformer)
    adapter = nearest(type(transformer), _REGISTRY) or _REGISTRY.get(function)
    if adapter is not None:
        check_serves(adapter, transformer)
        return adapter
    reason = nearest(type(transformer), REFUSED)
    if reason is not None:
        raise UnsupportedModelError(
            "a transformer must have references that can be dropped or stored, got "
            f"{full_name(type(transformer))}: {reason}"
        )
    own = full_name(type(transformer)) + (f" of {function}" if function else "")
    known = "\n".join(f"  {name} ({label})" for name, label in supported().items())
    raise UnsupportedModelError(
        f"a transformer's class must have an adapter, got {own}. Supported:\n{known}\n"
        "Your own model takes three lines:\n"
        "  adapter = sparse_ref_attn.PlainAdapter(\n"
        '      tokens="x", rows={"ids": 0}, find=lambda kwargs: ((0, n_gen), (Reference(n_gen, n_ref, (h, w)),)))\n'
        "  sparse_ref_attn.register_adapter(MyDiT, adapter)"
    )


def _function_of(transformer: nn.Module) -> str:
    """Full name of the function that runs the model; empty where none does."""
    function: Any = transformer.function if isinstance(transformer, FunctionModel) else None
    return f"{function.__module__}.{function.__qualname__}" if hasattr(function, "__qualname__") else ""
