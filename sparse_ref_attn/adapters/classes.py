"""Classes by their full names: what is known of one is found without importing any."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TypeVar

from ..errors import VersionError

__all__ = ["full_name", "load_class", "nearest"]

T = TypeVar("T")


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def nearest(cls: type, known: Mapping[str, T]) -> T | None:
    """What is known, by full name, of a class or of its nearest base class; None where nothing is.

    Examples
    --------
    >>> class Mine(dict): ...
    >>> nearest(Mine, {"builtins.dict": "a mapping"}), nearest(int, {"mine.int": "a number"})
    ('a mapping', None)
    """
    return next((known[name] for base in cls.__mro__ if (name := full_name(base)) in known), None)


def load_class(name: str) -> type:
    """The class of a full name; imports its module.

    Raises
    ------
    VersionError
        If it is not there.
    """
    module, _, cls = name.rpartition(".")
    try:
        return getattr(import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise VersionError(f"{module.partition('.')[0]} must have {name}, which cannot be imported: {error}") from error
