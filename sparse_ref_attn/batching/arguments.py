"""What each item's own pipeline call is given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapters.base import Kwargs
from ..errors import ConfigError
from ..models import facts_of

__all__ = ["item_arguments"]

_OWN = {"prompt": "prompts", "image": "images", "generator": "generators"}


def item_arguments(
    pipe: Any,
    prompts: Sequence[str | None],
    images: Sequence[Sequence[Any]],
    generators: Sequence[torch.Generator] | None,
    each: Sequence[Mapping[str, Any]] | None,
    common: Mapping[str, Any],
) -> list[Kwargs]:
    """The arguments of each item's call; raises ConfigError as `batch.batch` says."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError(f"prompts must be a list of one prompt an item, got {prompts!r}")
    count = len(prompts)
    wrong = next((p for p in prompts if p is not None and not isinstance(p, str)), None)
    if wrong is not None:
        raise ConfigError(f"each prompt must be one string, got {wrong!r}; repeat an item to have more pictures of it")
    for name, values in (("images", images), ("generators", generators), ("each", each)):
        if values is None and name != "images":
            continue
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            got = f"{len(values)}" if isinstance(values, Sequence) else type(values).__name__
            raise ConfigError(f"{name} must be a list of one entry for each of the {count} prompts, got {got}")
    nameless = [own for own in each or () if not isinstance(own, Mapping)]
    if nameless:
        raise ConfigError(f"each must be a list of arguments by name, a dict an item, got {nameless[0]!r}")
    for where in (common, *(each or ())):
        taken = sorted(set(_OWN) & set(where))
        if taken:
            raise ConfigError(f"{taken[0]} must be given as {_OWN[taken[0]]}, one an item, got it as an argument")
    _check_generators(generators)
    calls = []
    for i, (prompt, references) in enumerate(zip(prompts, images, strict=True)):
        _check_references(pipe, i, references)
        call: Kwargs = {**common, **(each[i] if each is not None else {}), "prompt": prompt}
        if references:
            call["image"] = references[0] if len(references) == 1 else list(references)
        if generators is not None:
            call["generator"] = generators[i]
        calls.append(call)
    return calls


def _check_generators(generators: Sequence[torch.Generator] | None) -> None:
    for i, generator in enumerate(generators or ()):
        if not isinstance(generator, torch.Generator):
            raise ConfigError(f"generators must be torch.Generator, one an item, got {type(generator).__name__}")
        first = next(j for j, other in enumerate(generators or ()) if other is generator)
        if first != i:
            raise ConfigError(f"each item must have a generator of its own, got the same for items {first} and {i}")


def _check_references(pipe: Any, item: int, references: Any) -> None:
    if not isinstance(references, (list, tuple)):
        raise ConfigError(
            f"images must hold a list of references for each item, got {type(references).__name__} for item {item}"
        )
    if any(reference is None for reference in references):
        raise ConfigError(f"references must be images, got None for item {item}; an empty list is an item without any")
    name = type(pipe).__name__
    facts = facts_of(pipe)
    least, most = (0, None) if facts is None else facts.references
    if len(references) < least:
        raise ConfigError(f"{name} needs a reference for every item, got none for item {item}")
    if most is not None and len(references) > most:
        raise ConfigError(f"{name} takes at most {most} reference an item, got {len(references)} for item {item}")
