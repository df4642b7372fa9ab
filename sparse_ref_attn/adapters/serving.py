"""Whether an adapter can serve a transformer: told from its class, before anything is patched."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..errors import UnsupportedModelError
from ..hooks.diffusers import missing_parts
from .classes import full_name

if TYPE_CHECKING:
    from .base import Adapter

__all__ = ["check_arguments", "check_serves"]


def check_serves(adapter: Adapter, transformer: nn.Module) -> None:
    """Raise UnsupportedModelError where a transformer is not what an adapter of a family was written for.

    Its class is one of the adapter's, derives from one, or is somebody's own that is built alike: the forward has
    the arguments that the adapter reads, and the blocks stand where it looks for them. Another class of diffusers
    is none of these, however alike: its forward computes something else of them.
    """
    cls = type(transformer)
    ours = {full_name(base) for base in cls.__mro__} & set(adapter.classes)
    if adapter.classes and not ours and full_name(cls).startswith("diffusers."):
        raise UnsupportedModelError(
            f"the {adapter.name} adapter serves {_names(adapter.classes)} and what derives from it, "
            f"got {full_name(cls)}"
        )
    if adapter.classes and full_name(cls) not in adapter.classes:
        check_arguments(adapter, transformer, [adapter.tokens, adapter.text_tokens, *adapter.needs])
        missing = missing_parts(transformer, adapter.parts)
        for path in adapter.stacks:
            stack = getattr(transformer, path, None)
            if not isinstance(stack, nn.ModuleList):
                missing.append(f"{path} (a ModuleList)")
            elif not all(isinstance(getattr(block, adapter.attention, None), nn.Module) for block in stack):
                missing.append(f"{adapter.attention} in each of {path}")
        if missing:
            raise UnsupportedModelError(
                f"a transformer that the {adapter.name} adapter serves must have {', '.join(missing)}; "
                f"{full_name(cls)} has not. Describe your own model with a PlainAdapter"
            )
    adapter.check(transformer)


def check_arguments(adapter: Adapter, transformer: nn.Module, names: Iterable[str | None]) -> None:
    """Raise UnsupportedModelError where the forward has no argument of such a name."""
    parameters = inspect.signature(type(transformer).forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    missing = [name for name in names if name is not None and name not in parameters]
    if missing:
        raise UnsupportedModelError(
            f"the forward of a transformer that the {adapter.name} adapter serves must have the arguments "
            f"{', '.join(missing)}; that of {full_name(type(transformer))} has {', '.join(list(parameters)[1:])}"
        )


def _names(classes: Iterable[str]) -> str:
    return " or ".join(name.rsplit(".", 1)[1] for name in classes)
